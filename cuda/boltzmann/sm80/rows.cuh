// boltzmann_rows_pass: device code; what is computed stands in rows/params.h.
//
// One block of threads a row, which it reads twice: for its sums, with a shift that grows to the
// largest logit so far, and to write G. At D = 1,024 an element costs 6,144 flop in the three
// GEMMs and 4 + 4 + 2 bytes here (fp32 products, half G), of which the second read comes from the
// second-level cache where few rows are in flight: 132 multiprocessors x 8 rows x 87 kB at 21,841
// columns are more than it holds, so that part of it does not.
//
// Rejected, by counting: exponentials written by the first pass, which would be 4 more bytes and
// one shift for all that were written before; one warp a row, which has no more loads in flight.
#pragma once

#include "boltzmann/rows/params.h"
#include "boltzmann/sm80/element.cuh"
#include "boltzmann/vectors/losses.h"
#include "m3i/numbers/vec.cuh"

namespace m3i::boltzmann {

inline constexpr int kRowThreads = 256;

// ---- A row --------------------------------------------------------------------------------------

// The dot products of a row, which the kernel itself may overwrite, and its logits.
template <class A>
struct LogitRow {
  static constexpr int kVector = kAccessBytes / sizeof(A);

  A* products;
  const A* bias;  // or null
  A scale;

  __device__ LogitRow(const BoltzmannRowsParams& params, const BoltzmannLogits& logits)
      : products(static_cast<A*>(logits.products) + int64_t{blockIdx.x} * params.stride),
        bias(static_cast<const A*>(logits.bias)),
        scale(*static_cast<const A*>(logits.scale)) {}

  __device__ A logit(int64_t j, A product) const {
    return fused(product, scale, bias ? bias[j] : A{0});
  }

  // `size` elements, kVector or one. Not through the read-only cache, since G takes their place.
  __device__ void load(int64_t j, int size, A (&values)[kVector]) const {
    if (size == kVector) {
      const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(products + j));
      memcpy(values, &raw, sizeof(raw));
    } else {
      values[0] = __ldcg(products + j);
    }
  }
};

// body(j, size) of the vectors of a row that are this thread's, the same ones at every call, and of
// single elements behind them. The size is a constant where the body is inlined.
template <int kVector, class Body>
__device__ void for_vectors(int64_t columns, const Body& body) {
  const int64_t whole = columns / kVector * kVector;
  for (int64_t j = int64_t{threadIdx.x} * kVector; j < whole; j += kRowThreads * kVector) {
    body(j, kVector);
  }
  if (whole + threadIdx.x < columns) body(whole + threadIdx.x, 1);
}

// ---- Sums with a growing shift ------------------------------------------------------------------

// Lower than any logit but -inf, from which it can be subtracted.
template <class A>
__device__ inline A lowest() {
  return -3.4028234663852886e38f;
}

// Sums of e = exp(z - most) of some columns: how many are 1, the rest, and e times another number.
template <class A>
struct RowSums {
  A most, count, rest, pull;

  __device__ static RowSums none() { return {lowest<A>(), 0, 0, 0}; }

  __device__ A total() const { return count + rest; }

  // Returns the factor of what was added before.
  __device__ A raise(A to) {
    const A factor = exponential_from(most, to);
    rest = total() * factor;
    count = 0;
    pull *= factor;
    most = to;
    return factor;
  }
  // Returns e.
  __device__ A add(A z, A other) {
    const A e = exponential_from(z, most);
    e == 1 ? count += e : rest += e;
    pull += e * other;
    return e;
  }
  __device__ void add_all(const RowSums& sums) {
    count += sums.count;
    rest += sums.rest;
    pull += sums.pull;
  }
  __device__ RowSums exchanged(int lane) const {
    const auto other = [&](A value) { return __shfl_xor_sync(0xffffffffu, value, lane); };
    return {other(most), other(count), other(rest), other(pull)};
  }
};

// Of the columns that are not the class.
template <class A>
struct ClassSums {
  RowSums<A> row;

  __device__ static ClassSums none() { return {RowSums<A>::none()}; }
  __device__ void add(A z, A product) {
    if (z > row.most) row.raise(z);
    row.add(z, product);
  }
  __device__ void merge(ClassSums other) {
    if (other.row.most > row.most) row.raise(other.row.most);
    if (row.most > other.row.most) other.row.raise(row.most);
    row.add_all(other.row);
  }
  __device__ ClassSums exchanged(int lane) const { return {row.exchanged(lane)}; }
};

// Of all columns, in both softmaxes, and the sum of t (row.most - z), t = exp(z' - target.most).
template <class A>
struct SoftSums {
  RowSums<A> row, target;
  A distance;

  __device__ static SoftSums none() { return {RowSums<A>::none(), RowSums<A>::none(), 0}; }

  __device__ void raise_row(A to) {
    distance += target.total() * (to - row.most);
    row.raise(to);
  }
  __device__ void raise_target(A to) { distance *= target.raise(to); }
  __device__ void add(A z, A target_z, A product) {
    if (z > row.most) raise_row(z);
    if (target_z > target.most) raise_target(target_z);
    row.add(z, product);
    const A t = target.add(target_z, product);
    if (t != 0) distance += t * (row.most - z);  // not 0 times infinity
  }
  __device__ void merge(SoftSums other) {
    if (other.row.most > row.most) raise_row(other.row.most);
    if (row.most > other.row.most) other.raise_row(row.most);
    if (other.target.most > target.most) raise_target(other.target.most);
    if (target.most > other.target.most) other.raise_target(target.most);
    row.add_all(other.row);
    target.add_all(other.target);
    distance += other.distance;
  }
  __device__ SoftSums exchanged(int lane) const {
    return {row.exchanged(lane), target.exchanged(lane),
            __shfl_xor_sync(0xffffffffu, distance, lane)};
  }
};

// Over the block, the same bits in every thread.
template <class Sums>
__device__ Sums merged(Sums sums) {
  constexpr int kLanes = 32, kWarps = kRowThreads / kLanes;
  __shared__ Sums of_warps[kWarps];
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) sums.merge(sums.exchanged(lane));
  if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = sums;
  __syncthreads();
  // Every warp puts them together again, in place of a second barrier
  sums = of_warps[threadIdx.x % kWarps];
#pragma unroll
  for (int lane = kWarps / 2; lane > 0; lane /= 2) sums.merge(sums.exchanged(lane));
  return sums;
}

// ---- Results ------------------------------------------------------------------------------------

// Writes what a row amounts to, from one thread.
template <class A>
__device__ void write_row(const BoltzmannRowsParams& params, A nll, A scale_grad) {
  if (threadIdx.x > 0) return;
  static_cast<A*>(params.nll)[blockIdx.x] = nll;
  if (params.scale_grads) static_cast<A*>(params.scale_grads)[blockIdx.x] = scale_grad;
}

// Writes G = grad(j, product, product of the targets') of a row.
template <class T, bool kSoft, class Grad>
__device__ void write_grads(const BoltzmannRowsParams& params, const LogitRow<Accumulator<T>>& row,
                            const LogitRow<Accumulator<T>>& of_target, const Grad& grad) {
  using A = Accumulator<T>;
  constexpr int kVector = LogitRow<A>::kVector;
  if (!params.rounded && !params.writes_products) return;
  T* const rounded = static_cast<T*>(params.rounded) + int64_t{blockIdx.x} * params.stride;
  for_vectors<kVector>(params.columns, [&](int64_t j, int size) {
    A values[kVector] = {}, targets[kVector] = {};
    row.load(j, size, values);
    if constexpr (kSoft) of_target.load(j, size, targets);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k < size) values[k] = grad(j + k, values[k], targets[k]);
    }
    if (params.rounded) {
      size == kVector ? store(rounded + j, round_to<T>(values))
                      : store_value(rounded + j, values[0]);
    }
    if (params.writes_products) {
      A* const to = row.products + j;
      size == kVector ? store(to, round_to<A>(values)) : store_value(to, values[0]);
    }
  });
}

// With n the sum of the other columns' exponentials and p that of the class, the loss is
// log1p(n / p) and G of the class is -n / (n + p): no difference of numbers that are nearly equal.
template <class T>
__device__ void class_row(const BoltzmannRowsParams& params, Accumulator<T> weight) {
  using A = Accumulator<T>;
  constexpr int kVector = LogitRow<A>::kVector;
  const LogitRow<A> row(params, params.logits);
  const int64_t target = params.row_ids[blockIdx.x];
  if (target == -1) {
    write_grads<T, false>(params, row, row, [](int64_t, A, A) { return A{0}; });
    return write_row<A>(params, 0, 0);
  }
  if (target < -1 || target >= params.columns) __trap();  // targets: a class that is none
  const A own_product = __ldcg(row.products + target);
  const A own = row.logit(target, own_product);
  ClassSums<A> sums = ClassSums<A>::none();
  A lost = 0;  // NaN where a product is not finite
  for_vectors<kVector>(params.columns, [&](int64_t j, int size) {
    A products[kVector];
    row.load(j, size, products);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k >= size) break;
      lost = fused(products[k], A{0}, lost);
      if (j + k != target) sums.add(row.logit(j + k, products[k]), products[k] - own_product);
    }
  });
  sums.row.rest += lost;
  sums = merged(sums);
  if (own > sums.row.most) sums.row.raise(own);
  const A shift = sums.row.most, n = sums.row.total(), p = exponential_from(own, shift);
  const A nll = n <= p ? log1p_of(n / p) : log_of(n + p) + shift - own;
  const A factor = weight / (n + p);
  write_row<A>(params, weight * nll, factor * sums.row.pull);
  write_grads<T, false>(params, row, row, [&](int64_t j, A product, A) {
    return (j == target ? -n : exponential_from(row.logit(j, product), shift)) * factor;
  });
}

// Of log sum exp Z - Z_j = (shift - Z_j) + log(total) no term is negative, so that a small loss is
// precise. Where both softmaxes are nearly certain of the same column, its G is the difference of
// what they leave to the others.
template <class T>
__device__ void soft_row(const BoltzmannRowsParams& params, Accumulator<T> weight) {
  using A = Accumulator<T>;
  constexpr int kVector = LogitRow<A>::kVector;
  const LogitRow<A> row(params, params.logits), of_target(params, params.targets);
  SoftSums<A> sums = SoftSums<A>::none();
  A lost = 0;  // NaN where a product is not finite
  for_vectors<kVector>(params.columns, [&](int64_t j, int size) {
    A products[kVector], targets[kVector];
    row.load(j, size, products);
    of_target.load(j, size, targets);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k >= size) break;
      lost = fused(products[k], A{0}, fused(targets[k], A{0}, lost));
      sums.add(row.logit(j + k, products[k]), of_target.logit(j + k, targets[k]), products[k]);
    }
  });
  sums.row.rest += lost;
  sums = merged(sums);
  const A total = sums.row.total(), target_total = sums.target.total();
  const A log_total = sums.row.count == 1 ? log1p_of(sums.row.rest) : log_of(total);
  const A nll = sums.distance / target_total + log_total;
  const A scale_grad = sums.row.pull / total - sums.target.pull / target_total;
  write_row<A>(params, weight * nll, weight * scale_grad);
  const A factor = weight / total, target_factor = weight / target_total;
  const bool certain = sums.row.count == 1 && sums.target.count == 1;
  const A of_both = sums.target.rest * target_factor - sums.row.rest * factor;
  write_grads<T, true>(params, row, of_target, [&](int64_t j, A product, A target_product) {
    const A e = exponential_from(row.logit(j, product), sums.row.most);
    const A t = exponential_from(of_target.logit(j, target_product), sums.target.most);
    return certain && e == 1 && t == 1 ? of_both : e * factor - t * target_factor;
  });
}

// Grid: a block for each row.
template <class T, bool kSoft>
__global__ void __launch_bounds__(kRowThreads)
    boltzmann_rows_kernel(const BoltzmannRowsParams params) {
  using A = Accumulator<T>;
  const A* weights = static_cast<const A*>(params.row_weights);
  const A weight = weights ? weights[blockIdx.x] : A{1};
  if constexpr (kSoft) {
    soft_row<T>(params, weight);
  } else {
    class_row<T>(params, weight);
  }
}

}  // namespace m3i::boltzmann
