// add_layer_norm: parameters of the kernels, for host and device code.
//
// x: R rows of D, the residual stream, and b the branch that is added to it, where there is one:
//
//   s = x + b                            in the dtype of x
//   y = (s - mean) * rstd * weight + bias, rounded once, to the dtype of b
//   rstd = 1 / sqrt(var + eps),          var = mean of (s - mean)^2
//
// With g = dL/dy and h = dL/ds from elsewhere (the residual path), n = (s - mean) * rstd:
//
//   dL/dx = h + rstd * (g w - mean(g w) - n mean(g w n)),   dL/db the same, rounded to b's dtype
//   dL/dweight = sum_r g n,  dL/dbias = sum_r g
//
// A is the accumulators' type: float, double for double. Weight and bias are in A.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Elements of a row, at most: a block of 1,024 threads holds a row in registers.
inline constexpr int64_t kAddLayerNormWidth = 4096;

struct AddLayerNormRows {
  int64_t rows, width;
  DType stream, branch;  // of x and s, and of b and y
};

struct AddLayerNormParams {
  AddLayerNormRows of;
  double eps;
  const void* x;       // [R, D] stream
  const void* branch;  // [R, D] branch, null: s is x
  const void* weight;  // [D] A
  const void* bias;    // [D] A
  void* sum;           // [R, D] stream, null without a branch
  void* normed;        // [R, D] branch
  void* mean;          // [R] A
  void* rstd;          // [R] A
};

struct AddLayerNormBwdParams {
  AddLayerNormRows of;
  const void* grad_sum;     // [R, D] stream, h; null: zeros
  const void* grad_normed;  // [R, D] branch, g
  const void* sum;          // [R, D] stream, s
  const void* weight;       // [D] A
  const void* mean;         // [R] A
  const void* rstd;         // [R] A
  void* grad_x;             // [R, D] stream
  void* grad_branch;        // [R, D] branch, null where nobody needs another copy
  void* partials;           // [blocks, 2, D] A, sums of g n and of g; null where nobody needs them
};

// The last sum of the gradients by weight and bias, over the partial ones of blocks.
struct AddLayerNormAffineParams {
  DType accumulator;
  int64_t blocks, width;
  const void* partials;  // [blocks, 2, D] A
  void* grad_weight;     // [D] A
  void* grad_bias;       // [D] A
};

}  // namespace m3i
