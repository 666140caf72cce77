// boltzmann: CPU kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define M3I_VECTOR_BYTES 32

#include "boltzmann/cpu/kernels.h"

namespace m3i {

const BoltzmannCpuKernels<float> kBoltzmannAvx2Float = kBoltzmannKernels<float>;
const BoltzmannCpuKernels<double> kBoltzmannAvx2Double = kBoltzmannKernels<double>;

}  // namespace m3i

#endif  // __x86_64__
