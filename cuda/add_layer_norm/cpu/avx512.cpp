// add_layer_norm: CPU kernels for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#define M3I_VECTOR_BYTES 64

#include "add_layer_norm/cpu/kernels.h"

namespace m3i {

const AddLayerNormCpuKernels kAddLayerNormAvx512 = kAddLayerNormKernels;

}  // namespace m3i

#endif  // __x86_64__
