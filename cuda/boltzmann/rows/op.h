// boltzmann_rows_pass: launcher.
#pragma once

#include "boltzmann/rows/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Launches the kernel without a host synchronisation. All arrays are on the stream's device, which
// is the current one; matrices are aligned to 16 bytes.
cudaError_t launch_boltzmann_rows(const BoltzmannRowsParams& params, cudaStream_t stream);

}  // namespace m3i
