// mask_mix: registration for CUDA.
#include "m3i/host/cuda_stream.h"
#include "mask_mix/args.h"
#include "mask_mix/op.h"

#include <torch/csrc/stable/library.h>

namespace m3i {
namespace {

using torch::stable::Tensor;

Tensor mask_mix_cuda(const Tensor& views, const Tensor& choice, const Tensor& members,
                     std::vector<double> mean, std::vector<double> std,
                     torch::headeronly::ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(views.get_device_index());
  const MaskMixCall call = prepare_mask_mix(views, choice, members, mean, std, dtype);
  STD_CUDA_CHECK(launch_mask_mix(call.params, current_stream(views)));
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("mask_mix", TORCH_BOX(&mask_mix_cuda));
}

}  // namespace
}  // namespace m3i
