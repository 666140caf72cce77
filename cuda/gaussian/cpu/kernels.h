// gaussian on the CPU: the kernels, in vectors of the instruction set that a source is compiled
// for.
//
// A row of z is widened into a buffer in the L1 cache, padded to whole vectors, which the passes
// over the row read and write. z_hat is widened as it is read.
#pragma once

#include "gaussian/cpu/kernel_table.h"
#include "gaussian/dispatch.h"
#include "m3i/cpu/vec.h"

#include <cmath>
#include <vector>

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

// ---- Forward ------------------------------------------------------------------------------------

template <class A>
struct Moments {
  A mean, rstd;
};

// Mean and rstd of a row that is padded with zeros; see params.h.
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

// Overwrites the row by (row - mean) * rstd, with zeros past the end.
template <class A>
void normalise(Moments<A> moments, int64_t width, A* row) {
  for (int64_t at = 0; at < width; at += kLanes<A>) {
    const auto value = (load<kLanes<A>>(row + at) - moments.mean) * moments.rstd;
    store(row + at, clear_past<A>(value, at, width));
  }
}

template <class P, class T>
double forward_as(const GaussianParams& params, int64_t begin, int64_t end) {
  using A = Accumulator<P>;
  const int64_t width = params.of.width;
  std::vector<A> buffer(width + kLanes<A>);
  A* row = buffer.data();
  double total = 0;
  for (int64_t r = begin; r < end; ++r) {
    const P* z_hat = static_cast<const P*>(params.of.z_hat) + r * width;
    const T* z = static_cast<const T*>(params.of.z) + r * width;
    for (int64_t at = 0; at < width; at += kLanes<A>) store(row + at, load_lanes<A>(z, at, width));
    if (params.of.normalise) {
      const Moments<A> moments = moments_of(row, width, params.eps);
      static_cast<A*>(params.mean)[r] = moments.mean;
      static_cast<A*>(params.rstd)[r] = moments.rstd;
      normalise(moments, width, row);
    }
    Lanes<A> squares = {};
    for (int64_t at = 0; at < width; at += kLanes<A>) {
      const auto distance = load<kLanes<A>>(row + at) - load_lanes<A>(z_hat, at, width);
      squares += distance * distance;
    }
    total += sum_of<A>(squares);
    if (!params.normalised) continue;
    T* normalised = static_cast<T*>(params.normalised) + r * width;
    for (int64_t at = 0; at < width; at += kLanes<A>) {
      store_lanes<A>(normalised, at, width, load<kLanes<A>>(row + at));
    }
  }
  return total;
}

template <class P>
double product_as(const GaussianProductParams& params, int64_t begin, int64_t end) {
  using A = Accumulator<P>;
  const A* of_targets = static_cast<const A*>(params.of_targets);
  const A* of_predictions = static_cast<const A*>(params.of_predictions);
  Lanes<A> sum = {};
  for (int64_t at = begin; at < end; at += kLanes<A>) {
    const auto covariance = load_lanes<A>(of_targets, at, end) * static_cast<A>(params.scale);
    sum += covariance * load_lanes<A>(of_predictions, at, end);
    store_lanes<A>(static_cast<P*>(params.covariance), at, end, covariance);
  }
  return sum_of<A>(sum);
}

// ---- Backward -----------------------------------------------------------------------------------

template <class P, class T>
void backward_as(const GaussianBwdParams& params, int64_t begin, int64_t end) {
  using A = Accumulator<P>;
  const GaussianRows& of = params.of;
  const int64_t width = of.width;
  const A grad_out = *static_cast<const A*>(params.grad_out);
  const A distance_scale = grad_out * static_cast<A>(2 * params.distance_scale);
  const A product_scale = grad_out * static_cast<A>(2 * params.product_scale);
  for (int64_t r = begin; r < end; ++r) {
    const P* z_hat = static_cast<const P*>(of.z_hat) + r * width;
    const T* z = static_cast<const T*>(of.z) + r * width;
    const P* pull = static_cast<const P*>(params.pull) + (params.pull ? r * width : 0);
    P* grad = static_cast<P*>(params.grad) + r * width;
    const A mean = of.normalise ? static_cast<const A*>(params.mean)[r] : 0;
    const A rstd = of.normalise ? static_cast<const A*>(params.rstd)[r] : 1;
    for (int64_t at = 0; at < width; at += kLanes<A>) {
      const auto target = (load_lanes<A>(z, at, width) - mean) * rstd;
      auto value = (load_lanes<A>(z_hat, at, width) - target) * distance_scale;
      if (params.pull) value += load_lanes<A>(pull, at, width) * product_scale;
      store_lanes<A>(grad, at, width, value);
    }
  }
}

// ---- From run-time types ------------------------------------------------------------------------

inline double forward(const GaussianParams& params, int64_t begin, int64_t end) {
  return dispatch_gaussian(params.of, [&](auto prediction, auto target) {
    return forward_as<typename decltype(prediction)::type, typename decltype(target)::type>(
        params, begin, end);
  });
}

inline double product(const GaussianProductParams& params, int64_t begin, int64_t end) {
  return dispatch_dtype<float, BFloat16, Float16, double>(params.prediction, [&](auto type) {
    return product_as<typename decltype(type)::type>(params, begin, end);
  });
}

inline void backward(const GaussianBwdParams& params, int64_t begin, int64_t end) {
  dispatch_gaussian(params.of, [&](auto prediction, auto target) {
    backward_as<typename decltype(prediction)::type, typename decltype(target)::type>(params, begin,
                                                                                      end);
  });
}

constexpr GaussianCpuKernels kGaussianKernels = {&forward, &product, &backward};

}  // namespace
}  // namespace m3i
