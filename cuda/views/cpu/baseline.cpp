// views: CPU kernels for any machine, and the choice among all.
#define M3I_VECTOR_BYTES 16

#include "m3i/cpu/isa.h"
#include "views/cpu/kernels.h"

namespace m3i {

const ViewsCpuKernels kViewsBaseline = kViewsKernels;

const ViewsCpuKernels& fastest_views_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kViewsAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kViewsAvx2;
#endif
  return kViewsBaseline;
}

}  // namespace m3i
