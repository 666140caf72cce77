// boltzmann's kernels of the training's type and the one of float32 products, for a disassembler.
#include "boltzmann/kernels.cuh"

namespace m3i::boltzmann {

template __global__ void boltzmann_maxima_kernel<BFloat16>(BoltzmannMaximaParams, Blocks, Partials);
template __global__ void boltzmann_sums_kernel<BFloat16, SumsMode::kShared>(BoltzmannSumsParams,
                                                                            Blocks, Partials);
template __global__ void boltzmann_logit_grads_kernel<BFloat16, false>(BoltzmannGradsParams, Block,
                                                                       GradsScratch);
template __global__ void boltzmann_feature_grads_kernel<BFloat16>(BoltzmannGradsParams, Block,
                                                                  const void*);
template __global__ void boltzmann_feature_grads_kernel<float>(BoltzmannGradsParams, Block,
                                                               const void*);

}  // namespace m3i::boltzmann
