// boltzmann on vectors: launchers, each of one kernel unless it says otherwise, without a host
// synchronisation. All arrays are on the stream's device, which is the current one.
#pragma once

#include "boltzmann/vectors/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// With col_ids beside a memset and two kernels; `scratch`, aligned to 16 bytes, holds their table.
int64_t boltzmann_scratch_bytes(const BoltzmannPrepareParams& params);
cudaError_t launch_boltzmann(const BoltzmannPrepareParams& params, void* scratch,
                             cudaStream_t stream);

cudaError_t launch_boltzmann(const BoltzmannShiftParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannExactParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannExactShiftParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannTotalsParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannLossParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannSigmoidLossParams& params, cudaStream_t stream);
cudaError_t launch_boltzmann(const BoltzmannScaleParams& params, cudaStream_t stream);

}  // namespace m3i
