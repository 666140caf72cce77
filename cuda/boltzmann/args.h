// boltzmann: checks of the ops' arguments, the same for every device, and their parameters.
#pragma once

#include "boltzmann/params.h"
#include "m3i/host/check.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace m3i {

struct BoltzmannArgs {
  const torch::stable::Tensor& z_hat;                   // [N, D]
  const torch::stable::Tensor& z;                       // [M, D]
  const torch::stable::Tensor& scale;                   // [] wide
  const torch::stable::Tensor& bias;                    // [M] wide
  const torch::stable::Tensor& row_ids;                 // [N] int32
  const std::optional<torch::stable::Tensor>& col_ids;  // [M] int32
};

namespace detail {

inline DType boltzmann_dtype(const torch::stable::Tensor& z_hat) {
  using torch::headeronly::ScalarType;
  switch (z_hat.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "z_hat: expected dtype float32, float64, float16 or bfloat16, got ",
                      dtype_name(z_hat.scalar_type()));
  }
}

inline torch::headeronly::ScalarType wide_dtype(const torch::stable::Tensor& z_hat) {
  using torch::headeronly::ScalarType;
  return z_hat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_boltzmann_tensor(const torch::stable::Tensor& tensor, const char* name,
                                   torch::headeronly::ScalarType dtype,
                                   std::initializer_list<int64_t> shape,
                                   const torch::stable::Tensor& z_hat) {
  check_dtype(tensor, name, dtype);
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
  check_same_device(tensor, name, z_hat, "z_hat");
}

inline const bool* check_flag(const torch::stable::Tensor& flag, const char* name,
                              const torch::stable::Tensor& z_hat) {
  check_boltzmann_tensor(flag, name, torch::headeronly::ScalarType::Bool, {}, z_hat);
  return flag.const_data_ptr<bool>();
}

inline BoltzmannInput make_boltzmann_input(const BoltzmannArgs& args) {
  using torch::headeronly::ScalarType;
  const auto& z_hat = args.z_hat;
  BoltzmannInput input;
  input.dtype = boltzmann_dtype(z_hat);
  check_shape(z_hat, "z_hat", {kAny, kAny});
  check_contiguous(z_hat, "z_hat");
  check_boltzmann_tensor(args.z, "z", z_hat.scalar_type(), {kAny, z_hat.size(1)}, z_hat);
  input.rows = z_hat.size(0);
  input.columns = args.z.size(0);
  input.width = z_hat.size(1);
  for (const auto& [extent, name] : {std::pair{input.rows, "z_hat"}, {input.columns, "z"}}) {
    STD_TORCH_CHECK(extent <= std::numeric_limits<int32_t>::max() / 2, name,
                    ": expected fewer than 2^30 rows, got ", extent);
  }
  check_boltzmann_tensor(args.scale, "scale", wide_dtype(z_hat), {}, z_hat);
  check_boltzmann_tensor(args.bias, "bias", wide_dtype(z_hat), {input.columns}, z_hat);
  check_boltzmann_tensor(args.row_ids, "row_ids", ScalarType::Int, {input.rows}, z_hat);
  if (args.col_ids) {
    check_boltzmann_tensor(*args.col_ids, "col_ids", ScalarType::Int, {input.columns}, z_hat);
  }
  input.z_hat = z_hat.const_data_ptr();
  input.z = args.z.const_data_ptr();
  input.scale = args.scale.const_data_ptr();
  input.bias = args.bias.const_data_ptr();
  input.row_ids = args.row_ids.const_data_ptr<int32_t>();
  input.col_ids = args.col_ids ? args.col_ids->const_data_ptr<int32_t>() : nullptr;
  input.run = nullptr;
  return input;
}

inline BoltzmannShift make_boltzmann_shift(const BoltzmannArgs& args,
                                           const torch::stable::Tensor& row_shift,
                                           const torch::stable::Tensor& col_shift) {
  const auto dtype = wide_dtype(args.z_hat);
  check_boltzmann_tensor(row_shift, "row_shift", dtype, {args.z_hat.size(0)}, args.z_hat);
  check_boltzmann_tensor(col_shift, "col_shift", dtype, {args.z.size(0)}, args.z_hat);
  return {row_shift.const_data_ptr(), col_shift.const_data_ptr()};
}

// An uninitialised output of the wide dtype.
inline torch::stable::Tensor new_wide(const BoltzmannArgs& args, std::vector<int64_t> shape) {
  return torch::stable::new_empty(args.z_hat, shape, wide_dtype(args.z_hat));
}

}  // namespace detail

struct BoltzmannMaximaCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> out;
  BoltzmannMaximaParams params;
};

inline BoltzmannMaximaCall prepare_boltzmann_maxima(
    const BoltzmannArgs& args, const std::optional<torch::stable::Tensor>& run) {
  BoltzmannMaximaCall call;
  call.params.input = detail::make_boltzmann_input(args);
  if (run) call.params.input.run = detail::check_flag(*run, "run", args.z_hat);
  auto& [row_max, col_max] = call.out;
  row_max = detail::new_wide(args, {args.z_hat.size(0)});
  col_max = detail::new_wide(args, {args.z.size(0)});
  call.params.row_max = row_max.mutable_data_ptr();
  call.params.col_max = col_max.mutable_data_ptr();
  return call;
}

struct BoltzmannSumsCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> out;
  BoltzmannSumsParams params;
};

inline BoltzmannSumsCall prepare_boltzmann_sums(const BoltzmannArgs& args,
                                                const torch::stable::Tensor& row_shift,
                                                const torch::stable::Tensor& col_shift, bool exact,
                                                bool symmetric, bool sigmoid,
                                                const std::optional<torch::stable::Tensor>& run) {
  BoltzmannSumsCall call;
  BoltzmannSumsParams& params = call.params;
  params.input = detail::make_boltzmann_input(args);
  if (run) params.input.run = detail::check_flag(*run, "run", args.z_hat);
  params.shift = detail::make_boltzmann_shift(args, row_shift, col_shift);
  params.exact = exact;
  params.sigmoid = sigmoid;
  auto& [rows, columns] = call.out;
  rows = detail::new_wide(args, {kNumSums, args.z_hat.size(0)});
  columns = detail::new_wide(args, {kNumSums, symmetric ? args.z.size(0) : 0});
  params.rows = rows.mutable_data_ptr();
  params.columns = symmetric ? columns.mutable_data_ptr() : nullptr;
  return call;
}

struct BoltzmannGradsCall {
  // Gradients by z_hat, z, scale and bias, then values; [0] where not needed.
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
             torch::stable::Tensor, torch::stable::Tensor>
      out;
  BoltzmannGradsParams params;
};

inline BoltzmannGradsCall prepare_boltzmann_grads(
    const BoltzmannArgs& args, const torch::stable::Tensor& row_shift,
    const torch::stable::Tensor& col_shift, const torch::stable::Tensor& exact,
    const torch::stable::Tensor& row_weights, const torch::stable::Tensor& col_weights,
    bool sigmoid, const std::vector<bool>& needs_grad) {
  BoltzmannGradsCall call;
  BoltzmannGradsParams& params = call.params;
  params.input = detail::make_boltzmann_input(args);
  params.shift = detail::make_boltzmann_shift(args, row_shift, col_shift);
  params.exact = detail::check_flag(exact, "exact", args.z_hat);
  params.sigmoid = sigmoid;
  const auto dtype = detail::wide_dtype(args.z_hat);
  const int64_t rows = args.z_hat.size(0), columns = args.z.size(0), width = args.z.size(1);
  detail::check_boltzmann_tensor(row_weights, "row_weights", dtype, {kNumWeights, rows},
                                 args.z_hat);
  detail::check_boltzmann_tensor(col_weights, "col_weights", dtype, {kNumWeights, columns},
                                 args.z_hat);
  STD_TORCH_CHECK(needs_grad.size() == 3, "needs_grad: expected 3 values, of z_hat, z and bias, ",
                  "got ", needs_grad.size());
  params.row_weights = row_weights.const_data_ptr();
  params.col_weights = col_weights.const_data_ptr();
  auto& [grad_z_hat, grad_z, grad_scale, grad_bias, values] = call.out;
  const auto output = [&](torch::stable::Tensor& tensor, bool wanted, std::vector<int64_t> shape) {
    tensor = detail::new_wide(args, wanted ? shape : std::vector<int64_t>{0});
    return wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  params.grad_z_hat = output(grad_z_hat, needs_grad[0], {rows, width});
  params.grad_z = output(grad_z, needs_grad[1], {columns, width});
  params.grad_scale = output(grad_scale, true, {});
  params.grad_bias = output(grad_bias, needs_grad[2], {columns});
  params.values = output(values, sigmoid, {rows});
  return call;
}

}  // namespace m3i
