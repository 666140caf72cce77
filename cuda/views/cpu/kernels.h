// views on the CPU: one view, step by step, in vectors of the instruction set that a source is
// compiled for.
#pragma once

#include "views/cpu/colours.h"
#include "views/cpu/resize.h"

namespace m3i {
namespace {

using namespace views;

inline Crop crop_of(const ViewImage& image, const ViewParams& params) {
  return {image.data + static_cast<int64_t>(params.y) * image.row_stride +
              static_cast<int64_t>(params.x) * kViewChannels,
          image.data + (image.height - 1) * image.row_stride +
              static_cast<int64_t>(image.width) * kViewChannels,
          image.row_stride, static_cast<int32_t>(params.height),
          static_cast<int32_t>(params.width)};
}

void resize_view(const Crop& crop, const ViewGeometry& geometry, bool is_flipped, uint8_t* out,
                 ViewScratch& scratch) {
  const int32_t width = geometry.width;
  const ResizeAxis horizontal = resize_axis(crop.width, width, geometry.cubic);
  const ResizeAxis vertical = resize_axis(crop.height, geometry.height, geometry.cubic);
  const size_t copied = row_bytes(crop), pairs = pairs_bytes(crop.width);
  const size_t pitch = group_pitch(width), groups = group_rows(crop.height) * pitch + kOverread;
  Parts parts(scratch.reserve(axis_bytes(horizontal) + axis_bytes(vertical) +
                              Parts::bytes<uint8_t>(groups) + Parts::bytes<uint8_t>(pitch) +
                              Parts::bytes<uint8_t>(pairs) +
                              Parts::bytes<uint8_t>(kRows * copied)));
  const AxisWeights across = axis_weights(horizontal, is_flipped, true, parts);
  const AxisWeights down = axis_weights(vertical, false, false, parts);
  ResizeMemory memory;
  memory.groups = parts.take<uint8_t>(groups);
  memory.column = parts.take<uint8_t>(pitch);
  memory.pairs = parts.take<uint8_t>(pairs);
  memory.rows = parts.take<uint8_t>(kRows * copied);
  memory.row_bytes = row_bytes(crop);
  resize_rows(crop, across, width, memory);
  resize_columns(down, geometry.height, width, memory, out);
}

void blur_view(const ViewGeometry& geometry, const ViewParams& params, uint8_t* out,
               ViewScratch& scratch) {
  const int half = geometry.blur_kernel_size / 2;
  const int32_t height = geometry.height, width = geometry.width;
  const size_t row = blur_pitch(width) + 2 * static_cast<size_t>(half);
  const size_t across = static_cast<size_t>(height) * blur_pitch(width);
  Parts parts(scratch.reserve(Parts::bytes<float>(half + 1) + Parts::bytes<float>(row) +
                              Parts::bytes<float>(across) +
                              Parts::bytes<const float*>(2 * half + 1)));
  float* weights = parts.take<float>(half + 1);
  const int radius = blur_weights(params.sigma, geometry.blur_kernel_size, weights);
  const Blur blur = {weights,
                     radius,
                     height,
                     width,
                     params.solarize != 0,
                     parts.take<float>(row),
                     parts.take<float>(across),
                     parts.take<const float*>(2 * half + 1)};
  std::memset(blur.row, 0, row * sizeof(float));  // what is read past a row's end, and not used
  for (int c = 0; c < kViewChannels; ++c) {
    blur_plane(blur, out + static_cast<int64_t>(c) * height * width);
  }
}

void make_view(const ViewImage& image, const ViewGeometry& geometry, const ViewParams& params,
               uint8_t* out, ViewScratch& scratch) {
  resize_view(crop_of(image, params), geometry, params.flip != 0, out, scratch);
  const int64_t count = static_cast<int64_t>(geometry.height) * geometry.width;
  change_colours(colour_plan(params), {out, count});
  if (params.sigma != 0) blur_view(geometry, params, out, scratch);
}

constexpr ViewsCpuKernels kViewsKernels = {&make_view};

}  // namespace
}  // namespace m3i
