// boltzmann: registration for CUDA.
#include "boltzmann/rows/op_cuda.h"
#include "boltzmann/args.h"
#include "boltzmann/op.h"
#include "boltzmann/vectors/args.h"
#include "boltzmann/vectors/op.h"
#include "m3i/host/cuda_stream.h"

#include <torch/csrc/stable/library.h>

namespace m3i {
namespace {

using torch::stable::Tensor;

template <class Call>
auto run_boltzmann(const Call& call, const Tensor& z_hat) {
  Tensor scratch = torch::stable::new_empty(z_hat, {boltzmann_scratch_bytes(call.params)},
                                            torch::headeronly::ScalarType::Byte);
  STD_CUDA_CHECK(launch_boltzmann(call.params, scratch.mutable_data_ptr(), current_stream(z_hat)));
  return call.out;
}

std::tuple<Tensor, Tensor> boltzmann_maxima_cuda(const Tensor& z_hat, const Tensor& z,
                                                 const Tensor& scale, const Tensor& bias,
                                                 const Tensor& row_ids, std::optional<Tensor> run) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  const std::optional<Tensor> col_ids;
  return run_boltzmann(prepare_boltzmann_maxima({z_hat, z, scale, bias, row_ids, col_ids}, run),
                       z_hat);
}

std::tuple<Tensor, Tensor> boltzmann_sums_cuda(const Tensor& z_hat, const Tensor& z,
                                               const Tensor& scale, const Tensor& bias,
                                               const Tensor& row_ids, std::optional<Tensor> col_ids,
                                               const Tensor& row_shift, const Tensor& col_shift,
                                               bool exact, bool symmetric, bool sigmoid,
                                               std::optional<Tensor> run) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  return run_boltzmann(prepare_boltzmann_sums({z_hat, z, scale, bias, row_ids, col_ids}, row_shift,
                                              col_shift, exact, symmetric, sigmoid, run),
                       z_hat);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_grads_cuda(
    const Tensor& z_hat, const Tensor& z, const Tensor& scale, const Tensor& bias,
    const Tensor& row_ids, std::optional<Tensor> col_ids, const Tensor& row_shift,
    const Tensor& col_shift, const Tensor& exact, const Tensor& row_weights,
    const Tensor& col_weights, bool sigmoid, std::vector<bool> needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  return run_boltzmann(
      prepare_boltzmann_grads({z_hat, z, scale, bias, row_ids, col_ids}, row_shift, col_shift,
                              exact, row_weights, col_weights, sigmoid, needs_grad),
      z_hat);
}

// ---- On vectors ---------------------------------------------------------------------------------

// Runs an operator that needs no scratch memory, on the device of `tensor`.
template <class Prepare>
auto run_on_vectors(const Tensor& tensor, const Prepare& prepare) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const auto call = prepare();
  STD_CUDA_CHECK(launch_boltzmann(call.params, current_stream(tensor)));
  return call.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> boltzmann_prepare_cuda(
    const Tensor& z_hat, const Tensor& z, OptionalTensor bias, OptionalTensor row_ids,
    OptionalTensor col_ids, int64_t first_column, std::optional<int64_t> num_columns) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  return run_boltzmann(
      prepare_boltzmann_prepare(z_hat, z, bias, row_ids, col_ids, first_column, num_columns),
      z_hat);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> boltzmann_shift_cuda(const Tensor& extremes,
                                                                const Tensor& scale,
                                                                const Tensor& row_ids,
                                                                const Tensor& bias) {
  return run_on_vectors(scale,
                        [&] { return prepare_boltzmann_shift(extremes, scale, row_ids, bias); });
}

Tensor boltzmann_exact_cuda(const Tensor& rows, const Tensor& cols, const Tensor& run) {
  return run_on_vectors(rows, [&] { return prepare_boltzmann_exact(rows, cols, run); });
}

std::tuple<Tensor, Tensor> boltzmann_exact_shift_cuda(const Tensor& row_max, const Tensor& col_max,
                                                      const Tensor& row_shift,
                                                      const Tensor& col_shift,
                                                      const Tensor& exact) {
  return run_on_vectors(row_max, [&] {
    return prepare_boltzmann_exact_shift(row_max, col_max, row_shift, col_shift, exact);
  });
}

Tensor boltzmann_totals_cuda(const Tensor& rows, const Tensor& cols, OptionalTensor rows_again,
                             OptionalTensor cols_again, const Tensor& row_shift,
                             const Tensor& col_shift, const Tensor& exact) {
  return run_on_vectors(rows, [&] {
    return prepare_boltzmann_totals(
        {rows, cols, rows_again, cols_again, row_shift, col_shift, exact});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_loss_cuda(
    const Tensor& rows, const Tensor& cols, OptionalTensor rows_again, OptionalTensor cols_again,
    const Tensor& row_shift, const Tensor& col_shift, const Tensor& exact, const Tensor& totals,
    const Tensor& bound, bool symmetric, bool mean, int64_t ranks) {
  return run_on_vectors(rows, [&] {
    return prepare_boltzmann_loss({rows, cols, rows_again, cols_again, row_shift, col_shift, exact},
                                  totals, bound, symmetric, mean, ranks);
  });
}

std::tuple<Tensor, Tensor> boltzmann_sigmoid_loss_cuda(const Tensor& values, const Tensor& extremes,
                                                       const Tensor& bound, bool mean,
                                                       int64_t ranks) {
  return run_on_vectors(
      values, [&] { return prepare_boltzmann_sigmoid_loss(values, extremes, bound, mean, ranks); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_scale_cuda(
    const Tensor& grad_out, OptionalTensor share, OptionalTensor scale, const Tensor& grad_z_hat,
    const Tensor& grad_z, const Tensor& grad_scale, const Tensor& grad_bias,
    torch::headeronly::ScalarType dtype) {
  return run_on_vectors(grad_out, [&] {
    return prepare_boltzmann_scale(grad_out, share, scale, grad_z_hat, grad_z, grad_scale,
                                   grad_bias, dtype);
  });
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("boltzmann_maxima", TORCH_BOX(&boltzmann_maxima_cuda));
  library.impl("boltzmann_sums", TORCH_BOX(&boltzmann_sums_cuda));
  library.impl("boltzmann_grads", TORCH_BOX(&boltzmann_grads_cuda));
  library.impl("boltzmann_prepare", TORCH_BOX(&boltzmann_prepare_cuda));
  library.impl("boltzmann_shift", TORCH_BOX(&boltzmann_shift_cuda));
  library.impl("boltzmann_exact", TORCH_BOX(&boltzmann_exact_cuda));
  library.impl("boltzmann_exact_shift", TORCH_BOX(&boltzmann_exact_shift_cuda));
  library.impl("boltzmann_totals", TORCH_BOX(&boltzmann_totals_cuda));
  library.impl("boltzmann_loss", TORCH_BOX(&boltzmann_loss_cuda));
  library.impl("boltzmann_sigmoid_loss", TORCH_BOX(&boltzmann_sigmoid_loss_cuda));
  library.impl("boltzmann_scale", TORCH_BOX(&boltzmann_scale_cuda));
  library.impl("boltzmann_rows_pass", TORCH_BOX(&boltzmann_rows_pass_cuda));
}

}  // namespace
}  // namespace m3i
