// mask_mix: uint8 pictures mixed cell by cell and normalised, in one pass over memory.
#pragma once

#include "mask_mix/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Launches the kernel; all arrays are on the stream's device.
cudaError_t launch_mask_mix(const MaskMixParams& params, cudaStream_t stream);

}  // namespace m3i
