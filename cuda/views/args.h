// views: checks of both ops' arguments, the same for every device.
#pragma once

#include "m3i/host/check.h"
#include "views/cpu/kernel_table.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace m3i {

// Sizes of a call, and what the outputs are made of.
struct ViewsCall {
  int64_t num_samples;                 // B
  int64_t num_pictures;                // M
  int64_t num_views;                   // V
  std::vector<ViewGeometry> geometry;  // [V]
  std::vector<int64_t> begin;          // [V + 1] of each view's [B, 3, H, W] in the output, bytes
  torch::stable::Tensor out;           // [begin[V]] uint8, uninitialised
};

namespace detail {

// geometry: height, width, blur_kernel_size and cubic of each view.
inline std::vector<ViewGeometry> check_view_geometry(const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(!geometry.empty() && geometry.size() % kViewGeometry == 0,
                  "geometry: expected four numbers a view, got ", geometry.size(), " in all");
  std::vector<ViewGeometry> views;
  for (size_t at = 0; at < geometry.size(); at += kViewGeometry) {
    const size_t v = at / kViewGeometry;
    const int64_t height = geometry[at], width = geometry[at + 1], blur = geometry[at + 2];
    for (const int64_t side : {height, width}) {
      STD_TORCH_CHECK(side >= 1 && side <= kViewMaxSide, "view ", v, ": expected a size of 1 to ",
                      kViewMaxSide, " pixels, got ", side);
    }
    const int64_t size = std::min(height, width);
    STD_TORCH_CHECK(blur >= 1 && blur <= kViewMaxBlur && blur % 2 == 1 && blur / 2 < size, "view ",
                    v, ": expected an odd blur_kernel_size of 1 to ",
                    size <= kViewMaxBlur / 2 ? 2 * size - 1 : kViewMaxBlur,
                    ", whose half is less than its ", size, " pixels, got ", blur);
    views.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width),
                     static_cast<int32_t>(blur), geometry[at + 3] != 0});
  }
  return views;
}

}  // namespace detail

// Throws, naming the argument, what was expected and what was given. Reads no tensor's values.
inline ViewsCall prepare_make_views(const torch::stable::Tensor& pixels,      // [bytes] uint8
                                    const torch::stable::Tensor& offset,      // [B, M] int64
                                    const torch::stable::Tensor& image_size,  // [B, M, 2] int64
                                    const torch::stable::Tensor& params,      // [B, V, 13] float32
                                    const std::vector<int64_t>& geometry) {
  using torch::headeronly::ScalarType;
  check_dtype(pixels, "pixels", ScalarType::Byte);
  check_dtype(offset, "offset", ScalarType::Long);
  check_dtype(image_size, "image_size", ScalarType::Long);
  check_dtype(params, "params", ScalarType::Float);
  ViewsCall call{0, 0, 0, detail::check_view_geometry(geometry), {0}, pixels};
  check_shape(pixels, "pixels", {kAny});
  check_shape(offset, "offset", {kAny, kAny});
  call.num_samples = offset.size(0);
  call.num_pictures = offset.size(1);
  call.num_views = static_cast<int64_t>(call.geometry.size());
  STD_TORCH_CHECK(call.num_pictures == 1 || (call.num_pictures == 2 && call.num_views > 1),
                  "offset: expected one picture a sample, or two for two views and more, got ",
                  call.num_pictures, " for ", call.num_views, " views");
  check_shape(image_size, "image_size", {call.num_samples, call.num_pictures, 2});
  check_shape(params, "params", {call.num_samples, call.num_views, kViewColumns});
  check_contiguous(pixels, "pixels");
  check_contiguous(offset, "offset");
  check_contiguous(image_size, "image_size");
  check_contiguous(params, "params");
  check_same_device(offset, "offset", pixels, "pixels");
  check_same_device(image_size, "image_size", pixels, "pixels");
  check_same_device(params, "params", pixels, "pixels");
  for (const ViewGeometry& view : call.geometry) {
    call.begin.push_back(call.begin.back() + call.num_samples * kViewChannels * view.height *
                                                 static_cast<int64_t>(view.width));
  }
  call.out = torch::stable::new_empty(pixels, {call.begin.back()});
  return call;
}

}  // namespace m3i
