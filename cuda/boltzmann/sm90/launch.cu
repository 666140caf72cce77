// boltzmann: launchers of the kernels by warpgroups, on compute capability 9.0.
#include "boltzmann/launch.h"
#include "boltzmann/sm90/grads.cuh"
#include "m3i/host/make_tensor_map.h"

namespace m3i::boltzmann {
namespace {

// Whether the build has code for 90a (CMakeLists.txt).
#if defined(M3I_SM90A) || defined(M3I_EMULATOR)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

bool takes_warpgroups(const BoltzmannInput& input) {
  const auto starts = reinterpret_cast<uint64_t>(input.z_hat) | reinterpret_cast<uint64_t>(input.z);
  return kHasWgmma && boltzmann::takes_warpgroups(architecture(), input.dtype, input.rows,
                                                  input.columns, input.width, starts);
}

unsigned num_blocks(int64_t tiles) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  return static_cast<unsigned>(persistent_clusters(tiles, multiprocessors)) * kClusterBlocks;
}

// Boxes of 64 x 64 of a matrix of 16-bit elements.
cudaError_t make_map(TensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns) {
  return make_tensor_map(
      map, {dtype, base, rows, columns, columns * 2, kBoxSide, kBoxSide, Swizzle::k128});
}

struct FeatureMaps {
  TensorMap z_hat, z;
};

cudaError_t make_maps(FeatureMaps* maps, const BoltzmannInput& input) {
  const cudaError_t error =
      make_map(&maps->z_hat, input.dtype, input.z_hat, input.rows, input.width);
  if (error != cudaSuccess) return error;
  return make_map(&maps->z, input.dtype, input.z, input.columns, input.width);
}

template <class Body>
cudaError_t dispatch(DType dtype, const Body& body) {
  return dispatch_dtype<BFloat16, Float16>(dtype, body);
}

template <class Shared, class... Params, class... Args>
cudaError_t launch_tiles(void (*kernel)(Params...), int64_t tiles, cudaStream_t stream,
                         Args&&... args) {
  return launch_cluster(kernel, num_blocks(tiles), kClusterBlocks, kHopperThreads, sizeof(Shared),
                        stream, static_cast<Args&&>(args)...);
}

}  // namespace

// ---- Sums ---------------------------------------------------------------------------------------

namespace {

LineSums take_sums(Scratch& scratch, int64_t row_lines, int64_t height, int64_t column_lines,
                   int64_t width) {
  const auto take = [&](int64_t floats) {
    return floats ? static_cast<float*>(scratch.take(floats * int64_t{sizeof(float)})) : nullptr;
  };
  return {take(row_lines * height), take(column_lines * width), height, width};
}

LineSums place(const BoltzmannSumsParams& params, const Blocks& patches, Scratch& scratch) {
  const int64_t column_lines = params.columns ? patches.down * kHalves * kNumSums : 0;
  return take_sums(scratch, patches.across * kNumSums, patches.down * patches.rows, column_lines,
                   patches.across * patches.columns);
}

Blocks make_patches(const BoltzmannInput& input) {
  return make_hopper_patches(input.rows, input.columns);
}

}  // namespace

bool takes_warpgroups(const BoltzmannSumsParams& params) {
  return !params.exact && !params.sigmoid && takes_warpgroups(params.input);
}

int64_t hopper_scratch_bytes(const BoltzmannSumsParams& params) {
  Scratch scratch(nullptr);
  place(params, make_patches(params.input), scratch);
  return scratch.used();
}

cudaError_t launch_hopper(const BoltzmannSumsParams& params, void* memory, cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const Blocks patches = make_patches(input);
  Scratch scratch(memory);
  const LineSums sums = place(params, patches, scratch);
  FeatureMaps maps;
  if (const cudaError_t error = make_maps(&maps, input); error != cudaSuccess) return error;
  const cudaError_t error = dispatch(input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_tiles<SumsShared>(boltzmann_sums_hopper_kernel<T>, patches.down * patches.across,
                                    stream, params, patches, sums, maps.z_hat, maps.z);
  });
  if (error != cudaSuccess) return error;
  const Reduction rows{sums.rows,  params.rows, patches.across, input.rows, sums.height,
                       input.rows, true};
  const Reduction columns{sums.columns,  params.columns, patches.down * kHalves,
                          input.columns, sums.width,     input.columns,
                          true};
  return launch_reduction(input, rows, columns, kNumSums, stream);
}

// ---- Gradients ----------------------------------------------------------------------------------

namespace {

Blocks make_blocks(const BoltzmannGradsParams& params) {
  const BoltzmannInput& input = params.input;
  return boltzmann::make_blocks(input.rows, input.columns, kHopperTile,
                                grads_elements(input.dtype, architecture()));
}

int64_t halves_down(const Blocks& blocks) { return blocks.rows / kHalfRows; }
int64_t tiles_across(const Blocks& blocks) { return blocks.columns / kHopperTile.columns; }

struct HopperGradsScratch {
  HopperGradsMemory memory;
  double* total;
};

HopperGradsScratch place(const BoltzmannGradsParams& params, const Blocks& blocks,
                         Scratch& scratch) {
  HopperGradsScratch pieces;
  HopperGradsMemory& memory = pieces.memory;
  memory.counters = static_cast<uint64_t*>(scratch.take(kNumCounters * sizeof(uint64_t)));
  memory.logit_grads =
      scratch.take(blocks.rows * blocks.columns * boltzmann::bytes_of(params.input.dtype));
  const int64_t tiles = halves_down(blocks) * tiles_across(blocks);
  memory.scale_grads = static_cast<double*>(scratch.take(tiles * int64_t{sizeof(double)}));
  memory.sums =
      take_sums(scratch, params.values ? tiles_across(blocks) : 0, blocks.down * blocks.rows,
                params.grad_bias ? halves_down(blocks) : 0, blocks.across * blocks.columns);
  pieces.total = static_cast<double*>(scratch.take(sizeof(double)));
  return pieces;
}

cudaError_t launch_grads(const BoltzmannGradsParams& params, const Blocks& blocks,
                         const HopperGradsMemory& memory, cudaStream_t stream) {
  FeatureMaps maps;
  cudaError_t error = make_maps(&maps, params.input);
  if (error != cudaSuccess) return error;
  TensorMap g;
  error = make_map(&g, params.input.dtype, memory.logit_grads, blocks.rows, blocks.columns);
  if (error != cudaSuccess) return error;
  const int64_t down = blocks.rows / kHopperTile.rows, across = tiles_across(blocks);
  const int64_t of_features = ((params.grad_z_hat ? down : 0) + (params.grad_z ? across : 0)) *
                              divide_up(params.input.width, kHopperTile.columns);
  const int64_t tiles = std::max(down * across, of_features);
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = params.sigmoid ? boltzmann_grads_hopper_kernel<T, true>
                                       : boltzmann_grads_hopper_kernel<T, false>;
    return launch_tiles<HopperShared>(kernel, tiles, stream, params, blocks, memory, g, maps.z_hat,
                                      maps.z);
  });
}

}  // namespace

bool takes_warpgroups(const BoltzmannGradsParams& params) { return takes_warpgroups(params.input); }

int64_t hopper_scratch_bytes(const BoltzmannGradsParams& params) {
  Scratch scratch(nullptr);
  place(params, make_blocks(params), scratch);
  return scratch.used();
}

cudaError_t launch_hopper(const BoltzmannGradsParams& params, void* memory, cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const Blocks blocks = make_blocks(params);
  Scratch scratch(memory);
  const HopperGradsScratch pieces = place(params, blocks, scratch);
  const HopperGradsMemory& left = pieces.memory;
  cudaError_t error =
      cudaMemsetAsync(left.counters, 0, kNumCounters * sizeof(*left.counters), stream);
  if (error == cudaSuccess) error = launch_grads(params, blocks, left, stream);
  if (error != cudaSuccess) return error;
  const Reduction rows{
      left.sums.rows, params.values, tiles_across(blocks), input.rows, left.sums.height,
      input.rows,     true};
  const Reduction columns{left.sums.columns,
                          params.grad_bias,
                          halves_down(blocks),
                          input.columns,
                          left.sums.width,
                          input.columns,
                          true};
  error = launch_reduction(input, rows, columns, 1, stream);
  if (error != cudaSuccess) return error;
  const int64_t halves = halves_down(blocks) * tiles_across(blocks);
  return launch_total(left.scale_grads, halves, pieces.total,
                      static_cast<float*>(params.grad_scale), input.run, stream);
}

}  // namespace m3i::boltzmann
