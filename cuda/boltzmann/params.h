// boltzmann: parameters, as the CPU kernels, the launchers and the device code all read them.
//
// C = z_hat z^T [N, M] are the dot products, Z = scale C + bias the logits; neither exists as an
// array. Row i and column j are a positive pair where row_ids[i] equals the column's id, which is
// col_ids[j], or j without col_ids. A row of id -1 is ignored: it is no candidate of any column and
// adds nothing. A column is ignored by a bias of -inf; its id is negative and equals no row's.
//
// E = exp(Z - shift). With one shift for all, somewhat below the largest possible logit, one
// exponential serves the softmax over a row and that over a column, and sums are plain additions.
// Where such sums vanish, `exact` shifts (the maximum of each row and column) take their place, at
// two exponentials an element. Logits minus shift are at most 88.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Per row (or column), of the candidates that are
enum BoltzmannSum {
  kNegatives,  // no positives: sum of E; for the sigmoid of softplus(Z), positives softplus(-Z)
  kPositives,  // positives: sum of E
  kPositiveLogits,  // positives: sum of Z
  kCount,           // positives: their number
  kNumSums
};

// Per row (or column): G = E * w on negatives, E * w - t on positives.
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
  const bool* run;         // [] or null: where it points to false nothing is done
};

// What is subtracted from the logits. All entries are the same number unless `exact` is set.
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
  void* columns;  // [kNumSums, M] wide, or null where not asked for
};

// Gradients of sum of G * Z at constant G; the caller multiplies by what is left.
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
