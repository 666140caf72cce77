// boltzmann_rows_pass: checks of the arguments, the same for every device, and the parameters.
#pragma once

#include "boltzmann/rows/params.h"
#include "m3i/host/check.h"

#include <torch/csrc/stable/ops.h>

#include <optional>

namespace m3i {

// A matrix of a block, [R, stride], and what makes logits of its first `columns`.
struct BoltzmannLogitsArgs {
  const torch::stable::Tensor& products;
  const torch::stable::Tensor& scale;                // []
  const std::optional<torch::stable::Tensor>& bias;  // [columns]
};

struct BoltzmannRowsArgs {
  BoltzmannLogitsArgs logits;
  const std::optional<torch::stable::Tensor>& target_products;
  int64_t columns;
  const std::optional<torch::stable::Tensor>& target_scale;
  const std::optional<torch::stable::Tensor>& target_bias;
  const std::optional<torch::stable::Tensor>& row_ids;      // [R] int32
  const std::optional<torch::stable::Tensor>& row_weights;  // [R]
  const torch::stable::Tensor& nll;                         // [R]
  const std::optional<torch::stable::Tensor>& scale_grads;  // [R]
  const std::optional<torch::stable::Tensor>& rounded;
  bool writes_products;
};

namespace detail {

inline void* check_rows_matrix(const torch::stable::Tensor& matrix, const char* name,
                               const torch::stable::Tensor& products) {
  check_shape(matrix, name, {products.size(0), products.size(1)});
  check_contiguous(matrix, name);
  check_same_device(matrix, name, products, "products");
  return matrix.mutable_data_ptr();
}

inline void* check_rows_vector(const torch::stable::Tensor& vector, const char* name,
                               torch::headeronly::ScalarType dtype,
                               std::initializer_list<int64_t> shape,
                               const torch::stable::Tensor& products) {
  check_dtype(vector, name, dtype);
  check_shape(vector, name, shape);
  check_contiguous(vector, name);
  check_same_device(vector, name, products, "products");
  return vector.mutable_data_ptr();
}

inline BoltzmannLogits make_boltzmann_logits(const BoltzmannLogitsArgs& args, const char* products,
                                             const char* scale, const char* bias,
                                             const torch::stable::Tensor& like, int64_t columns) {
  const auto wide = like.scalar_type();
  check_dtype(args.products, products, wide);
  return {check_rows_matrix(args.products, products, like),
          check_rows_vector(args.scale, scale, wide, {}, like),
          args.bias ? check_rows_vector(*args.bias, bias, wide, {columns}, like) : nullptr};
}

}  // namespace detail

inline BoltzmannRowsParams prepare_boltzmann_rows(const BoltzmannRowsArgs& args) {
  using torch::headeronly::ScalarType;
  const torch::stable::Tensor& products = args.logits.products;
  const auto wide = products.scalar_type();
  STD_TORCH_CHECK(wide == ScalarType::Float || wide == ScalarType::Double,
                  "products: expected dtype float32 or float64, got ", dtype_name(wide));
  check_shape(products, "products", {kAny, kAny});
  const int64_t rows = products.size(0), stride = products.size(1), columns = args.columns;
  STD_TORCH_CHECK(stride % kBoltzmannRowsPadding == 0, "products: expected rows of a multiple of ",
                  kBoltzmannRowsPadding, " elements, got ", stride);
  STD_TORCH_CHECK(0 < columns && columns <= stride, "columns: expected from 1 to ", stride,
                  ", got ", columns);
  BoltzmannRowsParams params{};
  params.dtype = wide == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  params.rows = rows;
  params.columns = columns;
  params.stride = stride;
  params.logits =
      detail::make_boltzmann_logits(args.logits, "products", "scale", "bias", products, columns);
  STD_TORCH_CHECK(args.row_ids.has_value() != args.target_products.has_value(),
                  "row_ids: expected either row_ids or target_products");
  if (args.target_products) {
    STD_TORCH_CHECK(args.target_scale.has_value(), "target_scale: expected a tensor, got None");
    params.targets = detail::make_boltzmann_logits(
        {*args.target_products, *args.target_scale, args.target_bias}, "target_products",
        "target_scale", "target_bias", products, columns);
  } else {
    params.row_ids = static_cast<const int32_t*>(
        detail::check_rows_vector(*args.row_ids, "row_ids", ScalarType::Int, {rows}, products));
  }
  const auto vector = [&](const std::optional<torch::stable::Tensor>& of_rows, const char* name) {
    return of_rows ? detail::check_rows_vector(*of_rows, name, wide, {rows}, products) : nullptr;
  };
  params.row_weights = vector(args.row_weights, "row_weights");
  params.nll = detail::check_rows_vector(args.nll, "nll", wide, {rows}, products);
  params.scale_grads = vector(args.scale_grads, "scale_grads");
  params.writes_products = args.writes_products;
  if (args.rounded) {
    const auto half = args.rounded->scalar_type();
    STD_TORCH_CHECK(
        wide == ScalarType::Float && (half == ScalarType::Half || half == ScalarType::BFloat16),
        "rounded: expected float16 or bfloat16 beside float32, got ", dtype_name(half));
    params.dtype = half == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
    params.rounded = detail::check_rows_matrix(*args.rounded, "rounded", products);
  }
  STD_TORCH_CHECK(!(params.rounded || params.writes_products) || params.scale_grads,
                  "scale_grads: expected a tensor where gradients are needed, got None");
  return params;
}

}  // namespace m3i
