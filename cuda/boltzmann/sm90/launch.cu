// boltzmann: launchers of the kernels by warpgroups, on compute capability 9.0.
#include "boltzmann/launch.h"
#include "boltzmann/sm90/grads.cuh"
#include "m3i/host/make_tensor_map.h"

namespace m3i::boltzmann {
namespace {

// Half of a block's rows, which has one entry in the partial sums.
constexpr Tile kHalfTile{kHalfRows, kHopperTile.columns, kHopperTile.depth, kHopperTile.stages, 4,
                         1};

Block in_halves(Block block) {
  block.row_tiles *= kHalves;
  return block;
}

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

Blocks make_blocks(const BoltzmannInput& input, int64_t elements) {
  return make_blocks(input.rows, input.columns, kHopperTile, elements);
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

Partials place(const BoltzmannSumsParams& params, const Blocks& blocks, Scratch& scratch) {
  return take_partials(scratch, params.input.dtype, blocks, kHalfTile, kNumSums, true,
                       params.columns != nullptr);
}

}  // namespace

bool takes_warpgroups(const BoltzmannSumsParams& params) {
  return !params.exact && !params.sigmoid && takes_warpgroups(params.input);
}

int64_t hopper_scratch_bytes(const BoltzmannSumsParams& params) {
  Scratch scratch(nullptr);
  place(params, make_blocks(params.input, kSumsElements), scratch);
  return scratch.used();
}

cudaError_t launch_hopper(const BoltzmannSumsParams& params, void* memory, cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const Blocks blocks = make_blocks(input, kSumsElements);
  Scratch scratch(memory);
  const Partials partials = place(params, blocks, scratch);
  FeatureMaps maps;
  if (const cudaError_t error = make_maps(&maps, input); error != cudaSuccess) return error;
  return for_blocks(input, blocks, kHopperTile, [&](const Block& block) {
    const cudaError_t error = dispatch(input.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return launch_tiles<SumsShared>(boltzmann_sums_hopper_kernel<T>,
                                      block.row_tiles * block.column_tiles, stream, params, block,
                                      partials, maps.z_hat, maps.z);
    });
    if (error != cudaSuccess) return error;
    return add_partials(input, in_halves(block), kHalfTile, partials, kNumSums, params.rows,
                        params.columns, stream);
  });
}

// ---- Gradients ----------------------------------------------------------------------------------

namespace {

cudaError_t launch_logit_grads(const BoltzmannGradsParams& params, const Block& block,
                               const GradsScratch& scratch, const FeatureMaps& maps,
                               cudaStream_t stream) {
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = params.sigmoid ? boltzmann_logit_grads_hopper_kernel<T, true>
                                       : boltzmann_logit_grads_hopper_kernel<T, false>;
    return launch_tiles<HopperShared>(kernel, block.row_tiles * block.column_tiles, stream, params,
                                      block, scratch, maps.z_hat, maps.z);
  });
}

cudaError_t launch_feature_grads(const BoltzmannGradsParams& params, const Block& block,
                                 const void* logit_grads, const FeatureMaps& maps,
                                 cudaStream_t stream) {
  const int64_t height = block.row_tiles * kHopperTile.rows;
  const int64_t width = block.column_tiles * kHopperTile.columns;
  const int64_t down =
      ((params.grad_z_hat ? height : 0) + (params.grad_z ? width : 0)) / kHopperTile.rows;
  if (down == 0) return cudaSuccess;
  TensorMap g;
  const cudaError_t error = make_map(&g, params.input.dtype, logit_grads, height, width);
  if (error != cudaSuccess) return error;
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_tiles<HopperShared>(boltzmann_feature_grads_hopper_kernel<T>,
                                      down * divide_up(params.input.width, kHopperTile.columns),
                                      stream, params, block, g, maps.z_hat, maps.z);
  });
}

Blocks make_blocks(const BoltzmannGradsParams& params) {
  return make_blocks(params.input, grads_elements(params.input.dtype, architecture()));
}

}  // namespace

bool takes_warpgroups(const BoltzmannGradsParams& params) { return takes_warpgroups(params.input); }

int64_t hopper_scratch_bytes(const BoltzmannGradsParams& params) {
  Scratch scratch(nullptr);
  take_grads_memory(scratch, params, make_blocks(params), kHalfTile);
  return scratch.used();
}

cudaError_t launch_hopper(const BoltzmannGradsParams& params, void* memory, cudaStream_t stream) {
  const Blocks blocks = make_blocks(params);
  Scratch scratch(memory);
  const GradsMemory pieces = take_grads_memory(scratch, params, blocks, kHalfTile);
  FeatureMaps maps;
  if (const cudaError_t error = make_maps(&maps, params.input); error != cudaSuccess) return error;
  return for_blocks(params.input, blocks, kHopperTile, [&](const Block& block) {
    cudaError_t error = launch_logit_grads(params, block, pieces.tiles, maps, stream);
    if (error == cudaSuccess) {
      error = launch_feature_grads(params, block, pieces.tiles.logit_grads, maps, stream);
    }
    if (error != cudaSuccess) return error;
    return add_partials(params, in_halves(block), kHalfTile, pieces, stream);
  });
}

}  // namespace m3i::boltzmann
