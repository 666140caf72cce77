// dcnv3: launchers.
#pragma once

#include "dcnv3/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Queues the kernel; all arrays lie on the stream's device.
cudaError_t launch_dcnv3(const Dcnv3Params& params, cudaStream_t stream);

// Bytes of memory that the launcher below needs beside the gradients.
int64_t dcnv3_bwd_scratch_bytes(const Dcnv3BwdParams& params, bool deterministic);

// Queues the kernels; `scratch` is aligned to 16 bytes and lies on the stream's device too.
// `deterministic`: the same bits at every run, otherwise the gradient by x depends on the order in
// which the GPU adds.
cudaError_t launch_dcnv3_bwd(const Dcnv3BwdParams& params, void* scratch, bool deterministic,
                             cudaStream_t stream);

}  // namespace m3i
