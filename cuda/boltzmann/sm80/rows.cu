// boltzmann_rows_pass: launcher.
#include "boltzmann/rows/op.h"
#include "boltzmann/sm80/rows.cuh"
#include "m3i/dispatch.h"
#include "m3i/host/launch.h"

namespace m3i {

cudaError_t launch_boltzmann_rows(const BoltzmannRowsParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  return dispatch_dtype<BFloat16, Float16, float, double>(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = params.row_ids ? boltzmann::boltzmann_rows_kernel<T, false>
                                       : boltzmann::boltzmann_rows_kernel<T, true>;
    return launch(kernel, dim3(static_cast<unsigned>(params.rows)), boltzmann::kRowThreads, stream,
                  params);
  });
}

}  // namespace m3i
