// add_layer_norm: CPU kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define M3I_VECTOR_BYTES 32

#include "add_layer_norm/cpu/kernels.h"

namespace m3i {

const AddLayerNormCpuKernels kAddLayerNormAvx2 = kAddLayerNormKernels;

}  // namespace m3i

#endif  // __x86_64__
