// boltzmann on the CPU: the table of kernels of one instruction set.
//
// A kernel works on some rows of a tile of dot products in wide elements (A: float or double).
// Arrays over the tile's columns are padded to whole vectors, with biases of -inf: padding adds
// nothing to any sum, and no load needs a mask.
#pragma once

#include "boltzmann/params.h"

namespace m3i {

// Columns of a tile are padded to a multiple of this.
inline constexpr int64_t kBoltzmannPadding = 16;

template <class A>
struct BoltzmannTile {
  A* products;        // [rows, stride] C; overwritten by G where gradients are computed
  int64_t stride;     // columns with padding
  int64_t first_row;  // of all rows, the tile's first
  int64_t num_rows;   // N, the stride of the arrays over rows
  A scale;
  const int32_t* row_ids;    // [rows]
  const A* row_shift;        // [rows]
  const A* row_weights;      // [kNumWeights, N], from the tile's first row
  const A* bias;             // [stride]
  const int32_t* col_ids;    // [stride]
  int32_t first_id, end_id;  // the ids of the columns are in [first, end), or
  bool any_id;               // ... anything
  const A* col_shift;        // [stride]
  const A* col_weights;      // [kNumWeights, stride]
};

// [begin, end) are rows of the tile. Results by row are accumulated (by addition, or the maximum);
// results by column are those of these rows alone, and overwritten.
template <class A>
struct BoltzmannCpuKernels {
  void (*maxima)(const BoltzmannTile<A>& tile, int64_t begin, int64_t end,
                 A* row_max,   // [rows]
                 A* col_max);  // [stride]
  void (*sums)(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, bool exact, bool sigmoid,
               A* rows,      // [kNumSums, N], from the tile's first row
               A* columns);  // [kNumSums, stride]
  // grad_scale is the sum of G * C over these rows.
  void (*grads)(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, bool exact, bool sigmoid,
                double* grad_scale,
                A* grad_bias,  // [stride]
                A* values);    // [rows], with sigmoid
  // Widens `count` elements of dtype.
  void (*widen)(DType dtype, const void* from, int64_t count, A* to);
  // The square of the length of `count` elements of dtype.
  A (*square_length)(DType dtype, const void* from, int64_t count);
  // Rounds `count` elements times a factor.
  void (*scale)(DType from_dtype, const void* from, A factor, int64_t count, DType to_dtype,
                void* to);
};

extern const BoltzmannCpuKernels<float> kBoltzmannBaselineFloat;
extern const BoltzmannCpuKernels<double> kBoltzmannBaselineDouble;
#if defined(__x86_64__)
extern const BoltzmannCpuKernels<float> kBoltzmannAvx2Float;
extern const BoltzmannCpuKernels<double> kBoltzmannAvx2Double;
extern const BoltzmannCpuKernels<float> kBoltzmannAvx512Float;
extern const BoltzmannCpuKernels<double> kBoltzmannAvx512Double;
#endif

}  // namespace m3i
