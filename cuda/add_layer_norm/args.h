// add_layer_norm: checks of both ops' arguments, the same for every device, and their parameters.
#pragma once

#include "add_layer_norm/params.h"
#include "m3i/host/check.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <vector>

namespace m3i {
namespace detail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType add_layer_norm_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, ": expected float32, float64, float16 or bfloat16, got ",
                  dtype_name(dtype));
  return dtype == ScalarType::Float    ? DType::kFloat32
         : dtype == ScalarType::Double ? DType::kFloat64
         : dtype == ScalarType::Half   ? DType::kFloat16
                                       : DType::kBFloat16;
}

inline ScalarType add_layer_norm_accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like_x(const Tensor& tensor, const char* name, const Tensor& x,
                         const std::vector<int64_t>& expected, ScalarType dtype) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == expected, name,
                  ": expected shape ", shape_string(expected), ", got ", shape_string(sizes));
  check_dtype(tensor, name, dtype);
  check_same_device(tensor, name, x, "x");
  check_contiguous(tensor, name);
}

// Of x [..., D] and the dtype of what the norm returns. Throws, naming the argument, what was
// expected and what was given.
inline AddLayerNormRows check_add_layer_norm(const Tensor& x, ScalarType dtype) {
  AddLayerNormRows of;
  of.stream = add_layer_norm_dtype(x.scalar_type(), "x");
  of.branch = add_layer_norm_dtype(dtype, "dtype");
  const auto sizes = x.sizes();
  const int64_t width = sizes.size() > 0 ? sizes[sizes.size() - 1] : 0;
  STD_TORCH_CHECK(width > 0 && width <= kAddLayerNormWidth,
                  "x: expected shape [..., D] with 0 < D <= ", kAddLayerNormWidth, ", got ",
                  shape_string(sizes));
  STD_TORCH_CHECK(
      of.stream == of.branch || (of.stream == DType::kFloat32 && of.branch != DType::kFloat64),
      "dtype: expected that of x, or float16 or bfloat16 beside float32, got ", dtype_name(dtype),
      " beside ", dtype_name(x.scalar_type()));
  check_contiguous(x, "x");
  of.width = width;
  of.rows = x.numel() / width;
  return of;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace detail

struct AddLayerNormCall {
  torch::stable::Tensor sum, normed, mean, rstd;  // uninitialised; sum is [0] without a branch
  AddLayerNormParams params;
};

// Checks the arguments and allocates the outputs, on the device of x.
inline AddLayerNormCall prepare_add_layer_norm(const torch::stable::Tensor& x,  // [..., D]
                                               const std::optional<torch::stable::Tensor>& branch,
                                               const torch::stable::Tensor& weight,  // [D]
                                               const torch::stable::Tensor& bias,    // [D]
                                               double eps, torch::headeronly::ScalarType dtype) {
  const AddLayerNormRows of = detail::check_add_layer_norm(x, dtype);
  const auto accumulator = detail::add_layer_norm_accumulator(x);
  const auto shape = detail::shape_of(x);
  if (branch) detail::check_like_x(*branch, "branch", x, shape, dtype);
  detail::check_like_x(weight, "weight", x, {of.width}, accumulator);
  detail::check_like_x(bias, "bias", x, {of.width}, accumulator);
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "eps: expected a finite value > 0, got ", eps);
  AddLayerNormCall call{branch ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0}),
                        torch::stable::new_empty(x, shape, dtype),
                        torch::stable::new_empty(x, {of.rows}, accumulator),
                        torch::stable::new_empty(x, {of.rows}, accumulator),
                        {}};
  AddLayerNormParams& params = call.params;
  params.of = of;
  params.eps = eps;
  params.x = x.const_data_ptr();
  params.branch = branch ? branch->const_data_ptr() : nullptr;
  params.weight = weight.const_data_ptr();
  params.bias = bias.const_data_ptr();
  params.sum = branch ? call.sum.mutable_data_ptr() : nullptr;
  params.normed = call.normed.mutable_data_ptr();
  params.mean = call.mean.mutable_data_ptr();
  params.rstd = call.rstd.mutable_data_ptr();
  return call;
}

struct AddLayerNormBwdCall {
  // Uninitialised; grad_branch is [0] where it is grad_x, and those of weight and bias are [0]
  // where nobody needs them.
  torch::stable::Tensor grad_x, grad_branch, grad_weight, grad_bias;
  bool needs_affine;
  torch::headeronly::ScalarType accumulator;
  AddLayerNormBwdParams params;  // complete except for the partial sums
};

// Checks the arguments and allocates the gradients, on the device of sum.
inline AddLayerNormBwdCall prepare_add_layer_norm_bwd(
    const torch::stable::Tensor& grad_normed,              // [..., D]
    const std::optional<torch::stable::Tensor>& grad_sum,  // [..., D]
    const torch::stable::Tensor& sum,                      // [..., D]
    const torch::stable::Tensor& weight,                   // [D]
    const torch::stable::Tensor& mean,                     // [R]
    const torch::stable::Tensor& rstd,                     // [R]
    bool needs_branch, bool needs_affine) {
  const auto dtype = grad_normed.scalar_type();
  const AddLayerNormRows of = detail::check_add_layer_norm(sum, dtype);
  const auto accumulator = detail::add_layer_norm_accumulator(sum);
  const auto shape = detail::shape_of(sum);
  if (grad_sum) detail::check_like_x(*grad_sum, "grad_sum", sum, shape, sum.scalar_type());
  detail::check_like_x(grad_normed, "grad_normed", sum, shape, dtype);
  detail::check_like_x(weight, "weight", sum, {of.width}, accumulator);
  detail::check_like_x(mean, "mean", sum, {of.rows}, accumulator);
  detail::check_like_x(rstd, "rstd", sum, {of.rows}, accumulator);
  const bool has_own = needs_branch && of.stream != of.branch;
  const int64_t affine = needs_affine ? of.width : 0;
  AddLayerNormBwdCall call{
      torch::stable::empty_like(sum),
      has_own ? torch::stable::empty_like(grad_normed) : torch::stable::new_empty(grad_normed, {0}),
      torch::stable::new_empty(sum, {affine}, accumulator),
      torch::stable::new_empty(sum, {affine}, accumulator),
      needs_affine,
      accumulator,
      {}};
  AddLayerNormBwdParams& params = call.params;
  params.of = of;
  params.grad_sum = grad_sum ? grad_sum->const_data_ptr() : nullptr;
  params.grad_normed = grad_normed.const_data_ptr();
  params.sum = sum.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.mean = mean.const_data_ptr();
  params.rstd = rstd.const_data_ptr();
  params.grad_x = call.grad_x.mutable_data_ptr();
  params.grad_branch = has_own ? call.grad_branch.mutable_data_ptr() : nullptr;
  params.partials = nullptr;
  return call;
}

// The parameters of the last sum, where partial sums of `blocks` blocks stand in `partials`.
inline AddLayerNormAffineParams affine_params(AddLayerNormBwdCall& call, int64_t blocks,
                                              const torch::stable::Tensor& partials) {
  AddLayerNormAffineParams params;
  params.accumulator = call.params.of.stream == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  params.blocks = blocks;
  params.width = call.params.of.width;
  params.partials = partials.const_data_ptr();
  params.grad_weight = call.grad_weight.mutable_data_ptr();
  params.grad_bias = call.grad_bias.mutable_data_ptr();
  return params;
}

}  // namespace m3i
