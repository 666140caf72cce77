// boltzmann: a tile of C, what is known of its rows and columns, and sums over it. Device code
// only.
#pragma once

#include "boltzmann/sm80/element.cuh"
#include "boltzmann/sm80/partials.cuh"
#include "boltzmann/sm80/product.cuh"

namespace m3i::boltzmann {

inline constexpr int32_t kIgnored = -1;   // id of a row: ignored, or beyond the last one
inline constexpr int32_t kNoColumn = -2;  // id of a column beyond the last one

// By row and column of the tile of kDown x kAcross warps. A kernel fills what it reads.
template <class Wide, int kRowsOf, int kColumnsOf, int kDown, int kAcross>
struct Vectors {
  using A = Wide;
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  static constexpr int kThreads = kDown * kAcross * kWarpLanes;

  int32_t row_ids[kRows], column_ids[kColumns];
  A row_shift[kRows], column_shift[kColumns];
  A bias[kColumns];
  A offset[kColumns];  // of the exponents with one shift for all
  A row_weights[kNumWeights][kRows], column_weights[kNumWeights][kColumns];
  A row_folds[kAcross][kRows], column_folds[kDown][kColumns];  // of each warp
};

template <class T>
using VectorsOf = Vectors<Accumulator<T>, Shape<T>::kRows, Shape<T>::kColumns,
                          Shape<T>::kTile.warps_down, Shape<T>::kTile.warps_across>;

template <class T>
struct Shared {
  alignas(16) Stage<T> stages[Shape<T>::kTile.stages];
  VectorsOf<T> vectors;
};

struct TileOrigin {
  int64_t row, column;
};

// The tile of a thread block: grid x over the columns' tiles of its block, y over the rows'.
template <class T>
__device__ inline TileOrigin tile_of_block(const Block& block) {
  return {block.row_begin + blockIdx.y * int64_t{Shape<T>::kRows},
          block.column_begin + blockIdx.x * int64_t{Shape<T>::kColumns}};
}

__device__ inline bool is_skipped(const BoltzmannInput& input) { return input.run && !*input.run; }

template <class A>
__device__ inline A read_scalar(const void* from) {
  return *static_cast<const A*>(from);
}

// ---- Rows and columns ---------------------------------------------------------------------------

// body(i, whether it exists, its number): the V::kThreads threads of the tile, which begin at a
// multiple of that number, share out `extent` rows or columns.
template <class V, class Body>
__device__ inline void for_extent(int extent, int64_t begin, int64_t end, const Body& body) {
  for (int i = threadIdx.x % V::kThreads; i < extent; i += V::kThreads) {
    body(i, begin + i < end, begin + i);
  }
}

// Ids and bias. kChecked: a row that names a column that is not there stops the kernel by a trap,
// as in mask_mix; labels, which col_ids are, may be any number.
template <bool kChecked, class V>
__device__ inline void stage_input(V& to, const BoltzmannInput& input, const TileOrigin& tile) {
  using A = typename V::A;
  for_extent<V>(V::kRows, tile.row, input.rows, [&](int i, bool exists, int64_t row) {
    const int32_t id = exists ? input.row_ids[row] : kIgnored;
    if (kChecked && !input.col_ids && (id < kIgnored || id >= input.columns)) __trap();
    to.row_ids[i] = id;
  });
  for_extent<V>(V::kColumns, tile.column, input.columns, [&](int j, bool exists, int64_t column) {
    const int32_t place = static_cast<int32_t>(column);
    const int32_t id = exists && input.col_ids ? input.col_ids[column] : place;
    to.column_ids[j] = exists ? id : kNoColumn;
    to.bias[j] = exists ? static_cast<const A*>(input.bias)[column] : minus_infinity<A>();
  });
}

// After stage_input, by the same threads: of one shift for all.
template <class V>
__device__ inline void stage_offset(V& to, const BoltzmannShift& shift, const TileOrigin& tile) {
  using A = typename V::A;
  const A common = static_cast<const A*>(shift.rows)[0];
  for_extent<V>(V::kColumns, tile.column, 0, [&](int j, bool, int64_t) {
    to.offset[j] = (to.bias[j] - common) * static_cast<A>(kLog2E);
  });
}

// Likewise. `exact`: each row and column has its own shift.
template <class V>
__device__ inline void stage_shift(V& to, const BoltzmannInput& input, const BoltzmannShift& shift,
                                   const TileOrigin& tile, bool exact) {
  using A = typename V::A;
  if (!exact) return stage_offset(to, shift, tile);
  const A* of_rows = static_cast<const A*>(shift.rows);
  const A* of_columns = static_cast<const A*>(shift.columns);
  for_extent<V>(V::kRows, tile.row, input.rows, [&](int i, bool exists, int64_t row) {
    to.row_shift[i] = exists ? of_rows[row] : A{0};
  });
  for_extent<V>(V::kColumns, tile.column, input.columns, [&](int j, bool exists, int64_t column) {
    to.column_shift[j] = exists ? of_columns[column] : A{0};
  });
}

template <class V>
__device__ inline void stage_weights(V& to, const BoltzmannInput& input, const void* row_weights,
                                     const void* column_weights, const TileOrigin& tile) {
  using A = typename V::A;
#pragma unroll
  for (int kind = 0; kind < kNumWeights; ++kind) {
    for_extent<V>(V::kRows, tile.row, input.rows, [&](int i, bool exists, int64_t row) {
      const A* from = static_cast<const A*>(row_weights) + kind * input.rows;
      to.row_weights[kind][i] = exists ? from[row] : A{0};
    });
    for_extent<V>(V::kColumns, tile.column, input.columns, [&](int j, bool exists, int64_t column) {
      const A* from = static_cast<const A*>(column_weights) + kind * input.columns;
      to.column_weights[kind][j] = exists ? from[column] : A{0};
    });
  }
}

// Whether the tile has a positive pair; its ids are staged. Where a column's id is its number, that
// takes one comparison a row.
template <class V>
__device__ inline bool thread_sees_positive(const V& of, const BoltzmannInput& input,
                                            const TileOrigin& tile) {
  constexpr int kStep = V::kThreads > V::kColumns ? V::kThreads / V::kColumns : 1;
  const int thread = threadIdx.x % V::kThreads;
  bool seen = false;
  if (!input.col_ids) {
    for_extent<V>(V::kRows, tile.row, input.rows, [&](int i, bool, int64_t) {
      const int64_t column = of.row_ids[i] - tile.column;
      seen |= column >= 0 && column < V::kColumns;
    });
    return seen;
  }
  for (int j = thread % V::kColumns; j < V::kColumns; j += V::kThreads) {
    const int32_t id = of.column_ids[j];
#pragma unroll 4  // warpgroups have no registers for more
    for (int i = thread / V::kColumns; i < V::kRows; i += kStep) seen |= of.row_ids[i] == id;
  }
  return seen;
}

template <class V>
__device__ inline bool thread_sees_ignored(const V& of) {
  bool seen = false;
  for_extent<V>(V::kRows, 0, 0, [&](int i, bool, int64_t) { seen |= of.row_ids[i] == kIgnored; });
  return seen;
}

// Dot products of the tile; afterwards the staged vectors are there for all threads.
template <class T>
__device__ inline void multiply_features(Shared<T>& shared, const BoltzmannInput& input,
                                         const TileOrigin& tile, Fragments<T>& c) {
  const Operand<T> a = make_operand<T>(input.z_hat, input.rows, input.width);
  const Operand<T> b = make_operand<T>(input.z, input.columns, input.width);
  multiply<T, true, true>(shared.stages, a, tile.row, b, tile.column, input.width, c);
}

// ---- Sums over a tile ---------------------------------------------------------------------------

// Combines `values` over the lanes that differ in the bits kFirst, 2 kFirst, ... < kEnd. Each time
// lanes exchange halves, so that a lane ends with values [0, kCount >> bits) of those from its
// result on; the fewest shuffles there can be.
template <class How, int kFirst, int kEnd, int kCount, class A>
__device__ inline int fold_lanes(A (&values)[kCount], int lane) {
  int begin = 0, half = kCount / 2;
#pragma unroll
  for (int bit = kFirst; bit < kEnd; bit *= 2, half /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i < half) {
        const A kept = upper ? values[half + i] : values[i];
        const A given = upper ? values[i] : values[half + i];
        values[i] = How::combine(kept, __shfl_xor_sync(0xffffffffu, given, bit));
      }
    }
    if (upper) begin += half;
  }
  return begin;
}

// What an element adds to its row and to its column.
template <class A>
struct Pair {
  A row, column;
};

// Folds value(c, i, j) of all elements over rows and over columns of the warp's part of the tile,
// to `shared`.
template <class How, class T, class Value>
__device__ inline void fold_warp(Fragments<T>& c, const Value& value, VectorsOf<T>& shared,
                                 bool rows, bool columns) {
  using A = Accumulator<T>;
  constexpr int kLaneRows = Shape<T>::kLaneRows, kLaneColumns = Shape<T>::kLaneColumns;
  const Place<T> place;
  A row_folds[kLaneRows], column_folds[kLaneColumns];
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) row_folds[r] = How::template none<A>();
#pragma unroll
  for (int s = 0; s < kLaneColumns; ++s) {
    column_folds[s] = How::template none<A>();
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const Pair<A> both = value(c(r, s), place.row(r), place.column(s));
      row_folds[r] = How::combine(row_folds[r], both.row);
      column_folds[s] = How::combine(column_folds[s], both.column);
    }
  }
  if (rows) {
    const int begin = fold_lanes<How, 1, 4>(row_folds, place.lane);
#pragma unroll
    for (int i = 0; i < kLaneRows / 4; ++i) {
      shared.row_folds[place.across][place.row(begin + i)] = row_folds[i];
    }
  }
  if (columns) {
    const int begin = fold_lanes<How, 4, 32>(column_folds, place.lane);
#pragma unroll
    for (int i = 0; i < kLaneColumns / 8; ++i) {
      shared.column_folds[place.down][place.column(begin + i)] = column_folds[i];
    }
  }
}

// to[i] = the fold over the warps of folds[.][i], and of what was there unless `first`; nothing
// where `to` is null.
template <class How, class A, int kWarps, int kSize>
__device__ inline void combine_warps(const A (&folds)[kWarps][kSize], A* to, bool first) {
  if (!to) return;
  for (int i = threadIdx.x; i < kSize; i += blockDim.x) {
    A fold = folds[0][i];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) fold = How::combine(fold, folds[warp][i]);
    to[i] = first ? fold : How::combine(to[i], fold);
  }
}

// Where a tile adds to the sums of its rows or columns; a null pointer where nobody asks for them.
template <class A>
struct Line {
  A* to;
  bool first = true;  // of the tiles that add there
};

// Folds value(c, i, j) of all elements over rows and over columns of the tile.
template <class How, class T, class Value>
__device__ inline void fold_tile(Fragments<T>& c, const Value& value, VectorsOf<T>& shared,
                                 const Line<Accumulator<T>>& rows,
                                 const Line<Accumulator<T>>& columns) {
  fold_warp<How>(c, value, shared, rows.to, columns.to);
  __syncthreads();
  combine_warps<How>(shared.row_folds, rows.to, rows.first);
  combine_warps<How>(shared.column_folds, columns.to, columns.first);
  __syncthreads();  // the folds may be written again
}

}  // namespace m3i::boltzmann
