// views: checks of both ops' arguments, the same for every device.
#pragma once

#include "m3i/host/check.h"
#include "views/cpu/kernel_table.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace m3i {

// Sizes of a call, and what the outputs are made of.
struct ViewsCall {
  int64_t num_samples;                 // B
  int64_t num_pictures;                // M
  int64_t num_views;                   // V
  std::vector<ViewGeometry> geometry;  // [V]; of patches it is each sample's own: filters alone
  std::vector<int64_t> begin;  // [V + 1] of each view's [B, 3, H, W] or [T, 3, P, P] in the output,
                               // bytes
  torch::stable::Tensor out;   // [begin[V]] uint8, or [T of all views, 3 P P]; uninitialised
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

// filters: blur_kernel_size and cubic of each view.
inline std::vector<ViewGeometry> check_view_filters(const std::vector<int64_t>& filters) {
  STD_TORCH_CHECK(!filters.empty() && filters.size() % 2 == 0,
                  "filters: expected two numbers a view, got ", filters.size(), " in all");
  std::vector<ViewGeometry> views;
  for (size_t at = 0; at < filters.size(); at += 2) {
    const int64_t blur = filters[at];
    STD_TORCH_CHECK(blur >= 1 && blur <= kViewMaxBlur && blur % 2 == 1, "view ", at / 2,
                    ": expected an odd blur_kernel_size of 1 to ", kViewMaxBlur, ", got ", blur);
    views.push_back({0, 0, static_cast<int32_t>(blur), filters[at + 1] != 0});
  }
  return views;
}

// Of what both operators take; begin and out are left to fill in.
inline ViewsCall check_views_call(const torch::stable::Tensor& pixels,
                                  const torch::stable::Tensor& offset,
                                  const torch::stable::Tensor& image_size,
                                  const torch::stable::Tensor& params,
                                  std::vector<ViewGeometry> geometry) {
  using torch::headeronly::ScalarType;
  check_dtype(pixels, "pixels", ScalarType::Byte);
  check_dtype(offset, "offset", ScalarType::Long);
  check_dtype(image_size, "image_size", ScalarType::Long);
  check_dtype(params, "params", ScalarType::Float);
  ViewsCall call{0, 0, 0, std::move(geometry), {0}, pixels};
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
  return call;
}

}  // namespace detail

// Throws, naming the argument, what was expected and what was given. Reads no tensor's values.
inline ViewsCall prepare_make_views(const torch::stable::Tensor& pixels,      // [bytes] uint8
                                    const torch::stable::Tensor& offset,      // [B, M] int64
                                    const torch::stable::Tensor& image_size,  // [B, M, 2] int64
                                    const torch::stable::Tensor& params,      // [B, V, 13] float32
                                    const std::vector<int64_t>& geometry) {
  ViewsCall call = detail::check_views_call(pixels, offset, image_size, params,
                                            detail::check_view_geometry(geometry));
  for (const ViewGeometry& view : call.geometry) {
    call.begin.push_back(call.begin.back() + call.num_samples * kViewChannels * view.height *
                                                 static_cast<int64_t>(view.width));
  }
  call.out = torch::stable::new_empty(pixels, {call.begin.back()});
  return call;
}

// The same for views that are cut to patches.
inline ViewsCall prepare_make_patches(const torch::stable::Tensor& pixels,
                                      const torch::stable::Tensor& offset,
                                      const torch::stable::Tensor& image_size,
                                      const torch::stable::Tensor& params,
                                      const torch::stable::Tensor& grids,  // [B, V, 3] int64
                                      const std::vector<int64_t>& filters, int64_t patch_size,
                                      const std::vector<int64_t>& lengths) {
  ViewsCall call = detail::check_views_call(pixels, offset, image_size, params,
                                            detail::check_view_filters(filters));
  check_dtype(grids, "grids", torch::headeronly::ScalarType::Long);
  check_shape(grids, "grids", {call.num_samples, call.num_views, 3});
  check_contiguous(grids, "grids");
  check_same_device(grids, "grids", pixels, "pixels");
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= kViewMaxSide, "patch_size: expected 1 to ",
                  kViewMaxSide, " pixels, got ", patch_size);
  STD_TORCH_CHECK(lengths.size() == call.geometry.size(), "lengths: expected one of each of ",
                  call.num_views, " views, got ", lengths.size());
  const int64_t patch_bytes = kViewChannels * patch_size * patch_size;
  for (const int64_t length : lengths) {
    STD_TORCH_CHECK(length >= 0 && length <= std::numeric_limits<int32_t>::max(),
                    "lengths: expected 0 to 2^31 - 1 patches of a view, got ", length);
    call.begin.push_back(call.begin.back() + length * patch_bytes);
  }
  call.out = torch::stable::new_empty(pixels, {call.begin.back() / patch_bytes, patch_bytes});
  return call;
}

}  // namespace m3i
