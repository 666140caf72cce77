// dcnv3: checks of both ops' arguments, the same for every device, and their parameters.
#pragma once

#include "dcnv3/params.h"
#include "m3i/host/check.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

namespace m3i {

// The arguments of a call besides its tensors; pairs are (height, width).
struct Dcnv3Geometry {
  std::vector<int64_t> kernel_size, stride, padding, dilation;  // [2]
  int64_t groups;
  double offset_scale;
  bool remove_center, softmax;
};

namespace detail {

inline void check_pair(const std::vector<int64_t>& pair, const char* name, int64_t least) {
  STD_TORCH_CHECK(pair.size() == 2, name, ": expected 2 values, (height, width), got ",
                  pair.size());
  for (const int64_t value : pair) {
    STD_TORCH_CHECK(least <= value && value <= std::numeric_limits<int32_t>::max(), name,
                    ": expected values from ", least, " to 2^31 - 1, got ", value);
  }
}

inline void check_geometry(const Dcnv3Geometry& geometry) {
  check_pair(geometry.kernel_size, "kernel_size", 1);
  check_pair(geometry.stride, "stride", 1);
  check_pair(geometry.padding, "padding", 0);
  check_pair(geometry.dilation, "dilation", 1);
  const int64_t kernel_height = geometry.kernel_size[0], kernel_width = geometry.kernel_size[1];
  STD_TORCH_CHECK(!geometry.remove_center || (kernel_height % 2 == 1 && kernel_width % 2 == 1 &&
                                              kernel_height * kernel_width > 1),
                  "remove_center: expected an odd kernel_size with more than one point, got ",
                  kernel_height, " x ", kernel_width);
  STD_TORCH_CHECK(std::isfinite(geometry.offset_scale),
                  "offset_scale: expected a finite value, got ", geometry.offset_scale);
}

inline std::string by(const std::vector<int64_t>& pair) {
  return std::to_string(pair[0]) + " x " + std::to_string(pair[1]);
}

// The reason of an expected shape: "3 x 3 kernel, stride 1 x 1, ...".
inline std::string describe(const torch::stable::Tensor& x, const Dcnv3Geometry& geometry) {
  return by(geometry.kernel_size) + " kernel" +
         (geometry.remove_center ? " without its centre" : "") + ", stride " + by(geometry.stride) +
         ", padding " + by(geometry.padding) + ", dilation " + by(geometry.dilation) + ", " +
         std::to_string(geometry.groups) + " groups, x of " + shape_string(x.sizes());
}

// Extent of the output along one dimension; 0 or less where the kernel does not fit.
inline int64_t out_extent(int64_t extent, const Dcnv3Geometry& geometry, int dim) {
  const int64_t window = geometry.dilation[dim] * (geometry.kernel_size[dim] - 1) + 1;
  const int64_t room = extent + 2 * geometry.padding[dim] - window;
  return room < 0 ? 0 : room / geometry.stride[dim] + 1;
}

inline Dcnv3Shape make_shape(const torch::stable::Tensor& x, const Dcnv3Geometry& geometry) {
  Dcnv3Shape shape;
  shape.batch = x.size(0);
  shape.height = x.size(1);
  shape.width = x.size(2);
  shape.out_height = out_extent(shape.height, geometry, 0);
  shape.out_width = out_extent(shape.width, geometry, 1);
  shape.groups = geometry.groups;
  shape.group_size = x.size(3) / geometry.groups;
  shape.kernel_height = geometry.kernel_size[0];
  shape.kernel_width = geometry.kernel_size[1];
  shape.points = shape.kernel_height * shape.kernel_width - (geometry.remove_center ? 1 : 0);
  shape.stride_height = geometry.stride[0];
  shape.stride_width = geometry.stride[1];
  shape.pad_height = geometry.padding[0];
  shape.pad_width = geometry.padding[1];
  shape.dilation_height = geometry.dilation[0];
  shape.dilation_width = geometry.dilation[1];
  shape.offset_scale = geometry.offset_scale;
  shape.remove_center = geometry.remove_center;
  shape.softmax = geometry.softmax;
  return shape;
}

inline void check_extents(const torch::stable::Tensor& x, const Dcnv3Geometry& geometry,
                          const Dcnv3Shape& shape) {
  STD_TORCH_CHECK(shape.out_height > 0 && shape.out_width > 0,
                  "x: expected an image that the kernel fits into, got none of its positions: ",
                  describe(x, geometry));
  constexpr int64_t kExtent = 1 << 28;  // tested first: the products then fit 64 bits
  STD_TORCH_CHECK(shape.height + 2 * shape.pad_height <= kExtent &&
                      shape.width + 2 * shape.pad_width <= kExtent &&
                      (shape.height + 3) * (shape.width + 2) <= std::numeric_limits<int32_t>::max(),
                  "x: expected an image of fewer than 2^31 pixels, padded extents up to 2^28, got ",
                  describe(x, geometry));
  constexpr int64_t kPoints = 1 << 30;
  STD_TORCH_CHECK(shape.points <= kPoints / shape.groups,
                  "kernel_size: expected at most 2^30 points of all groups, got ",
                  describe(x, geometry));
}

// Checks that a tensor is contiguous, of this shape, and of x's dtype and device.
inline void check_like(const torch::stable::Tensor& tensor, const char* name,
                       const torch::stable::Tensor& x, const std::vector<int64_t>& expected,
                       const Dcnv3Geometry& geometry) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == expected, name,
                  ": expected shape ", shape_string(expected), " (", describe(x, geometry),
                  "), got ", shape_string(sizes));
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, ",
                  dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
  check_same_device(tensor, name, x, "x");
  check_contiguous(tensor, name);
}

inline DType dcnv3_dtype(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "x: expected dtype float32, float64, float16 or bfloat16, got ",
                  dtype_name(dtype));
  return dtype == ScalarType::Float    ? DType::kFloat32
         : dtype == ScalarType::Double ? DType::kFloat64
         : dtype == ScalarType::Half   ? DType::kFloat16
                                       : DType::kBFloat16;
}

// Throws, naming the argument, what was expected and what was given.
inline Dcnv3Shape check_dcnv3(const torch::stable::Tensor& x,       // [N, H, W, G*D]
                              const torch::stable::Tensor& offset,  // [N, Ho, Wo, G*K*2]
                              const torch::stable::Tensor& mask,    // [N, Ho, Wo, G*K]
                              const Dcnv3Geometry& geometry) {
  check_shape(x, "x", {kAny, kAny, kAny, kAny});
  check_contiguous(x, "x");
  check_geometry(geometry);
  STD_TORCH_CHECK(geometry.groups > 0 && x.size(3) > 0 && x.size(3) % geometry.groups == 0,
                  "groups: expected a divisor of the channels of x, ", x.size(3), ", got ",
                  geometry.groups);
  const Dcnv3Shape shape = make_shape(x, geometry);
  check_extents(x, geometry, shape);
  const int64_t points = shape.groups * shape.points;
  check_like(offset, "offset", x, {shape.batch, shape.out_height, shape.out_width, 2 * points},
             geometry);
  check_like(mask, "mask", x, {shape.batch, shape.out_height, shape.out_width, points}, geometry);
  return shape;
}

}  // namespace detail

struct Dcnv3Call {
  torch::stable::Tensor out;  // [N, Ho, Wo, G*D], uninitialised
  Dcnv3Params params;
};

// Checks the arguments and allocates the output, on the device of x.
inline Dcnv3Call prepare_dcnv3(const torch::stable::Tensor& x, const torch::stable::Tensor& offset,
                               const torch::stable::Tensor& mask, const Dcnv3Geometry& geometry) {
  Dcnv3Call call;
  Dcnv3Params& params = call.params;
  params.dtype = detail::dcnv3_dtype(x);
  params.shape = detail::check_dcnv3(x, offset, mask, geometry);
  const Dcnv3Shape& shape = params.shape;
  call.out =
      torch::stable::new_empty(x, {shape.batch, shape.out_height, shape.out_width, x.size(3)});
  params.x = x.const_data_ptr();
  params.offset = offset.const_data_ptr();
  params.mask = mask.const_data_ptr();
  params.out = call.out.mutable_data_ptr();
  return call;
}

struct Dcnv3BwdCall {
  // Uninitialised gradients by x, offset and mask; [0] where not needed.
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> grads;
  Dcnv3BwdParams params;
};

// Checks the arguments and allocates the gradients, on the device of x.
inline Dcnv3BwdCall prepare_dcnv3_bwd(const torch::stable::Tensor& grad_out,
                                      const torch::stable::Tensor& x,
                                      const torch::stable::Tensor& offset,
                                      const torch::stable::Tensor& mask,
                                      const Dcnv3Geometry& geometry,
                                      const std::vector<bool>& needs_grad) {
  STD_TORCH_CHECK(needs_grad.size() == 3, "needs_grad: expected 3 values, got ", needs_grad.size());
  Dcnv3BwdParams params;
  params.dtype = detail::dcnv3_dtype(x);
  params.shape = detail::check_dcnv3(x, offset, mask, geometry);
  const Dcnv3Shape& shape = params.shape;
  detail::check_like(grad_out, "grad_out", x,
                     {shape.batch, shape.out_height, shape.out_width, x.size(3)}, geometry);
  const auto grad_of = [](const torch::stable::Tensor& tensor, bool needed) {
    return needed ? torch::stable::empty_like(tensor) : torch::stable::new_empty(tensor, {0});
  };
  Dcnv3BwdCall call{
      {grad_of(x, needs_grad[0]), grad_of(offset, needs_grad[1]), grad_of(mask, needs_grad[2])},
      params};
  const auto data_of = [](torch::stable::Tensor& grad, bool needed) {
    return needed ? grad.mutable_data_ptr() : nullptr;
  };
  call.params.grad_out = grad_out.const_data_ptr();
  call.params.x = x.const_data_ptr();
  call.params.offset = offset.const_data_ptr();
  call.params.mask = mask.const_data_ptr();
  call.params.grad_x = data_of(std::get<0>(call.grads), needs_grad[0]);
  call.params.grad_offset = data_of(std::get<1>(call.grads), needs_grad[1]);
  call.params.grad_mask = data_of(std::get<2>(call.grads), needs_grad[2]);
  return call;
}

}  // namespace m3i
