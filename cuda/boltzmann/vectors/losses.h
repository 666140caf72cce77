// boltzmann on vectors: what a row's sums amount to. Host and device code.
#pragma once

#include "boltzmann/vectors/params.h"

#ifndef __CUDACC_RTC__
#include <math.h>
#endif

namespace m3i::boltzmann {

M3I_HOST_DEVICE inline float log_of(float x) { return logf(x); }
M3I_HOST_DEVICE inline double log_of(double x) { return log(x); }
M3I_HOST_DEVICE inline float log1p_of(float x) { return log1pf(x); }
M3I_HOST_DEVICE inline double log1p_of(double x) { return log1p(x); }
M3I_HOST_DEVICE inline float root_of(float x) { return sqrtf(x); }
M3I_HOST_DEVICE inline double root_of(double x) { return sqrt(x); }

// The largest logit whose exponential needs no shift.
template <class A>
inline constexpr A kHeadroom = sizeof(A) == 8 ? 600 : 60;
// The bound of the logits up to which a common shift is tried before exact ones.
template <class A>
inline constexpr A kCommon = sizeof(A) == 8 ? 2000 : 200;

// The smallest sum that the loss may divide by.
template <class A>
M3I_HOST_DEVICE constexpr A least_sum() {
  if constexpr (sizeof(A) == 8) {
    return 1e-290;
  } else {
    return 1e-30f;
  }
}

// NaN if one of them is.
template <class A>
M3I_HOST_DEVICE inline A larger_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

// The id's place in a table of `size`, a power of two, by the finaliser of splitmix64.
M3I_HOST_DEVICE inline uint64_t slot_of(int64_t id, uint64_t size) {
  uint64_t bits = static_cast<uint64_t>(id);
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return (bits ^ bits >> 31) & (size - 1);
}

// Slots for `count` ids: a power of two, at least half of them free.
M3I_HOST_DEVICE constexpr int64_t table_size(int64_t count) {
  int64_t size = 2;
  while (size < 2 * count) size *= 2;
  return size;
}

template <class A>
struct Shift {
  A bound, common;
  bool run;
};

template <class A>
M3I_HOST_DEVICE inline Shift<A> shift_of(const A (&most)[kNumExtremes], A scale) {
  const A magnitude = scale < 0 ? -scale : scale;
  const A bound = magnitude * most[kLongestRow] * most[kLongestColumn] + most[kLargestBias];
  return {bound, larger_or_nan(bound - kHeadroom<A>, A{0}), bound <= kCommon<A>};
}

// A row's or a column's entries.
template <class A>
struct SumsOfOne {
  A negatives, positives, logits, count;
};

template <class A>
M3I_HOST_DEVICE inline SumsOfOne<A> sums_at(const void* sums, int64_t length, int64_t i) {
  const A* of = static_cast<const A*>(sums) + i;
  return {of[kNegatives * length], of[kPositives * length], of[kPositiveLogits * length],
          of[kCount * length]};
}

// Whether a sum that the loss divides by has left the range of its type.
template <class A>
M3I_HOST_DEVICE inline bool is_out_of_range(A negatives, A positives, A count) {
  const A total = negatives + positives;
  const bool holds = total >= least_sum<A>() && total - total == 0;  // finite, not NaN
  return !holds && count > 0;
}

// The mean negative log-likelihood over the positives; 0 without one.
//
// With the exponentials p of the positive and n of the negatives, -log(p / (p + n)) is computed as
// log1p(n / p): a difference of two logarithms would lose the small loss of a converged pair.
template <class A>
M3I_HOST_DEVICE inline A loss_of(const SumsOfOne<A>& of, A shift) {
  if (of.count == 0) return 0;
  const A mean_logit = of.logits / of.count;
  if (!(of.negatives <= of.positives)) {
    return log_of(of.negatives + of.positives) + shift - mean_logit;
  }
  const A close = log1p_of(of.negatives / of.positives);
  return of.count == 1 ? close : close + (log_of(of.positives) + shift - mean_logit);
}

// The weights by which exponentials give the gradient of loss_of by the logits (params.h), times
// `factor`. That by a single positive is -n / (n + p), computed without a difference.
template <class A>
M3I_HOST_DEVICE inline void write_weights(const SumsOfOne<A>& of, A factor, int64_t length, A* to) {
  A negative = 0, positive = 0, target = 0;
  if (of.count != 0) {
    const bool single = of.count == 1;
    const A total = of.negatives + of.positives;
    negative = factor / total;
    positive = single ? A{0} : negative;
    target = single ? of.negatives / total * factor : factor / of.count;
  }
  to[kNegativeWeight * length] = negative;
  to[kPositiveWeight * length] = positive;
  to[kTarget * length] = target;
}

// The shares of a row and a column with a positive in the value.
template <class A>
struct Shares {
  A row, column;
};

template <class A>
M3I_HOST_DEVICE inline Shares<A> shares_of(const A (&totals)[kNumTotals], bool symmetric,
                                           bool mean) {
  const A all = symmetric ? A{0.5} : A{1};
  if (!mean) return {all, all};
  const A rows = totals[kRowCount], columns = totals[kColumnCount];
  return {all / (rows > 1 ? rows : A{1}), all / (columns > 1 ? columns : A{1})};
}

template <class A>
M3I_HOST_DEVICE inline A value_of(const A (&totals)[kNumTotals], const Shares<A>& shares, A bound,
                                  bool symmetric) {
  const A columns = symmetric ? shares.column * totals[kColumnLoss] : A{0};
  return shares.row * totals[kRowLoss] + columns + (bound - bound);  // NaN unless it is finite
}

// A row's weight in the value of the sigmoid form, where `rows` are not ignored.
template <class A>
M3I_HOST_DEVICE inline A sigmoid_share(A rows, bool mean) {
  return mean && rows > 1 ? 1 / rows : A{1};
}

}  // namespace m3i::boltzmann
