// Rows of any width in vectors of the instruction set that a source is compiled for, and their
// moments. Each source that includes it gets its own copy, as of vec.h.
#pragma once

#include "m3i/cpu/vec.h"

#include <cmath>

namespace m3i {
namespace {

template <class A>
using Lanes = Vec<A, kLanes<A>>;

// ---- Rows whose last vector is not full ---------------------------------------------------------

// The vector at place `at` of `width` elements, zeros past the end.
template <class A, class T>
inline Lanes<A> load_lanes(const T* from, int64_t at, int64_t width) {
  if (at + kLanes<A> <= width) return load_wide<kLanes<A>>(from + at);
  T rest[kLanes<A>] = {};
  std::memcpy(rest, from + at, (width - at) * sizeof(T));
  return load_wide<kLanes<A>>(rest);
}

template <class A, class T>
inline void store_lanes(T* to, int64_t at, int64_t width, Lanes<A> value) {
  if (at + kLanes<A> <= width) return store_rounded<kLanes<A>>(to + at, value);
  T rest[kLanes<A>];
  store_rounded<kLanes<A>>(rest, value);
  std::memcpy(to + at, rest, (width - at) * sizeof(T));
}

// Sets lanes past the end to zero.
template <class A>
inline Lanes<A> clear_past(Lanes<A> value, int64_t at, int64_t width) {
  for (int64_t i = width - at; i < kLanes<A>; ++i) value[i] = 0;
  return value;
}

template <class A>
inline A sum_of(Lanes<A> value) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += value[i];
  return sum;
}

// ---- Moments ------------------------------------------------------------------------------------

template <class A>
struct Moments {
  A mean, rstd;
};

// Mean and rstd of a row that is padded with zeros; var + eps under the root.
template <class A>
Moments<A> moments_of(const A* row, int64_t width, double eps) {
  Lanes<A> sum = {};
  for (int64_t at = 0; at < width; at += kLanes<A>) sum += load<kLanes<A>>(row + at);
  const A first = sum_of<A>(sum) / static_cast<A>(width);
  Lanes<A> rests = {}, squares = {};
  for (int64_t at = 0; at < width; at += kLanes<A>) {
    const auto rest = clear_past<A>(load<kLanes<A>>(row + at) - first, at, width);
    rests += rest;
    squares += rest * rest;
  }
  const A shift = sum_of<A>(rests) / static_cast<A>(width);
  const A variance = sum_of<A>(squares) / static_cast<A>(width) - shift * shift;
  return {first + shift, 1 / std::sqrt(variance + static_cast<A>(eps))};
}

}  // namespace
}  // namespace m3i
