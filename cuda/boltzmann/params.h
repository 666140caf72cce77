// boltzmann: parameters of the CPU kernels, the launchers and the device code.
//
// C = z_hat z^T [N, M] are the dot products, Z = scale C + bias the logits; neither is stored as an
// array. Row i and column j are a positive pair where row_ids[i] equals the column's id, which is
// col_ids[j], or j without col_ids. A row of id -1 is ignored: it is a candidate of no column and
// adds to no sum. A column is ignored by a bias of -inf; its id is negative and equals no row's.
//
// E = exp(Z - shift). With one common shift, somewhat below the largest possible logit, the softmax
// over rows and that over columns share one exponential, and sums are plain additions. Where such
// sums vanish, `exact` shifts (the maximum of each row and column) are used, at two exponentials an
// element. Logits minus shift are at most 88.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Sums per row (or column), over the candidates that are
enum BoltzmannSum {
  kNegatives,  // no positives: sum of E; for the sigmoid of softplus(Z), positives softplus(-Z)
  kPositives,  // positives: sum of E
  kPositiveLogits,  // positives: sum of Z
  kCount,           // positives: their number
  kNumSums
};

// Weights per row (or column): G = E * w on negatives, E * w - t on positives.
enum BoltzmannWeight {
  kNegativeWeight,  // w of negatives
  kPositiveWeight,  // w of positives
  kTarget,          // t
  kNumWeights
};

// All arrays are contiguous and row-major. "Wide" elements are float64 for float64 inputs, else
// float32. N and M are below 2^31, N * M may be larger.
struct BoltzmannInput {
  DType dtype;             // of z_hat and z
  int64_t rows;            // N
  int64_t columns;         // M
  int64_t width;           // D
  const void* z_hat;       // [N, D]
  const void* z;           // [M, D]
  const void* scale;       // [] wide
  const void* bias;        // [M] wide
  const int32_t* row_ids;  // [N]
  const int32_t* col_ids;  // [M] or null
  const bool* run;         // [] or null: if it points to false the kernels return at once
};

// Shifts, which are subtracted from the logits. All entries are equal unless `exact` is set.
struct BoltzmannShift {
  const void* rows;     // [N] wide
  const void* columns;  // [M] wide
};

struct BoltzmannMaximaParams {
  BoltzmannInput input;
  void* row_max;  // [N] wide: largest logit of the row, -inf without candidates
  void* col_max;  // [M] wide: likewise of the column, over the rows that are not ignored
};

struct BoltzmannSumsParams {
  BoltzmannInput input;
  BoltzmannShift shift;
  bool exact;
  bool sigmoid;
  void* rows;     // [kNumSums, N] wide; with sigmoid kPositives and kPositiveLogits are 0
  void* columns;  // [kNumSums, M] wide, or null where not needed
};

// Gradients of the sum of G * Z at constant G; the caller multiplies by the remaining factors.
struct BoltzmannGradsParams {
  BoltzmannInput input;
  BoltzmannShift shift;
  const bool* exact;        // []
  bool sigmoid;             // G = sigmoid(Z) on negatives, -sigmoid(-Z) on positives
  const void* row_weights;  // [kNumWeights, N] wide; not read for the sigmoid
  const void* col_weights;  // [kNumWeights, M] wide; G is the sum of both parts
  void* grad_z_hat;         // [N, D] wide: G z, or null
  void* grad_z;             // [M, D] wide: G^T z_hat, or null
  void* grad_scale;         // [] wide: sum of G * C
  void* grad_bias;          // [M] wide: sum of G over rows, or null
  void* values;             // [N] wide: the rows' sums kNegatives of the sigmoid, else null
};

}  // namespace m3i
