// boltzmann: registration for CUDA.
#include "boltzmann/rows/op_cuda.h"
#include "boltzmann/args.h"
#include "boltzmann/op.h"
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

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("boltzmann_maxima", TORCH_BOX(&boltzmann_maxima_cuda));
  library.impl("boltzmann_sums", TORCH_BOX(&boltzmann_sums_cuda));
  library.impl("boltzmann_grads", TORCH_BOX(&boltzmann_grads_cuda));
  library.impl("boltzmann_rows_pass", TORCH_BOX(&boltzmann_rows_pass_cuda));
}

}  // namespace
}  // namespace m3i
