// add_layer_norm: registration for CUDA.
#include "add_layer_norm/op.h"

#include "add_layer_norm/args.h"
#include "m3i/host/cuda_stream.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace m3i {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cuda(
    const Tensor& x, const std::optional<Tensor>& branch, const Tensor& weight, const Tensor& bias,
    double eps, torch::headeronly::ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  AddLayerNormCall call = prepare_add_layer_norm(x, branch, weight, bias, eps, dtype);
  if (call.params.of.rows > 0) {
    STD_CUDA_CHECK(launch_add_layer_norm(call.params, current_stream(x)));
  }
  return {call.sum, call.normed, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd_cuda(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, bool needs_branch,
    bool needs_affine) {
  const torch::stable::accelerator::DeviceGuard guard(sum.get_device_index());
  AddLayerNormBwdCall call = prepare_add_layer_norm_bwd(grad_normed, grad_sum, sum, weight, mean,
                                                        rstd, needs_branch, needs_affine);
  const AddLayerNormRows& of = call.params.of;
  if (of.rows == 0) {
    torch::stable::zero_(call.grad_weight);
    torch::stable::zero_(call.grad_bias);
    return {call.grad_x, call.grad_branch, call.grad_weight, call.grad_bias};
  }
  const cudaStream_t stream = current_stream(sum);
  const int64_t blocks = needs_affine ? add_layer_norm_num_partials(of.rows, of.stream) : 0;
  Tensor partials = torch::stable::new_empty(sum, {blocks, 2, of.width}, call.accumulator);
  call.params.partials = needs_affine ? partials.mutable_data_ptr() : nullptr;
  STD_CUDA_CHECK(launch_add_layer_norm_bwd(call.params, stream));
  if (needs_affine) {
    STD_CUDA_CHECK(launch_add_layer_norm_affine(affine_params(call, blocks, partials), stream));
  }
  return {call.grad_x, call.grad_branch, call.grad_weight, call.grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cuda));
  library.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd_cuda));
}

}  // namespace
}  // namespace m3i
