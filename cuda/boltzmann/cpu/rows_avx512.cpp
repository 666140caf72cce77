// boltzmann_rows_pass: CPU kernels for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#define M3I_VECTOR_BYTES 64

#include "boltzmann/cpu/rows_kernels.h"

namespace m3i {

const BoltzmannRowsTable kBoltzmannRowsAvx512{kRowsKernels<float>, kRowsKernels<double>};

}  // namespace m3i

#endif  // __x86_64__
