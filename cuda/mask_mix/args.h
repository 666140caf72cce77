// mask_mix: checks of the op's arguments, the same for every device, and its parameters.
#pragma once

#include "m3i/host/check.h"
#include "mask_mix/params.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <vector>

namespace m3i {

// Throws, naming the argument, what was expected and what was given.
inline void check_mask_mix(const torch::stable::Tensor& views,    // [B, 3, H, W] uint8
                           const torch::stable::Tensor& choice,   // [P, h, w] uint8
                           const torch::stable::Tensor& members,  // [P, K] int64
                           const std::vector<double>& mean,       // [3]
                           const std::vector<double>& std,        // [3]
                           torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  check_dtype(views, "views", ScalarType::Byte);
  check_dtype(choice, "choice", ScalarType::Byte);
  check_dtype(members, "members", ScalarType::Long);
  check_shape(views, "views", {kAny, kMaskMixChannels, kAny, kAny});
  check_shape(members, "members", {kAny, kAny});
  check_shape(choice, "choice", {members.size(0), kAny, kAny});
  check_contiguous(views, "views");
  check_contiguous(choice, "choice");
  check_contiguous(members, "members");
  check_same_device(choice, "choice", views, "views");
  check_same_device(members, "members", views, "views");

  const int64_t height = views.size(2), width = views.size(3);
  STD_TORCH_CHECK(members.size(1) >= 1 && members.size(1) <= kMaskMixMaxMembers,
                  "members: expected 1 to ", kMaskMixMaxMembers, " columns, got ", members.size(1));
  STD_TORCH_CHECK(choice.size(1) > 0 && height % choice.size(1) == 0 && choice.size(2) > 0 &&
                      width % choice.size(2) == 0,
                  "choice: expected a grid that divides views of ", height, " x ", width,
                  " pixels, got ", choice.size(1), " x ", choice.size(2), " cells");
  STD_TORCH_CHECK(height * width <= std::numeric_limits<int32_t>::max(),
                  "views: expected fewer than 2^31 pixels a channel, got ", height, " x ", width);
  STD_TORCH_CHECK(mean.size() == kMaskMixChannels, "mean: expected 3 values, got ", mean.size());
  STD_TORCH_CHECK(std.size() == kMaskMixChannels, "std: expected 3 values, got ", std.size());
  for (const double value : std) {
    STD_TORCH_CHECK(value > 0, "std: expected positive values, got ", value);
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "dtype: expected float32 or bfloat16, got ", dtype_name(dtype));
}

struct MaskMixCall {
  torch::stable::Tensor out;  // [P, 3, H, W], uninitialised
  MaskMixParams params;
};

// Checks the arguments and allocates the output, on the device of the inputs.
inline MaskMixCall prepare_mask_mix(const torch::stable::Tensor& views,    // [B, 3, H, W] uint8
                                    const torch::stable::Tensor& choice,   // [P, h, w] uint8
                                    const torch::stable::Tensor& members,  // [P, K] int64
                                    const std::vector<double>& mean,       // [3]
                                    const std::vector<double>& std,        // [3]
                                    torch::headeronly::ScalarType dtype) {
  check_mask_mix(views, choice, members, mean, std, dtype);
  MaskMixCall call;
  call.out = torch::stable::new_empty(
      views, {members.size(0), kMaskMixChannels, views.size(2), views.size(3)}, dtype);

  MaskMixParams& params = call.params;
  params.views = views.const_data_ptr<uint8_t>();
  params.choice = choice.const_data_ptr<uint8_t>();
  params.members = members.const_data_ptr<int64_t>();
  params.out = call.out.mutable_data_ptr();
  params.out_dtype =
      dtype == torch::headeronly::ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
  params.num_views = views.size(0);
  params.num_pictures = members.size(0);
  params.num_members = members.size(1);
  params.height = views.size(2);
  params.width = views.size(3);
  params.grid_height = choice.size(1);
  params.grid_width = choice.size(2);
  for (int c = 0; c < kMaskMixChannels; ++c) {
    params.scale[c] = static_cast<float>(1.0 / (255.0 * std[c]));
    params.shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  return call;
}

}  // namespace m3i
