// dcnv3: launchers.
#pragma once

#include "dcnv3/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Launches the kernel; all arrays are on the stream's device.
cudaError_t launch_dcnv3(const Dcnv3Params& params, cudaStream_t stream);

// Bytes of scratch memory that the launcher below needs.
int64_t dcnv3_bwd_scratch_bytes(const Dcnv3BwdParams& params, bool deterministic);

// Launches the kernels; all arrays and `scratch`, aligned to 16 bytes, are on the stream's device.
// `deterministic`: the gradient by x has the same bits at every run; otherwise they depend on the
// order of atomic additions.
cudaError_t launch_dcnv3_bwd(const Dcnv3BwdParams& params, void* scratch, bool deterministic,
                             cudaStream_t stream);

}  // namespace m3i
