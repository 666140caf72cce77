// boltzmann_rows_pass: parameters of the CPU kernels, the launcher and the device code.
//
// A block of rows has all of its columns: the dot products C [R, M] of R rows of z_hat are made by
// torch's GEMM. The kernel overwrites them by G, the gradient of each row's loss by its logits
// Z = scale C + bias, which torch's GEMM multiplies by the features. A row's sums are complete when
// its gradient is computed, so that its own largest logit is the shift: nothing overflows.
//
// P = softmax(Z). The targets T of a row are one column, its class, or a softmax of a second pair
// of features, T = softmax(Z'), Z' = scale' C' + bias'. The loss is sum_j T_j (log sum_k exp Z_k -
// Z_j) and G = P - T, times the row's weight.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Logits of a block: scale C + bias.
struct BoltzmannLogits {
  void* products;     // [rows, stride] wide: C
  const void* scale;  // [] wide
  const void* bias;   // [columns] wide, or null
};

// "Wide" elements are float64 where G is, else float32.
struct BoltzmannRowsParams {
  DType dtype;  // of the features, by which G is multiplied
  int64_t rows;
  int64_t columns;
  int64_t stride;  // of the products' rows, and of G's: a multiple of kBoltzmannRowsPadding
  BoltzmannLogits logits;
  BoltzmannLogits targets;  // soft targets; products are null where rows have classes
  const int32_t* row_ids;   // [rows] classes, -1: the row is ignored; null with soft targets
  const void* row_weights;  // [rows] wide, or null: 1
  void* nll;                // [rows] wide: the row's loss, times its weight
  void* scale_grads;        // [rows] wide: sum of G C, or null where no gradient is needed
  void* rounded;            // [rows, stride] dtype: G rounded, or null; on CUDA, of half types
  bool writes_products;     // G overwrites C
};

// Rows of a block are padded to a multiple of so many elements; padding holds anything.
inline constexpr int64_t kBoltzmannRowsPadding = 16;

}  // namespace m3i
