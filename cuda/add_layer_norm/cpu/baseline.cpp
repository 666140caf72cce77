// add_layer_norm: CPU kernels for any machine.
#define M3I_VECTOR_BYTES 16

#include "add_layer_norm/cpu/kernels.h"

namespace m3i {

const AddLayerNormCpuKernels kAddLayerNormBaseline = kAddLayerNormKernels;

}  // namespace m3i
