// gaussian: CPU kernels for any machine.
#define M3I_VECTOR_BYTES 16

#include "gaussian/cpu/kernels.h"

namespace m3i {

const GaussianCpuKernels kGaussianBaseline = kGaussianKernels;

}  // namespace m3i
