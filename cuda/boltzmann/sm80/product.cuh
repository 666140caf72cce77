// boltzmann: a tile of a product of two matrices. Device code only.
//
// Operands come in three stages by cp.async, 16 bytes a copy; where rows do not start at multiples
// of 16 bytes, element by element instead. A warp holds its part of the sums in the fragments of
// mma.sync (m3i/gpu/mma.cuh), whatever the type:
//   bfloat16, half   one product of the tensor cores, by ldmatrix, transposed or not
//   float32          three products in tf32, of the operands' upper and lower halves: what is left
//                    out is 2^-22 of each term
//   float64          no tensor cores: each lane adds up its own four elements
#pragma once

#include "boltzmann/tiling.h"
#include "m3i/gpu/copy_async.cuh"
#include "m3i/gpu/mma.cuh"
#include "m3i/numbers/fast_math.cuh"
#include "m3i/numbers/vec.cuh"

namespace m3i::boltzmann {

// The constants of T's tiles.
template <class T>
struct Shape {
  static constexpr Tile kTile = tile_of(kDType<T>);
  static constexpr int kRows = kTile.rows, kColumns = kTile.columns, kDepth = kTile.depth;
  static constexpr int kThreads = threads_of(kTile);
  static constexpr int kWarpRows = kRows / kTile.warps_down;
  static constexpr int kWarpColumns = kColumns / kTile.warps_across;
  // Rows and columns of a lane
  static constexpr int kLaneRows = kWarpRows / 8, kLaneColumns = kWarpColumns / 4;
};

// A lane's part of a tile. Slots of rows and columns: see Place.
template <class T>
struct Fragments {
  Accumulator<T> at[Shape<T>::kLaneRows / 2][Shape<T>::kLaneColumns / 2][4];

  __device__ Accumulator<T>& operator()(int row_slot, int column_slot) {
    return at[row_slot / 2][column_slot / 2][row_slot % 2 * 2 + column_slot % 2];
  }
};

// Where in the tile the calling lane's elements are.
template <class T>
struct Place {
  int lane = threadIdx.x % kWarpLanes;
  int down = threadIdx.x / kWarpLanes / Shape<T>::kTile.warps_across;  // the warp's place
  int across = threadIdx.x / kWarpLanes % Shape<T>::kTile.warps_across;

  __device__ int row(int slot) const {
    return down * Shape<T>::kWarpRows + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
  }
  __device__ int column(int slot) const {
    return across * Shape<T>::kWarpColumns + slot / 2 * 8 + lane % 4 * 2 + slot % 2;
  }
};

// ---- Operands -----------------------------------------------------------------------------------

template <class T>
struct Operand {
  const T* from;
  int64_t pitch;          // elements from row to row
  int64_t rows, columns;  // beyond them are zeros
  bool aligned;           // rows start at multiples of 16 bytes, and end there
};

template <class T>
__device__ inline Operand<T> make_operand(const void* from, int64_t rows, int64_t columns) {
  const uint64_t starts = reinterpret_cast<uint64_t>(from) | columns * sizeof(T);
  return {static_cast<const T*>(from), columns, rows, columns, starts % kAccessBytes == 0};
}

// An operand's tile in shared memory. kAlong: its rows run along the axis that is summed over, so
// the tile is kSide rows of kDepth; otherwise it is kDepth rows of kSide.
template <class T, int kSide, bool kAlong>
struct Layout {
  static constexpr Tile kTile = Shape<T>::kTile;
  static constexpr bool kIsAlong = kAlong;
  static constexpr int kRows = kAlong ? kSide : kTile.depth;
  static constexpr int kColumns = kAlong ? kTile.depth : kSide;
  static constexpr int kPitch = kAlong ? pitch_along(kTile) : pitch_across(kSide);

  // `side` counts rows (of A) or columns (of B) of the product.
  __device__ static constexpr int at(int side, int depth) {
    return kAlong ? side * kPitch + depth : depth * kPitch + side;
  }
};

template <class T>
struct Stage {
  T a[operand_elements(Shape<T>::kTile, Shape<T>::kRows)];
  T b[operand_elements(Shape<T>::kTile, Shape<T>::kColumns)];
};

// The tile from row or column `side` of the product on, and `depth` on the axis summed over.
template <class T, int kSide, bool kAlong>
__device__ inline void copy_operand(T* tile, const Operand<T>& matrix, int64_t side,
                                    int64_t depth) {
  using To = Layout<T, kSide, kAlong>;
  constexpr int kThreads = Shape<T>::kThreads;
  const int64_t row = kAlong ? side : depth, column = kAlong ? depth : side;
  const T* corner = matrix.from + row * matrix.pitch + column;
  const int64_t rows = matrix.rows - row, columns = matrix.columns - column;  // from there on
  if (matrix.aligned) {
    constexpr int kChunk = kAccessBytes / static_cast<int>(sizeof(T));
    constexpr int kChunks = To::kColumns / kChunk, kCopies = To::kRows * kChunks / kThreads;
    static_assert(kCopies * kThreads == To::kRows * kChunks, "all threads copy as much");
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int i = n * kThreads + static_cast<int>(threadIdx.x);
      const int y = i / kChunks, x = i % kChunks * kChunk;
      const bool inside = y < rows && x < columns;
      copy_async<kAccessBytes>(tile + y * To::kPitch + x,
                               inside ? corner + y * matrix.pitch + x : matrix.from, inside);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < To::kRows * To::kColumns; i += kThreads) {
      const int y = i / To::kColumns, x = i % To::kColumns;
      const bool inside = y < rows && x < columns;
      tile[y * To::kPitch + x] = inside ? load<1>(corner + y * matrix.pitch + x).at[0] : T{};
    }
  }
}

// ---- Products of the fragments ------------------------------------------------------------------

__device__ inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                           const uint32_t (&b)[2]) {
  mma_bf16(d, a, b);
}
__device__ inline void mma(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_f16(d, a, b);
}

// 16-bit types: 16 terms of the dot products, from the warp's corners of both tiles on.
template <class A, class B, class T>
__device__ inline void multiply_terms(const T* a, const T* b, int lane, Fragments<T>& sum) {
  constexpr int kDown = Shape<T>::kWarpRows / 16, kAcross = Shape<T>::kWarpColumns / 16;
  const int matrix = lane / 8, line = lane % 8;  // that the lane's address is for
  uint32_t rows[kDown][4];
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    const int side = 16 * i + matrix % 2 * 8, depth = matrix / 2 * 8;
    load_matrices<4, !A::kIsAlong>(
        rows[i], a + (A::kIsAlong ? A::at(side + line, depth) : A::at(side, depth + line)));
  }
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    const int side = 16 * j + matrix / 2 * 8, depth = matrix % 2 * 8;
    uint32_t columns[4];
    load_matrices<4, !B::kIsAlong>(
        columns, b + (B::kIsAlong ? B::at(side + line, depth) : B::at(side, depth + line)));
    const uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      mma(T{}, sum.at[i][2 * j], rows[i], left);
      mma(T{}, sum.at[i][2 * j + 1], rows[i], right);
    }
  }
}

// A float32 as the sum of two tf32 numbers.
__device__ inline void split(float value, uint32_t& upper, uint32_t& lower) {
  upper = round_to_tf32(value);
  lower = round_to_tf32(value - __uint_as_float(upper));
}

// float32: 8 terms.
template <class A, class B>
__device__ inline void multiply_terms(const float* a, const float* b, int lane,
                                      Fragments<float>& sum) {
  constexpr int kDown = Shape<float>::kWarpRows / 16, kAcross = Shape<float>::kWarpColumns / 8;
  const int g = lane / 4, t = lane % 4;
  uint32_t upper_rows[kDown][4], lower_rows[kDown][4];
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      split(a[A::at(16 * i + e % 2 * 8 + g, e / 2 * 4 + t)], upper_rows[i][e], lower_rows[i][e]);
    }
  }
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    uint32_t upper[2], lower[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) split(b[B::at(8 * j + g, 4 * e + t)], upper[e], lower[e]);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {  // the small ones first
      mma_tf32(sum.at[i][j], lower_rows[i], upper);
      mma_tf32(sum.at[i][j], upper_rows[i], lower);
      mma_tf32(sum.at[i][j], upper_rows[i], upper);
    }
  }
}

// float64: 1 term.
template <class A, class B>
__device__ inline void multiply_terms(const double* a, const double* b, int lane,
                                      Fragments<double>& sum) {
  constexpr int kDown = Shape<double>::kLaneRows, kAcross = Shape<double>::kLaneColumns;
  double rows[kDown];
#pragma unroll
  for (int i = 0; i < kDown; ++i) rows[i] = a[A::at(i * 8 + lane / 4, 0)];
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    const double column = b[B::at(j / 2 * 8 + lane % 4 * 2 + j % 2, 0)];
#pragma unroll
    for (int i = 0; i < kDown; ++i) sum(i, j) = fma(rows[i], column, sum(i, j));
  }
}

// Terms of one call of multiply_terms.
template <class T>
inline constexpr int kTerms = sizeof(T) == 2   ? 16
                              : sizeof(T) == 4 ? 8
                                               : 1;

// ---- The tile -----------------------------------------------------------------------------------

// sum += A B of `depth` terms; A from its row `row` on, B from its column `column` on. Afterwards
// all threads have seen what any wrote to shared memory before.
template <class T, bool kAlongA, bool kAlongB>
__device__ inline void multiply(Stage<T>* stages, const Operand<T>& a, int64_t row,
                                const Operand<T>& b, int64_t column, int64_t depth,
                                Fragments<T>& sum) {
  using S = Shape<T>;
  using A = Layout<T, S::kRows, kAlongA>;
  using B = Layout<T, S::kColumns, kAlongB>;
  constexpr int kStages = S::kTile.stages;
  const Place<T> place;
  const int steps = static_cast<int>(divide_up(depth, S::kDepth));
  const auto copy = [&](int step) {
    if (step < steps) {
      Stage<T>& stage = stages[step % kStages];
      copy_operand<T, S::kRows, kAlongA>(stage.a, a, row, int64_t{step} * S::kDepth);
      copy_operand<T, S::kColumns, kAlongB>(stage.b, b, column, int64_t{step} * S::kDepth);
    }
    copy_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the step's operands are there, and the stage that is copied to was read
    copy(step + kStages - 1);
    const Stage<T>& stage = stages[step % kStages];
#pragma unroll
    for (int term = 0; term < S::kDepth; term += kTerms<T>) {
      multiply_terms<A, B>(stage.a + A::at(place.down * S::kWarpRows, term),
                           stage.b + B::at(place.across * S::kWarpColumns, term), place.lane, sum);
    }
  }
  __syncthreads();
}

}  // namespace m3i::boltzmann
