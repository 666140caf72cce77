// views: CPU kernels for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#define M3I_VECTOR_BYTES 64

#include "views/cpu/kernels.h"

namespace m3i {

const ViewsCpuKernels kViewsAvx512 = kViewsKernels;

}  // namespace m3i

#endif  // __x86_64__
