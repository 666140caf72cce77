// views: CPU kernels for any machine.
#include "views/cpu/kernels.h"

namespace m3i {

const ViewsCpuKernels kViewsBaseline = {&make_view};

const ViewsCpuKernels& fastest_views_kernels() { return kViewsBaseline; }

}  // namespace m3i
