// add_layer_norm on the CPU: the kernels, in vectors of the instruction set that a source is
// compiled for.
//
// A row is widened into a buffer in the L1 cache, padded to whole vectors, which the passes over
// the row read and write.
#pragma once

#include "add_layer_norm/cpu/kernel_table.h"
#include "add_layer_norm/dispatch.h"
#include "m3i/cpu/rows.h"

#include <vector>

namespace m3i {
namespace {

// ---- Forward ------------------------------------------------------------------------------------

// Leaves x + branch, as it is stored, in `row`.
template <class X, class P>
void add_row(const AddLayerNormParams& params, int64_t r, Accumulator<X>* row) {
  using A = Accumulator<X>;
  const int64_t width = params.of.width;
  const X* x = static_cast<const X*>(params.x) + r * width;
  if (!params.branch) {
    for (int64_t at = 0; at < width; at += kLanes<A>) store(row + at, load_lanes<A>(x, at, width));
    return;
  }
  const P* branch = static_cast<const P*>(params.branch) + r * width;
  X* sum = static_cast<X*>(params.sum) + r * width;
  for (int64_t at = 0; at < width; at += kLanes<A>) {
    auto value = load_lanes<A>(x, at, width) + load_lanes<A>(branch, at, width);
    store_lanes<A>(sum, at, width, value);
    if constexpr (!std::is_same_v<X, A>) value = load_lanes<A>(sum, at, width);
    store(row + at, value);
  }
}

template <class X, class P>
void forward_as(const AddLayerNormParams& params, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  const int64_t width = params.of.width;
  const A* weight = static_cast<const A*>(params.weight);
  const A* bias = static_cast<const A*>(params.bias);
  std::vector<A> buffer(width + kLanes<A>);
  A* row = buffer.data();
  for (int64_t r = begin; r < end; ++r) {
    add_row<X, P>(params, r, row);
    const Moments<A> moments = moments_of(row, width, params.eps);
    static_cast<A*>(params.mean)[r] = moments.mean;
    static_cast<A*>(params.rstd)[r] = moments.rstd;
    P* normed = static_cast<P*>(params.normed) + r * width;
    for (int64_t at = 0; at < width; at += kLanes<A>) {
      const auto unit = (load<kLanes<A>>(row + at) - moments.mean) * moments.rstd;
      store_lanes<A>(normed, at, width,
                     unit * load_lanes<A>(weight, at, width) + load_lanes<A>(bias, at, width));
    }
  }
}

// ---- Backward -----------------------------------------------------------------------------------

// The gradients of a row, whose sums over rows are added to those given. Two or four rows at once
// store these sums less often, and took 1.6 and 2 times as long where rows come from memory.
template <class X, class P>
void backward_row(const AddLayerNormBwdParams& params, int64_t r, Accumulator<X>* of_weight,
                  Accumulator<X>* of_bias) {
  using A = Accumulator<X>;
  const int64_t width = params.of.width, offset = r * width;
  const X* sum = static_cast<const X*>(params.sum) + offset;
  const P* grad = static_cast<const P*>(params.grad_normed) + offset;
  const A* weight = static_cast<const A*>(params.weight);
  const A* mean = static_cast<const A*>(params.mean) + r;
  const A* rstd = static_cast<const A*>(params.rstd) + r;
  const auto unit_at = [&](int64_t at) -> Lanes<A> {
    return (load_lanes<A>(sum, at, width) - *mean) * *rstd;
  };
  const auto grad_at = [&](int64_t at) -> Lanes<A> {  // zeros past the end
    return load_lanes<A>(grad, at, width);
  };
  Lanes<A> shift = {}, along = {};  // sums of g w and of g w n
  for (int64_t at = 0; at < width; at += kLanes<A>) {
    const Lanes<A> w = load_lanes<A>(weight, at, width);
    Lanes<A> weights = load<kLanes<A>>(of_weight + at), biases = load<kLanes<A>>(of_bias + at);
    const Lanes<A> g = grad_at(at), n = unit_at(at);
    weights += g * n;
    biases += g;
    shift += g * w;
    along += g * w * n;
    store(of_weight + at, weights);
    store(of_bias + at, biases);
  }
  const A mean_shift = sum_of<A>(shift) / static_cast<A>(width);
  const A mean_along = sum_of<A>(along) / static_cast<A>(width);
  const X* grad_sum = static_cast<const X*>(params.grad_sum) + (params.grad_sum ? offset : 0);
  X* grad_x = static_cast<X*>(params.grad_x) + offset;
  P* grad_branch = static_cast<P*>(params.grad_branch) + (params.grad_branch ? offset : 0);
  for (int64_t at = 0; at < width; at += kLanes<A>) {
    const Lanes<A> pulled = grad_at(at) * load_lanes<A>(weight, at, width);
    Lanes<A> value = (pulled - mean_shift - unit_at(at) * mean_along) * *rstd;
    if (params.grad_sum) value += load_lanes<A>(grad_sum, at, width);
    store_lanes<A>(grad_x, at, width, value);
    if (params.grad_branch) store_lanes<A>(grad_branch, at, width, value);
  }
}

template <class X, class P>
void backward_as(const AddLayerNormBwdParams& params, int64_t begin, int64_t end, int64_t block) {
  using A = Accumulator<X>;
  const int64_t width = params.of.width, padded = width + kLanes<A>;
  std::vector<A> sums(2 * padded);
  A* const of_weight = sums.data();
  A* const of_bias = of_weight + padded;
  for (int64_t r = begin; r < end; ++r) backward_row<X, P>(params, r, of_weight, of_bias);
  if (!params.partials) return;
  A* partials = static_cast<A*>(params.partials) + block * 2 * width;
  std::memcpy(partials, of_weight, width * sizeof(A));
  std::memcpy(partials + width, of_bias, width * sizeof(A));
}

template <class A>
void affine_as(const AddLayerNormAffineParams& params) {
  const int64_t width = params.width;
  const A* partials = static_cast<const A*>(params.partials);
  for (int64_t part = 0; part < 2; ++part) {
    A* to = static_cast<A*>(part == 0 ? params.grad_weight : params.grad_bias);
    for (int64_t at = 0; at < width; at += kLanes<A>) {
      Lanes<A> sum = {};
      for (int64_t block = 0; block < params.blocks; ++block) {
        sum += load_lanes<A>(partials + (2 * block + part) * width, at, width);
      }
      store_lanes<A>(to, at, width, sum);
    }
  }
}

// ---- From run-time types ------------------------------------------------------------------------

inline void forward(const AddLayerNormParams& params, int64_t begin, int64_t end) {
  dispatch_add_layer_norm(params.of, [&](auto stream, auto branch) {
    forward_as<typename decltype(stream)::type, typename decltype(branch)::type>(params, begin,
                                                                                 end);
  });
}

inline void backward(const AddLayerNormBwdParams& params, int64_t begin, int64_t end,
                     int64_t block) {
  dispatch_add_layer_norm(params.of, [&](auto stream, auto branch) {
    backward_as<typename decltype(stream)::type, typename decltype(branch)::type>(params, begin,
                                                                                  end, block);
  });
}

inline void affine(const AddLayerNormAffineParams& params) {
  dispatch_dtype<float, double>(
      params.accumulator, [&](auto type) { affine_as<typename decltype(type)::type>(params); });
}

constexpr AddLayerNormCpuKernels kAddLayerNormKernels = {&forward, &backward, &affine};

}  // namespace
}  // namespace m3i
