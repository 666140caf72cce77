// views: CPU kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define M3I_VECTOR_BYTES 32

#include "views/cpu/kernels.h"

namespace m3i {

const ViewsCpuKernels kViewsAvx2 = kViewsKernels;

}  // namespace m3i

#endif  // __x86_64__
