// dcnv3: CPU kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define M3I_VECTOR_BYTES 32

#include "dcnv3/cpu/kernels.h"

namespace m3i {

const Dcnv3CpuKernels kDcnv3Avx2 = kDcnv3Kernels;

}  // namespace m3i

#endif  // __x86_64__
