// views on the CPU: one view, step by step.
//
// Resize, horizontal pass: rows of the crop become rows [3, S] of uint8, mirrored where the view is
// flipped. Vertical pass: columns of these become planes [3, S, S] in the output. Colours change
// there, all steps of a pixel in registers; contrast needs the mean gray of what comes before it,
// so that there are two passes where it is not the first. The blur goes by fp32 planes.
#pragma once

#include "views/arithmetic.h"
#include "views/cpu/kernel_table.h"

#include <algorithm>

namespace m3i {
namespace {

using namespace views;

// Weights of one axis in scratch memory.
struct AxisWeights {
  int32_t stride;  // of weights, from an output to the next
  int precision;
  int32_t* first;    // [output]
  int32_t* count;    // [output]
  int16_t* weights;  // [output, stride], zeros past count
};

// Parts of the scratch memory, one after the other.
class Parts {
 public:
  explicit Parts(uint8_t* memory) : at_(memory) {}
  template <class T>
  T* take(size_t count) {
    T* part = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return part;
  }
  template <class T>
  static size_t bytes(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  uint8_t* at_;
};

size_t axis_bytes(const ResizeAxis& axis) {
  return 2 * Parts::bytes<int32_t>(axis.output) +
         Parts::bytes<int16_t>(static_cast<size_t>(axis.output) * axis.max_taps) +
         Parts::bytes<double>(static_cast<size_t>(axis.output) * axis.max_taps);
}

AxisWeights axis_weights(const ResizeAxis& axis, Parts& parts) {
  AxisWeights of;
  of.stride = axis.max_taps;
  of.first = parts.take<int32_t>(axis.output);
  of.count = parts.take<int32_t>(axis.output);
  of.weights = parts.take<int16_t>(static_cast<size_t>(axis.output) * of.stride);
  double* values = parts.take<double>(static_cast<size_t>(axis.output) * of.stride);
  double largest = 0;
  for (int32_t i = 0; i < axis.output; ++i) {
    const ResizeTaps taps = resize_taps(axis, i);
    of.first[i] = taps.first;
    of.count[i] = taps.count;
    double* row = values + static_cast<size_t>(i) * of.stride;
    double sum = 0;
    for (int32_t j = 0; j < taps.count; ++j) sum += row[j] = resize_value(axis, taps, j);
    for (int32_t j = 0; j < taps.count; ++j) {
      row[j] /= sum;
      largest = std::max(largest, row[j]);
    }
  }
  of.precision = resize_precision(largest);
  for (int32_t i = 0; i < axis.output; ++i) {
    const size_t at = static_cast<size_t>(i) * of.stride;
    for (int32_t j = 0; j < of.stride; ++j) {
      of.weights[at + j] =
          static_cast<int16_t>(j < of.count[i] ? resize_weight(values[at + j], of.precision) : 0);
    }
  }
  return of;
}

// A crop of a picture.
struct Crop {
  const uint8_t* data;  // of its first pixel
  int64_t row_stride;
  int32_t height, width;
};

// [height, 3, S]
void resize_rows(const Crop& crop, const AxisWeights& of, int32_t size, bool is_flipped,
                 uint8_t* rows) {
  for (int32_t y = 0; y < crop.height; ++y) {
    const uint8_t* from = crop.data + y * crop.row_stride;
    for (int32_t i = 0; i < size; ++i) {
      const int16_t* weights = of.weights + static_cast<size_t>(i) * of.stride;
      for (int c = 0; c < kViewChannels; ++c) {
        int32_t sum = (1 << of.precision) >> 1;
        for (int32_t j = 0; j < of.count[i]; ++j) {
          sum += weights[j] * from[(of.first[i] + j) * kViewChannels + c];
        }
        const int32_t at = is_flipped ? size - 1 - i : i;
        rows[(static_cast<int64_t>(y) * kViewChannels + c) * size + at] =
            static_cast<uint8_t>(resize_rounded(sum, of.precision));
      }
    }
  }
}

// rows [height, 3, S] to planes [3, S, S]
void resize_columns(const uint8_t* rows, const AxisWeights& of, int32_t size, uint8_t* planes) {
  const int64_t pitch = static_cast<int64_t>(kViewChannels) * size;
  for (int32_t i = 0; i < size; ++i) {
    const int16_t* weights = of.weights + static_cast<size_t>(i) * of.stride;
    for (int32_t at = 0; at < pitch; ++at) {
      int32_t sum = (1 << of.precision) >> 1;
      for (int32_t j = 0; j < of.count[i]; ++j) {
        sum += weights[j] * rows[(of.first[i] + j) * pitch + at];
      }
      planes[(static_cast<int64_t>(at / size) * size + i) * size + at % size] =
          static_cast<uint8_t>(resize_rounded(sum, of.precision));
    }
  }
}

// Steps [begin, end) of a plan, on all pixels; returns the sum of their gray.
int64_t colour(const ColourPlan& plan, int begin, int end, float mean, int64_t count,
               uint8_t* planes) {
  int64_t sum = 0;
  for (int64_t at = 0; at < count; ++at) {
    Pixel p = {static_cast<float>(planes[at]), static_cast<float>(planes[count + at]),
               static_cast<float>(planes[2 * count + at])};
    for (int k = begin; k < end; ++k) p = coloured(p, plan, plan.step[k], mean);
    planes[at] = static_cast<uint8_t>(p.r);
    planes[count + at] = static_cast<uint8_t>(p.g);
    planes[2 * count + at] = static_cast<uint8_t>(p.b);
    sum += static_cast<int64_t>(gray_of(p));
  }
  return sum;
}

// One plane [S, S]; `across`: [S, S].
void blur(const float* weights, int radius, int32_t size, bool solarizes, float* across,
          uint8_t* plane) {
  for (int32_t y = 0; y < size; ++y) {
    const uint8_t* row = plane + static_cast<int64_t>(y) * size;
    for (int32_t x = 0; x < size; ++x) {
      float sum = mul_rn(weights[0], static_cast<float>(row[x]));
      for (int k = 1; k <= radius; ++k) {
        sum = fma_rn(weights[k],
                     static_cast<float>(row[reflected(x - k, size)] + row[reflected(x + k, size)]),
                     sum);
      }
      across[static_cast<int64_t>(y) * size + x] = sum;
    }
  }
  for (int32_t y = 0; y < size; ++y) {
    for (int32_t x = 0; x < size; ++x) {
      const auto row = [&](int at) {
        return across[static_cast<int64_t>(reflected(at, size)) * size + x];
      };
      float sum = mul_rn(weights[0], row(y));
      for (int k = 1; k <= radius; ++k) {
        sum = fma_rn(weights[k], add_rn(row(y - k), row(y + k)), sum);
      }
      const float value = clamped(even_of(sum), 255.0f);
      plane[static_cast<int64_t>(y) * size + x] =
          static_cast<uint8_t>(solarizes ? solarized(value) : value);
    }
  }
}

void make_view(const ViewImage& image, const ViewGeometry& geometry, const ViewParams& params,
               uint8_t* out, ViewScratch& scratch) {
  const int32_t size = geometry.size;
  const Crop crop = {image.data + static_cast<int64_t>(params.y) * image.row_stride +
                         static_cast<int64_t>(params.x) * kViewChannels,
                     image.row_stride, static_cast<int32_t>(params.height),
                     static_cast<int32_t>(params.width)};
  const ResizeAxis horizontal = resize_axis(crop.width, size, geometry.cubic);
  const ResizeAxis vertical = resize_axis(crop.height, size, geometry.cubic);
  const size_t num_rows = static_cast<size_t>(crop.height) * kViewChannels * size;
  const size_t num_pixels = static_cast<size_t>(size) * size;
  const bool blurs = params.sigma != 0;
  const int half = geometry.blur_kernel_size / 2;
  Parts parts(scratch.reserve(
      axis_bytes(horizontal) + axis_bytes(vertical) + Parts::bytes<uint8_t>(num_rows) +
      (blurs ? Parts::bytes<float>(num_pixels) : 0) + Parts::bytes<float>(half + 1)));
  const AxisWeights across = axis_weights(horizontal, parts), down = axis_weights(vertical, parts);
  uint8_t* rows = parts.take<uint8_t>(num_rows);
  resize_rows(crop, across, size, params.flip != 0, rows);
  resize_columns(rows, down, size, out);

  const ColourPlan plan = colour_plan(params);
  const int64_t count = static_cast<int64_t>(num_pixels);
  if (plan.contrast_at < plan.count) {
    const int64_t sum = colour(plan, 0, plan.contrast_at, 0, count, out);
    const float mean = gray_mean(sum, count);
    colour(plan, plan.contrast_at, plan.count, mean, count, out);
  } else if (plan.count > 0) {
    colour(plan, 0, plan.count, 0, count, out);
  }
  if (blurs) {
    float* weights = parts.take<float>(half + 1);
    float* plane = parts.take<float>(num_pixels);
    const int radius = blur_weights(params.sigma, geometry.blur_kernel_size, weights);
    for (int c = 0; c < kViewChannels; ++c) {
      blur(weights, radius, size, params.solarize != 0, plane, out + c * count);
    }
  }
}

}  // namespace
}  // namespace m3i
