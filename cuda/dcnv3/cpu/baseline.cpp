// dcnv3: CPU kernels for any machine.
#define M3I_VECTOR_BYTES 16

// Four float64 fill two registers, and how those are passed between functions depends on the
// target. No function here is called from another source.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "dcnv3/cpu/kernels.h"

namespace m3i {

const Dcnv3CpuKernels kDcnv3Baseline = kDcnv3Kernels;

}  // namespace m3i
