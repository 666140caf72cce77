// views: all views of a batch of decoded pictures, in one launch.
#pragma once

#include "views/launch_params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Fills num_views, targets and shared_bytes; num_samples is there already. out[v]: [B, 3, S, S] of
// geometry[v], which is square, for v in [0, num_views). Returns the bytes of scratch memory that
// the launch needs: 0 but for views so large that their blur does not fit shared memory, with a
// kernel of a tenth of the side from 330 pixels on.
int64_t plan_views(const ViewGeometry* geometry, int num_views, uint8_t* const* out,
                   ViewsCudaParams& params);

// The same for views that are cut to grids of patches: out[v] has room for lengths[v] of them, up
// to 2^31 - 1. Of the geometry only the filters count: the grids are on the device. A view that is
// blurred stands in scratch memory before, whatever its size, which the host does not know.
int64_t plan_patches(const ViewGeometry* geometry, int num_views, const int64_t* lengths,
                     int patch_size, uint8_t* const* out, ViewsCudaParams& params);

// Launches one kernel, and nothing else: of squares, or of patches where there are grids. What the
// host cannot see without waiting for the device stops the kernel by a trap, which loses the CUDA
// context as a failed device assertion does: a picture outside of pixels, a crop outside of its
// picture, an order that is none, a grid without patches or with more than there is room for.
cudaError_t launch_views(const ViewsCudaParams& params, cudaStream_t stream);

}  // namespace m3i
