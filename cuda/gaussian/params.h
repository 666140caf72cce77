// gaussian: parameters of the CPU kernels, the launchers and the device code.
//
// For R rows of D elements, p = z_hat and t = (z - mean) * rstd, or t = z without normalise,
//
//   value = distance_scale * sum of (t - p)^2 + product_scale * sum over rows of p^T C p
//   distance_scale = 1 / (2 sigma^2 R D),  product_scale = decorrelation_weight / (R D)
//   C = t^T t / R
//
//   grad = grad_out * (2 distance_scale * (p - t) + 2 product_scale * C p)
//
// The second sum is that of C * (p^T p), element by element: no product of two rows is kept.
//
// Mean and variance of a row take two passes, the second of which corrects the first: with the
// first pass's mean m and d = z - m, mean = m + mean(d), variance = mean(d^2) - mean(d)^2. A row
// far from zero loses no precision, and one of equal elements gives zeros, not its rounding error
// times 1 / sqrt(eps).
#pragma once

#include "m3i/types.h"

namespace m3i {

// All arrays are contiguous, row-major. A is double where the elements of both are float64, else
// float.
struct GaussianRows {
  int64_t rows;   // R
  int64_t width;  // D
  DType prediction;
  DType target;
  bool normalise;
  const void* z_hat;  // [R, D] prediction
  const void* z;      // [R, D] target
};

struct GaussianParams {
  GaussianRows of;
  double eps;
  void* mean;        // [R] A, null unless normalise
  void* rstd;        // [R] A, null unless normalise
  void* normalised;  // [R, D] target, null where not needed
};

// Computes C, and the sum of C * (p^T p), from the sums over rows of t t^T and p p^T.
struct GaussianProductParams {
  int64_t size;  // D * D
  DType prediction;
  double scale;                // 1 / R
  const void* of_targets;      // [D, D] A
  const void* of_predictions;  // [D, D] A
  void* covariance;            // [D, D] prediction
};

// The final sum on CUDA, over the partial sums of blocks.
struct GaussianValueParams {
  DType accumulator;
  int64_t num_distances, num_products;
  double distance_scale, product_scale;
  const void* distances;  // [num_distances] A
  const void* products;   // [num_products] A
  void* value;            // [] A
};

struct GaussianBwdParams {
  GaussianRows of;
  double distance_scale, product_scale;
  const void* grad_out;  // [] A
  const void* mean;      // [R] A, null unless normalise
  const void* rstd;      // [R] A, null unless normalise
  const void* pull;      // [R, D] prediction, C p; null without decorrelation
  void* grad;            // [R, D] prediction
};

}  // namespace m3i
