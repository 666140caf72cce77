// boltzmann: launchers.
#pragma once

#include "boltzmann/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Bytes of scratch memory that the launchers below need; they depend on the current device.
int64_t boltzmann_scratch_bytes(const BoltzmannMaximaParams& params);
int64_t boltzmann_scratch_bytes(const BoltzmannSumsParams& params);
int64_t boltzmann_scratch_bytes(const BoltzmannGradsParams& params);

// Launch the kernels without a host synchronisation. All arrays and `scratch`, aligned to 16 bytes,
// are on the stream's device, which is the current one.
cudaError_t launch_boltzmann(const BoltzmannMaximaParams& params, void* scratch,
                             cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannSumsParams& params, void* scratch, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannGradsParams& params, void* scratch,
                             cudaStream_t stream);

}  // namespace m3i
