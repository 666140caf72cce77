// dcnv3: CPU kernels for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#define M3I_VECTOR_BYTES 64

#include "dcnv3/cpu/kernels.h"

namespace m3i {

const Dcnv3CpuKernels kDcnv3Avx512 = kDcnv3Kernels;

}  // namespace m3i

#endif  // __x86_64__
