// boltzmann on vectors of N and M: parameters of the operators before, between and after those that
// work on all pairs (boltzmann/params.h). The same for the CPU and CUDA.
//
// An operator's sums over all rows or columns are left in parts, which the next one adds up in a
// fixed order: results repeat bit for bit, and with several ranks the sums can be all-reduced in
// between. "Wide" elements are float64 for float64 features, else float32.
#pragma once

#include "boltzmann/params.h"

namespace m3i {

// Parts of a sum over N rows and M columns; num_parts in m3i_fast/ops/boltzmann_vectors.py is the
// same.
M3I_HOST_DEVICE constexpr int64_t boltzmann_parts(int64_t rows, int64_t columns) {
  const int64_t parts = (rows + columns + 31) / 32;
  return parts < 1 ? 1 : parts < 256 ? parts : 256;
}

inline constexpr int32_t kIgnoredRow = -1;
inline constexpr int32_t kIgnoredColumn = -2;  // no row's id

// A part's entries, of the rows and columns that are not ignored.
enum BoltzmannExtreme {
  kLongestRow,     // the largest |z_hat|
  kLongestColumn,  // the largest |z|
  kLargestBias,    // the largest |bias|
  kNumRows,        // the number of rows
  kNumExtremes
};

// A part's entries: the sum of the losses, and the number, of rows (columns) with a positive.
enum BoltzmannTotal { kRowLoss, kRowCount, kColumnLoss, kColumnCount, kNumTotals };

// How rows and columns are paired:
//   no row_ids               row i and column first_column + i
//   row_ids alone            row i and column row_ids[i], from 0 to num_columns - 1
//   row_ids and col_ids      rows and columns of equal ids, any numbers
// A row or column of id -1 is ignored.
struct BoltzmannPrepareParams {
  DType dtype;             // of z_hat and z
  int64_t rows;            // N
  int64_t columns;         // M, of this rank
  int64_t width;           // D
  int64_t first_column;    // the place of this rank's first column among all ranks'
  int64_t num_columns;     // of all ranks
  const void* z_hat;       // [N, D]
  const void* z;           // [M, D]
  const void* bias;        // [M] or [] wide, or null: 0
  bool has_bias_each;      // the bias is [M]
  const int64_t* row_ids;  // [N] or null
  const int64_t* col_ids;  // [num_columns] or null
  int32_t* out_row_ids;    // [N]: the first column of the row's id, or num_columns if there is none
  int32_t* out_col_ids;    // [num_columns] likewise, kIgnoredColumn where ignored; with col_ids
  void* out_bias;          // [M] wide, -inf where ignored
  int64_t num_parts;
  void* extremes;  // [num_parts, kNumExtremes] wide
};

struct BoltzmannShiftParams {
  DType wide;
  int64_t num_parts;
  int64_t rows, columns;
  const void* extremes;  // [num_parts, kNumExtremes]
  const void* scale;     // []
  void* row_shift;       // [rows]
  void* col_shift;       // [columns]
  void* bound;           // [] of all logits: |scale| |z_hat| |z| + |bias|
  bool* run;             // []: whether one shift may serve all of them
};

// Sums over rows and columns, in the enum BoltzmannSum's order.
struct BoltzmannSumsOf {
  int64_t rows, columns;
  const void* of_rows;     // [kNumSums, rows]
  const void* of_columns;  // [kNumSums, columns]
};

struct BoltzmannExactParams {
  DType wide;
  BoltzmannSumsOf sums;
  const bool* run;  // []
  bool* exact;      // []: `run` is false, or a sum that the loss divides by is out of range
};

struct BoltzmannExactShiftParams {
  DType wide;
  int64_t rows, columns;
  const void *row_max, *col_max;      // [rows], [columns]; not read where `exact` is false
  const void *row_shift, *col_shift;  // [rows], [columns], returned where it is false
  const bool* exact;                  // []
  void *out_row_shift, *out_col_shift;
};

// What losses are computed from. symmetric: sums over columns exist.
struct BoltzmannLossInput {
  DType wide;
  bool symmetric;
  BoltzmannSumsOf sums;   // by one shift
  bool has_again;         // else they are not needed
  BoltzmannSumsOf again;  // by exact shifts
  const void* row_shift;  // [rows]
  const void* col_shift;  // [columns]
  const bool* exact;      // []: `again` holds
};

struct BoltzmannTotalsParams {
  BoltzmannLossInput input;
  int64_t num_parts;
  void* totals;  // [num_parts, kNumTotals]
};

struct BoltzmannLossParams {
  BoltzmannLossInput input;
  int64_t num_columns;  // of col_weights
  int64_t num_parts;
  const void* totals;  // [num_parts, kNumTotals]
  const void* bound;   // []: where it is not finite the value is NaN
  bool mean;           // else the sum
  int64_t ranks;
  void* value;        // []
  void* share;        // []: a row's weight in the value, times the ranks
  void* num_rows;     // [] with a positive
  void* row_weights;  // [kNumWeights, rows], to be multiplied by the share
  void* col_weights;  // [kNumWeights, num_columns]; 0 unless symmetric
};

struct BoltzmannSigmoidLossParams {
  DType wide;
  int64_t num_values, num_parts;
  const void* values;    // [num_values]
  const void* extremes;  // [num_parts, kNumExtremes]
  const void* bound;     // []
  bool mean;
  int64_t ranks;
  void* value;  // []
  void* share;  // [] times the ranks
};

// factor = grad_out share scale, where share and scale may be null: 1.
struct BoltzmannScaleParams {
  DType wide;
  DType from, to;  // of the gradients by z_hat and z
  int64_t num_z_hat, num_z, num_bias;
  const void *grad_out, *share, *scale;  // []
  const void *z_hat, *z;                 // [num_z_hat], [num_z] `from`
  const void* of_scale;                  // []
  const void* of_bias;                   // [num_bias]
  void* factor;                          // []
  void *out_z_hat, *out_z;               // `to`: times the factor
  void* out_of_scale;                    // [] times grad_out share
  void* out_of_bias;                     // [num_bias] likewise
};

}  // namespace m3i
