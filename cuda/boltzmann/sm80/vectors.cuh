// boltzmann on vectors: device code; the operators and their parameters stand in vectors/params.h.
//
// Bytes for N = M = 32,768 and D = 512 in bfloat16, against 4.4 ms of products on an H100:
//   prepare   z_hat and z are read once                                67 MB   20 us at 3.35 TB/s
//   exact     three sums of each row and column, by one block         0.8 MB  about 7 us
//   scale     both gradients are read in float32, written in bfloat16  201 MB   60 us
//   others    some hundred kilobytes each: the time of a launch
// In torch the same were some 80 launches, and the features were read by a norm each.
//
// What all rows have in common (a maximum, a sum) is left in parts, 256 at most, one a block, and
// put together by every block of the next kernel, 4 KB from the second-level cache: a launch less
// than a kernel for it, and no counter in memory that something has to set to 0 before.
//
// `exact` is one block: more would need a flag that an earlier operation clears, which takes longer
// than the block does up to some hundred thousand rows.
#pragma once

#include "boltzmann/vectors/losses.h"
#include "m3i/numbers/fast_math.cuh"
#include "m3i/numbers/vec.cuh"

namespace m3i::boltzmann {

inline constexpr int kVectorThreads = 256;
inline constexpr int kVectorWarps = kVectorThreads / 32;
inline constexpr int kFlagThreads = 1024;

// ---- Within a block -----------------------------------------------------------------------------

struct Add {
  template <class A>
  __device__ static A combine(A a, A b) {
    return a + b;
  }
};
struct LargerOrNan {
  template <class A>
  __device__ static A combine(A a, A b) {
    return larger_or_nan(a, b);
  }
};

// The same bits in every lane.
template <class How, class A>
__device__ inline A over_warp(A value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = How::combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

// The same bits in every thread. A block calls it once for each `folds`.
template <class How, class A>
__device__ inline A over_block(A value, A (&folds)[32]) {
  value = over_warp<How>(value);
  if (threadIdx.x % 32 == 0) folds[threadIdx.x / 32] = value;
  __syncthreads();
  value = folds[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = How::combine(value, folds[warp]);
  return value;
}

// Puts together [num_parts, kCount] parts, in every thread.
template <class How, class A, int kCount>
__device__ inline void over_parts(const void* parts, int64_t num_parts, A (&totals)[kCount]) {
  __shared__ A folds[kCount][32];
  const A* from = static_cast<const A*>(parts);
#pragma unroll
  for (int which = 0; which < kCount; ++which) totals[which] = 0;
  for (int64_t part = threadIdx.x; part < num_parts; part += blockDim.x) {
#pragma unroll
    for (int which = 0; which < kCount; ++which) {
      totals[which] = How::combine(totals[which], from[part * kCount + which]);
    }
  }
#pragma unroll
  for (int which = 0; which < kCount; ++which) {
    totals[which] = over_block<How>(totals[which], folds[which]);
  }
}

// body(i) for the block's threads' shares of i < length; all blocks share it out.
template <class Body>
__device__ inline void for_elements(int64_t length, const Body& body) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < length; i += stride) body(i);
}

// ---- Ids ----------------------------------------------------------------------------------------

// The first column of each id, in open addressing. Empty slots have all bits set: a key of -1,
// which is no id, and the largest place.
struct IdTable {
  unsigned long long* keys;  // [size]
  unsigned* firsts;          // [size]
  int64_t size;              // a power of two
};

inline constexpr unsigned long long kNoKey = ~0ull;

// Which slot an id takes depends on the order of the threads, its first column does not.
template <class Id>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_insert_kernel(const Id* ids, int64_t count, const IdTable table) {
  for_elements(count, [&](int64_t i) {
    const Id id = ids[i];
    if (id == kIgnoredRow) return;
    const auto key = static_cast<unsigned long long>(id);
    uint64_t slot = slot_of(id, table.size);
    while (true) {
      const unsigned long long before = atomicCAS(table.keys + slot, kNoKey, key);
      if (before == kNoKey || before == key) break;
      slot = (slot + 1) & (table.size - 1);
    }
    atomicMin(table.firsts + slot, static_cast<unsigned>(i));
  });
}

// `otherwise` for an id of no column.
__device__ inline int32_t first_column_of(const IdTable& table, int64_t id, int64_t otherwise) {
  const auto key = static_cast<unsigned long long>(id);
  for (uint64_t slot = slot_of(id, table.size);; slot = (slot + 1) & (table.size - 1)) {
    const unsigned long long there = table.keys[slot];
    if (there == key) return static_cast<int32_t>(table.firsts[slot]);
    if (there == kNoKey) return static_cast<int32_t>(otherwise);
  }
}

// A target out of range stops the kernel by a trap, as a failed device assertion would.
__device__ inline int32_t row_id_of(const BoltzmannPrepareParams& params, const IdTable& table,
                                    int64_t row) {
  if (!params.row_ids) return static_cast<int32_t>(params.first_column + row);
  const int64_t id = params.row_ids[row];
  if (id == kIgnoredRow) return kIgnoredRow;
  if (params.col_ids) return first_column_of(table, id, params.num_columns);
  if (params.num_columns > 0 && (id < 0 || id >= params.num_columns)) __trap();
  return static_cast<int32_t>(id);
}

// ---- Prepare ------------------------------------------------------------------------------------

// The square of a row's length, in every lane.
template <class T, int kVector>
__device__ inline Accumulator<T> square_length(const T* row, int64_t width) {
  using A = Accumulator<T>;
  A sum = 0;
#pragma unroll 2
  for (int64_t at = threadIdx.x % 32 * kVector; at < width; at += 32 * kVector) {
    A values[kVector];
    widen(load<kVector>(row + at), values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fused(values[i], values[i], sum);
  }
  return over_warp<Add>(sum);
}

// The largest square length of rows that are not ignored, shared out to all warps.
template <class T, int kVector, class IsIgnored>
__device__ inline Accumulator<T> largest_square(const void* rows, int64_t count, int64_t width,
                                                const IsIgnored& is_ignored) {
  Accumulator<T> most = 0;
  const int64_t stride = int64_t{gridDim.x} * kVectorWarps;
  for (int64_t row = int64_t{blockIdx.x} * kVectorWarps + threadIdx.x / 32; row < count;
       row += stride) {
    if (is_ignored(row)) continue;
    const T* at = static_cast<const T*>(rows) + row * width;
    most = larger_or_nan(most, square_length<T, kVector>(at, width));
  }
  return most;
}

template <class A>
__device__ inline A bias_of(const BoltzmannPrepareParams& params, int64_t column) {
  if (params.col_ids && params.col_ids[params.first_column + column] == kIgnoredRow) {
    return __uint_as_float(0xff800000u);  // minus infinity
  }
  if (!params.bias) return 0;
  return static_cast<const A*>(params.bias)[params.has_bias_each ? column : 0];
}

template <class A>
__device__ inline bool is_minus_infinity(A value) {
  return value < 0 && value - value != 0;
}

// Grid: a block a part.
template <class T, int kVector>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_prepare_kernel(const BoltzmannPrepareParams params, const IdTable table) {
  using A = Accumulator<T>;
  __shared__ A folds[kNumExtremes][32];
  A extremes[kNumExtremes] = {};
  for_elements(params.rows, [&](int64_t row) {
    const int32_t id = params.out_row_ids[row] = row_id_of(params, table, row);
    extremes[kNumRows] += id == kIgnoredRow ? 0 : 1;
  });
  for_elements(params.columns, [&](int64_t column) {
    const A bias = bias_of<A>(params, column);
    static_cast<A*>(params.out_bias)[column] = bias;
    if (is_minus_infinity(bias)) return;
    extremes[kLargestBias] = larger_or_nan(extremes[kLargestBias], bias < 0 ? -bias : bias);
  });
  for_elements(params.col_ids ? params.num_columns : 0, [&](int64_t column) {
    const int64_t id = params.col_ids[column];
    params.out_col_ids[column] =
        id == kIgnoredRow ? kIgnoredColumn : first_column_of(table, id, params.num_columns);
  });
  extremes[kLongestRow] = largest_square<T, kVector>(
      params.z_hat, params.rows, params.width,
      [&](int64_t row) { return params.row_ids && params.row_ids[row] == kIgnoredRow; });
  extremes[kLongestColumn] = largest_square<T, kVector>(
      params.z, params.columns, params.width,
      [&](int64_t column) { return is_minus_infinity(bias_of<A>(params, column)); });
  A* const to = static_cast<A*>(params.extremes) + int64_t{blockIdx.x} * kNumExtremes;
#pragma unroll
  for (int which = 0; which < kNumExtremes; ++which) {
    A value = extremes[which];
    value = which == kNumRows ? over_block<Add>(value, folds[which])
                              : over_block<LargerOrNan>(value, folds[which]);
    if (which == kLongestRow || which == kLongestColumn) value = root_of(value);
    if (threadIdx.x == 0) to[which] = value;
  }
}

// ---- Shifts -------------------------------------------------------------------------------------

// Grid: x over the longer of rows and columns, y over both.
template <class A>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_shift_kernel(const BoltzmannShiftParams params) {
  A most[kNumExtremes];
  over_parts<LargerOrNan>(params.extremes, params.num_parts, most);
  const Shift<A> shift = shift_of(most, *static_cast<const A*>(params.scale));
  const bool of_rows = blockIdx.y == 0;
  A* const to = static_cast<A*>(of_rows ? params.row_shift : params.col_shift);
  for_elements(of_rows ? params.rows : params.columns, [&](int64_t i) { to[i] = shift.common; });
  if (of_rows && blockIdx.x == 0 && threadIdx.x == 0) {
    *static_cast<A*>(params.bound) = shift.bound;
    *params.run = shift.run;
  }
}

template <class A>
__device__ inline bool any_out_of_range(const void* sums, int64_t length) {
  const A* of = static_cast<const A*>(sums);
  bool lost = false;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < length; i += kFlagThreads) {
    lost |= is_out_of_range(of[kNegatives * length + i], of[kPositives * length + i],
                            of[kCount * length + i]);
  }
  return lost;
}

// One block.
template <class A>
__global__ void __launch_bounds__(kFlagThreads)
    boltzmann_exact_kernel(const BoltzmannExactParams params) {
  bool exact = !*params.run;  // then there are no sums
  if (!exact) {
    const bool lost = any_out_of_range<A>(params.sums.of_rows, params.sums.rows) ||
                      any_out_of_range<A>(params.sums.of_columns, params.sums.columns);
    exact = __syncthreads_or(lost) != 0;
  }
  if (threadIdx.x == 0) *params.exact = exact;
}

// Grid: x over the longer of rows and columns, y over both.
template <class A>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_exact_shift_kernel(const BoltzmannExactShiftParams params) {
  const bool of_rows = blockIdx.y == 0, exact = *params.exact;
  const void* from = of_rows ? exact ? params.row_max : params.row_shift
                     : exact ? params.col_max
                             : params.col_shift;
  A* const to = static_cast<A*>(of_rows ? params.out_row_shift : params.out_col_shift);
  for_elements(of_rows ? params.rows : params.columns, [&](int64_t i) {
    const A shift = static_cast<const A*>(from)[i];
    // The maximum of a row whose columns are all ignored
    to[i] = exact && is_minus_infinity(shift) ? A{0} : shift;
  });
}

// ---- Losses -------------------------------------------------------------------------------------

// By value: a choice between two parameters of the kernel would put both into local memory.
__device__ inline BoltzmannSumsOf settled(const BoltzmannLossInput& input) {
  BoltzmannSumsOf sums = input.sums;
  if (input.has_again && *input.exact) {
    sums.of_rows = input.again.of_rows;
    sums.of_columns = input.again.of_columns;
  }
  return sums;
}

// Grid: a block a part.
template <class A>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_totals_kernel(const BoltzmannTotalsParams params) {
  __shared__ A folds[kNumTotals][32];
  const BoltzmannSumsOf sums = settled(params.input);
  A totals[kNumTotals] = {};
  for_elements(sums.rows, [&](int64_t i) {
    const SumsOfOne<A> of = sums_at<A>(sums.of_rows, sums.rows, i);
    totals[kRowLoss] += loss_of(of, static_cast<const A*>(params.input.row_shift)[i]);
    totals[kRowCount] += of.count > 0 ? 1 : 0;
  });
  for_elements(sums.columns, [&](int64_t i) {
    const SumsOfOne<A> of = sums_at<A>(sums.of_columns, sums.columns, i);
    totals[kColumnLoss] += loss_of(of, static_cast<const A*>(params.input.col_shift)[i]);
    totals[kColumnCount] += of.count > 0 ? 1 : 0;
  });
  A* const to = static_cast<A*>(params.totals) + int64_t{blockIdx.x} * kNumTotals;
#pragma unroll
  for (int which = 0; which < kNumTotals; ++which) {
    const A total = over_block<Add>(totals[which], folds[which]);
    if (threadIdx.x == 0) to[which] = total;
  }
}

// Grid: x over the longer of rows and columns, y over both.
template <class A>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_loss_kernel(const BoltzmannLossParams params) {
  A totals[kNumTotals];
  over_parts<Add>(params.totals, params.num_parts, totals);
  const bool symmetric = params.input.symmetric;
  const int64_t num_columns = params.num_columns;
  const Shares<A> shares = shares_of(totals, symmetric, params.mean);
  const BoltzmannSumsOf sums = settled(params.input);
  if (blockIdx.y == 0) {
    for_elements(sums.rows, [&](int64_t i) {
      write_weights(sums_at<A>(sums.of_rows, sums.rows, i), A{1}, sums.rows,
                    static_cast<A*>(params.row_weights) + i);
    });
  } else {
    for_elements(num_columns, [&](int64_t i) {
      const SumsOfOne<A> of =
          symmetric ? sums_at<A>(sums.of_columns, num_columns, i) : SumsOfOne<A>{};
      write_weights(of, shares.column / shares.row, num_columns,
                    static_cast<A*>(params.col_weights) + i);
    });
  }
  if (blockIdx.x > 0 || blockIdx.y > 0 || threadIdx.x > 0) return;
  *static_cast<A*>(params.value) =
      value_of(totals, shares, *static_cast<const A*>(params.bound), symmetric);
  *static_cast<A*>(params.share) = shares.row * static_cast<A>(params.ranks);
  *static_cast<A*>(params.num_rows) = totals[kRowCount];
}

// One block.
template <class A>
__global__ void __launch_bounds__(kFlagThreads)
    boltzmann_sigmoid_loss_kernel(const BoltzmannSigmoidLossParams params) {
  __shared__ A folds[2][32];
  A sum = 0, rows = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < params.num_values; i += kFlagThreads) {
    sum += static_cast<const A*>(params.values)[i];
  }
  for (int64_t i = threadIdx.x; i < params.num_parts; i += kFlagThreads) {
    rows += static_cast<const A*>(params.extremes)[i * kNumExtremes + kNumRows];
  }
  sum = over_block<Add>(sum, folds[0]);
  rows = over_block<Add>(rows, folds[1]);
  if (threadIdx.x > 0) return;
  const A share = sigmoid_share(rows, params.mean), bound = *static_cast<const A*>(params.bound);
  *static_cast<A*>(params.value) = share * sum + (bound - bound);
  *static_cast<A*>(params.share) = share * static_cast<A>(params.ranks);
}

// ---- Backward -----------------------------------------------------------------------------------

template <int kVector, class From, class To, class A>
__device__ inline void scale_elements(const void* from, A factor, int64_t length, void* to) {
  const From* const in = static_cast<const From*>(from);
  To* const out = static_cast<To*>(to);
  for_elements(length / kVector, [&](int64_t i) {
    A values[kVector];
    widen(load<kVector>(in + i * kVector), values);
#pragma unroll
    for (int k = 0; k < kVector; ++k) values[k] *= factor;
    store(out + i * kVector, round_to<To>(values));
  });
  for_elements(length % kVector, [&](int64_t i) {
    const int64_t at = length / kVector * kVector + i;
    store_value(out + at, load_value(in + at) * factor);
  });
}

// Grid: x over the elements, y over z_hat and z.
template <class From, class To, int kVector>
__global__ void __launch_bounds__(kVectorThreads)
    boltzmann_scale_kernel(const BoltzmannScaleParams params) {
  using A = Accumulator<From>;
  const auto number = [](const void* at) { return at ? *static_cast<const A*>(at) : A{1}; };
  const A shared = number(params.grad_out) * number(params.share);
  const A factor = shared * number(params.scale);
  if (blockIdx.y == 1) {
    return scale_elements<kVector, From, To>(params.z, factor, params.num_z, params.out_z);
  }
  scale_elements<kVector, From, To>(params.z_hat, factor, params.num_z_hat, params.out_z_hat);
  for_elements(params.num_bias, [&](int64_t i) {
    static_cast<A*>(params.out_of_bias)[i] = static_cast<const A*>(params.of_bias)[i] * shared;
  });
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  *static_cast<A*>(params.factor) = factor;
  *static_cast<A*>(params.out_of_scale) = number(params.of_scale) * shared;
}

}  // namespace m3i::boltzmann
