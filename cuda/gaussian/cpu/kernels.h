// gaussian on the CPU: the kernels, in vectors of the instruction set that a source is compiled
// for.
//
// A row of z is widened into a buffer in the L1 cache, padded to whole vectors, which the passes
// over the row read and write. z_hat is widened as it is read.
#pragma once

#include "gaussian/cpu/kernel_table.h"
#include "gaussian/dispatch.h"
#include "m3i/cpu/rows.h"

#include <vector>

namespace m3i {
namespace {

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
