// boltzmann: what one pair of a row and a column amounts to, from its dot product c. Device code
// only.
#pragma once

#include "boltzmann/params.h"
#include "m3i/numbers/fast_math.cuh"

namespace m3i::boltzmann {

inline constexpr double kLog2E = 1.4426950408889634;

template <class A>
__device__ inline A minus_infinity() {
  return __uint_as_float(0xff800000u);
}

template <class A>
__device__ inline A logit(A c, A scale, A bias) {
  return fused(c, scale, bias);
}

// exp(Z - shift), of one shift for all: `scale2` is scale log2 e, `offset` (bias - shift) log2 e.
template <class A>
__device__ inline A exponential(A c, A scale2, A offset) {
  return fast_exp2(fused(c, scale2, offset));
}

// exp(z - shift), of a shift close to the largest z: the difference is taken before it is scaled.
template <class A>
__device__ inline A exponential_from(A z, A shift) {
  return fast_exp2((z - shift) * static_cast<A>(kLog2E));
}

// ---- Sigmoid ------------------------------------------------------------------------------------

// log(1 + x) for x from 0 to 1, relative error 2e-7: x times a polynomial, interpolated at the
// Chebyshev points. Half as many instructions as log1pf.
__device__ inline float log1p_of_fraction(float x) {
  float sum = 5.126102362e-03f;
  sum = fmaf(sum, x, -2.907406539e-02f);
  sum = fmaf(sum, x, 7.751608640e-02f);
  sum = fmaf(sum, x, -1.360224783e-01f);
  sum = fmaf(sum, x, 1.907688081e-01f);
  sum = fmaf(sum, x, -2.483539879e-01f);
  sum = fmaf(sum, x, 3.331812024e-01f);
  sum = fmaf(sum, x, -4.999944568e-01f);
  sum = fmaf(sum, x, 9.999999404e-01f);
  return x * sum;
}
__device__ inline double log1p_of_fraction(double x) { return log1p(x); }

// exp(-|z|)
template <class A>
__device__ inline A decay(A z) {
  return fast_exp2((z < 0 ? z : -z) * static_cast<A>(kLog2E));
}

// log(1 + exp(z)), or log(1 + exp(-z)) of a positive
template <class A>
__device__ inline A softplus(A z, bool positive) {
  const A rest = log1p_of_fraction(decay(z));
  return (positive ? larger(-z, A{0}) : larger(z, A{0})) + rest;
}

// Its derivative by z.
template <class A>
__device__ inline A softplus_gradient(A z, bool positive) {
  const A small = decay(z);
  const A large = fast_reciprocal(1 + small);     // sigmoid(|z|)
  const A above = z < 0 ? small * large : large;  // sigmoid(z)
  const A below = z < 0 ? large : small * large;  // sigmoid(-z)
  return positive ? -below : above;
}

}  // namespace m3i::boltzmann
