// boltzmann_rows_pass: CPU kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define M3I_VECTOR_BYTES 32

#include "boltzmann/cpu/rows_kernels.h"

namespace m3i {

const BoltzmannRowsTable kBoltzmannRowsAvx2{kRowsKernels<float>, kRowsKernels<double>};

}  // namespace m3i

#endif  // __x86_64__
