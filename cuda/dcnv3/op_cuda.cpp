// dcnv3: registration for CUDA.
#include "dcnv3/args.h"
#include "dcnv3/op.h"
#include "m3i/host/cuda_stream.h"

#include <torch/csrc/stable/library.h>

namespace m3i {
namespace {

using torch::stable::Tensor;

Tensor dcnv3_cuda(const Tensor& x, const Tensor& offset, const Tensor& mask,
                  std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                  double offset_scale, bool remove_center, bool softmax) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Dcnv3Call call = prepare_dcnv3(
      x, offset, mask,
      {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax});
  STD_CUDA_CHECK(launch_dcnv3(call.params, current_stream(x)));
  return call.out;
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_bwd_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& offset, const Tensor& mask,
    std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double offset_scale, bool remove_center,
    bool softmax, std::vector<bool> needs_grad, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Dcnv3BwdCall call = prepare_dcnv3_bwd(
      grad_out, x, offset, mask,
      {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax},
      needs_grad);
  Tensor scratch =
      torch::stable::new_empty(x, {dcnv3_bwd_scratch_bytes(call.params, deterministic)},
                               torch::headeronly::ScalarType::Byte);
  STD_CUDA_CHECK(
      launch_dcnv3_bwd(call.params, scratch.mutable_data_ptr(), deterministic, current_stream(x)));
  return call.grads;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("dcnv3", TORCH_BOX(&dcnv3_cuda));
  library.impl("dcnv3_bwd", TORCH_BOX(&dcnv3_bwd_cuda));
}

}  // namespace
}  // namespace m3i
