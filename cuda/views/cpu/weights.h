// views on the CPU: the weights of a resize along one axis.
#pragma once

#include "views/arithmetic.h"

#include <algorithm>
#include <cstddef>

namespace m3i {
namespace views {
namespace {

// Parts of scratch memory, one after the other, each aligned to 64 bytes.
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

// Pixels of a row are resized in groups of as many.
inline constexpr int32_t kGroup = 4;

inline int32_t padded(int32_t size) { return (size + kGroup - 1) / kGroup * kGroup; }

// Weights of one axis, those of two taps in 32 bits; outputs past the last one have none.
struct AxisWeights {
  int32_t taps;  // even, of the output that has most
  int precision;
  int32_t end;       // input pixels from the first to the last that any output takes
  int32_t* first;    // [padded(output)] the input pixel of the first tap
  int32_t* count;    // [padded(output)] taps that are not zero by being past the end
  int16_t* weights;  // [padded(output), taps]
};

inline size_t axis_bytes(const ResizeAxis& axis) {
  const size_t outputs = padded(axis.output), taps = axis.max_taps + 1;
  return 2 * Parts::bytes<int32_t>(outputs) + Parts::bytes<int16_t>(outputs * taps) +
         Parts::bytes<double>(outputs * taps);
}

// The weights as numbers, rows of `pitch`; returns the largest.
inline double divided_weights(const ResizeAxis& axis, int32_t pitch, double* values) {
  double largest = 0;
  for (int32_t i = 0; i < axis.output; ++i) {
    const ResizeTaps taps = resize_taps(axis, i);
    double* row = values + static_cast<size_t>(i) * pitch;
    double sum = 0;
    for (int32_t j = 0; j < taps.count; ++j) row[j] = resize_value(axis, taps, j);
    for (int32_t j = 0; j < taps.count; ++j) sum = add_rn(sum, row[j]);
    for (int32_t j = 0; j < taps.count; ++j) row[j] = div_rn(row[j], sum);
    for (int32_t j = 0; j < taps.count; ++j) largest = row[j] > largest ? row[j] : largest;
  }
  return largest;
}

// `is_mirrored`: output 0 comes last. `by_pairs`: first taps are even pixels, by a tap of weight 0
// before an odd one.
inline AxisWeights axis_weights(const ResizeAxis& axis, bool is_mirrored, bool by_pairs,
                                Parts& parts) {
  const size_t outputs = padded(axis.output);
  AxisWeights of = {0,
                    0,
                    0,
                    parts.take<int32_t>(outputs),
                    parts.take<int32_t>(outputs),
                    parts.take<int16_t>(outputs * (axis.max_taps + 1))};
  for (int32_t i = 0; i < axis.output; ++i) {
    const ResizeTaps taps = resize_taps(axis, i);
    const int32_t at = is_mirrored ? axis.output - 1 - i : i, before = by_pairs & taps.first;
    of.first[at] = taps.first - before;
    of.count[at] = taps.count + before;
    of.taps = std::max(of.taps, of.count[at]);
    of.end = std::max(of.end, taps.first + taps.count);
  }
  of.taps += of.taps % 2;
  double* values = parts.take<double>(outputs * (axis.max_taps + 1));
  of.precision = resize_precision(divided_weights(axis, of.taps, values));
  for (int32_t i = 0; i < axis.output; ++i) {
    const int32_t at = is_mirrored ? axis.output - 1 - i : i;
    const int32_t before = by_pairs & resize_taps(axis, i).first;
    const double* from = values + static_cast<size_t>(i) * of.taps;
    int16_t* to = of.weights + static_cast<size_t>(at) * of.taps;
    if (before) to[0] = 0;
    for (int32_t j = before; j < of.count[at]; ++j) {
      to[j] = static_cast<int16_t>(resize_weight(from[j - before], of.precision));
    }
    for (int32_t j = of.count[at]; j < of.taps; ++j) to[j] = 0;
  }
  for (size_t at = axis.output; at < outputs; ++at) {
    of.first[at] = of.count[at] = 0;
    for (int32_t j = 0; j < of.taps; ++j) of.weights[at * of.taps + j] = 0;
  }
  return of;
}

}  // namespace
}  // namespace views
}  // namespace m3i
