// add_layer_norm: a residual sum with its layer norm, and their gradients, in a pass each.
#pragma once

#include "add_layer_norm/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// The number of partial sums. It depends on the sizes alone, and so does the order of additions.
int64_t add_layer_norm_num_partials(int64_t rows, DType stream);

// Each launches one kernel; all arrays are on the stream's device. There is at least one row.

cudaError_t launch_add_layer_norm(const AddLayerNormParams& params, cudaStream_t stream);

cudaError_t launch_add_layer_norm_bwd(const AddLayerNormBwdParams& params, cudaStream_t stream);

cudaError_t launch_add_layer_norm_affine(const AddLayerNormAffineParams& params,
                                         cudaStream_t stream);

}  // namespace m3i
