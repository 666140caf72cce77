// gaussian: the distance of predictions to normalised targets and its gradient, each in one pass.
#pragma once

#include "gaussian/params.h"

#include <cuda_runtime_api.h>

namespace m3i {

// Numbers of partial sums, one a block. They depend on the sizes alone, and so does the order of
// all additions.
int64_t gaussian_num_distances(int64_t rows);
int64_t gaussian_num_products(int64_t size);

// Each launches one kernel; all arrays are on the stream's device. There is at least one row.

// `distances`: [gaussian_num_distances] A, sums of (t - p)^2.
cudaError_t launch_gaussian(const GaussianParams& params, void* distances, cudaStream_t stream);

// `products`: [gaussian_num_products] A, sums of C * (p^T p).
cudaError_t launch_gaussian_product(const GaussianProductParams& params, void* products,
                                    cudaStream_t stream);

cudaError_t launch_gaussian_value(const GaussianValueParams& params, cudaStream_t stream);

cudaError_t launch_gaussian_bwd(const GaussianBwdParams& params, cudaStream_t stream);

}  // namespace m3i
