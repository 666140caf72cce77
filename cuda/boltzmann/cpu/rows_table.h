// boltzmann_rows_pass on the CPU: the table of kernels of one instruction set.
#pragma once

#include "boltzmann/rows/params.h"

namespace m3i {

// [begin, end) are rows of the block.
struct BoltzmannRowsKernels {
  void (*classes)(const BoltzmannRowsParams& params, int64_t begin, int64_t end);
  void (*soft)(const BoltzmannRowsParams& params, int64_t begin, int64_t end);
};

// By the wide type.
struct BoltzmannRowsTable {
  BoltzmannRowsKernels of_float, of_double;
};

extern const BoltzmannRowsTable kBoltzmannRowsBaseline;
#if defined(__x86_64__)
extern const BoltzmannRowsTable kBoltzmannRowsAvx2;
extern const BoltzmannRowsTable kBoltzmannRowsAvx512;
#endif

}  // namespace m3i
