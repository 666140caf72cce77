// boltzmann_rows_pass: CPU kernels for any machine.
#define M3I_VECTOR_BYTES 16

// Four float64 fill two registers, and how those are passed between functions depends on the
// target. No function here is called from another source.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "boltzmann/cpu/rows_kernels.h"

namespace m3i {

const BoltzmannRowsTable kBoltzmannRowsBaseline{kRowsKernels<float>, kRowsKernels<double>};

}  // namespace m3i
