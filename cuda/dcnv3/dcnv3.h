// dcnv3: launchers.
#pragma once

#include "dcnv3/dcnv3_params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Queues the kernel; all arrays lie on the stream's device.
cudaError_t launch_dcnv3(const Dcnv3Params& params, cudaStream_t stream);

}  // namespace m3i
