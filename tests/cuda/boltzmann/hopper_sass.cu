// boltzmann's kernels by warpgroups, of the training's type, for a disassembler.
#include "boltzmann/sm90/grads.cuh"

namespace m3i::boltzmann {

template __global__ void boltzmann_sums_hopper_kernel<BFloat16>(BoltzmannSumsParams, Blocks,
                                                                LineSums,
                                                                const __grid_constant__ TensorMap,
                                                                const __grid_constant__ TensorMap);
template __global__ void boltzmann_grads_hopper_kernel<BFloat16, false>(
    BoltzmannGradsParams, Blocks, HopperGradsMemory, const __grid_constant__ TensorMap,
    const __grid_constant__ TensorMap, const __grid_constant__ TensorMap);

}  // namespace m3i::boltzmann
