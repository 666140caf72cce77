// boltzmann: launchers of the kernels by mma.sync.
#include "boltzmann/op.h"

#include "boltzmann/kernels.cuh"
#include "boltzmann/launch.h"

namespace m3i {
namespace {

using namespace boltzmann;

Blocks make_blocks(const BoltzmannInput& input, int64_t elements) {
  return boltzmann::make_blocks(input.rows, input.columns, tile_of(input.dtype), elements);
}

dim3 tile_grid(const Block& block) {
  return dim3(static_cast<unsigned>(block.column_tiles), static_cast<unsigned>(block.row_tiles));
}

template <class Body>
cudaError_t dispatch(DType dtype, const Body& body) {
  return dispatch_dtype<BFloat16, Float16, float, double>(dtype, body);
}

template <class How>
cudaError_t reduce(const BoltzmannInput& input, const Reduction& rows, const Reduction& columns,
                   int kinds, cudaStream_t stream) {
  const int64_t longest =
      std::max(rows.to ? rows.length : 0, columns.to ? columns.length : int64_t{0});
  if (longest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(divide_up(longest, kReduceThreads)),
                  static_cast<unsigned>(kinds), 2);
  return input.dtype == DType::kFloat64 ? launch(boltzmann_reduce_kernel<double, How>, grid,
                                                 kReduceThreads, stream, rows, columns, input.run)
                                        : launch(boltzmann_reduce_kernel<float, How>, grid,
                                                 kReduceThreads, stream, rows, columns, input.run);
}

// Adds the partial sums of the block's tiles to [N] and [M], which may be null.
cudaError_t reduce(const BoltzmannInput& input, const Block& block, const Partials& partials,
                   void* rows, void* columns, cudaStream_t stream) {
  const Tile tile = tile_of(input.dtype);
  const int64_t height = block.row_tiles * tile.rows, width = block.column_tiles * tile.columns;
  const auto wide = [&](void* array, int64_t offset) -> void* {
    return array ? static_cast<char*>(array) + offset * wide_bytes(input.dtype) : nullptr;
  };
  const Reduction of_rows{partials.rows,
                          wide(rows, block.row_begin),
                          block.column_tiles,
                          std::min(height, input.rows - block.row_begin),
                          height,
                          input.rows,
                          block.column_begin == 0};
  const Reduction of_columns{partials.columns,
                             wide(columns, block.column_begin),
                             block.row_tiles,
                             std::min(width, input.columns - block.column_begin),
                             width,
                             input.columns,
                             block.row_begin == 0};
  return reduce<Sum>(input, of_rows, of_columns, 1, stream);
}

template <class A>
cudaError_t add_scale_grads(const BoltzmannGradsParams& params, const Block& block,
                            const GradsMemory& memory, cudaStream_t stream) {
  const bool first = block.row_begin == 0 && block.column_begin == 0;
  return launch(boltzmann_total_kernel<A, A>, 1, kReduceThreads, stream,
                static_cast<const A*>(memory.tiles.scale_grads),
                block.row_tiles * block.column_tiles, first, static_cast<double*>(memory.total),
                static_cast<A*>(params.grad_scale), params.input.run);
}

cudaError_t add_partials(const BoltzmannGradsParams& params, const Block& block,
                         const GradsMemory& memory, cudaStream_t stream) {
  const cudaError_t error =
      reduce(params.input, block, memory.tiles.partials, params.values, params.grad_bias, stream);
  if (error != cudaSuccess) return error;
  return params.input.dtype == DType::kFloat64
             ? add_scale_grads<double>(params, block, memory, stream)
             : add_scale_grads<float>(params, block, memory, stream);
}

}  // namespace

namespace boltzmann {

cudaError_t launch_reduction(const BoltzmannInput& input, const Reduction& rows,
                             const Reduction& columns, int kinds, cudaStream_t stream) {
  return reduce<Sum>(input, rows, columns, kinds, stream);
}

cudaError_t launch_total(const double* from, int64_t count, double* total, float* to,
                         const bool* run, cudaStream_t stream) {
  return launch(boltzmann_total_kernel<double, float>, 1, kReduceThreads, stream, from, count, true,
                total, to, run);
}

}  // namespace boltzmann

// ---- Maxima -------------------------------------------------------------------------------------

namespace {

// One sum, or maximum, of each kind for a row and all patches of it, and for a column.
Partials place(const BoltzmannInput& input, const Blocks& patches, int kinds, bool columns,
               Scratch& scratch) {
  const int64_t bytes = kinds * wide_bytes(input.dtype);
  const int64_t of_rows = patches.across * patches.down * patches.rows;
  const int64_t of_columns = patches.down * patches.across * patches.columns;
  return {scratch.take(of_rows * bytes), columns ? scratch.take(of_columns * bytes) : nullptr};
}

dim3 patch_grid(const Blocks& patches) {
  return dim3(static_cast<unsigned>(patches.across), static_cast<unsigned>(patches.down));
}

template <class How>
cudaError_t reduce(const BoltzmannInput& input, const Blocks& patches, const Partials& partials,
                   int kinds, void* rows, void* columns, cudaStream_t stream) {
  const Reduction of_rows{
      partials.rows, rows, patches.across, input.rows, patches.down * patches.rows,
      input.rows,    true};
  const Reduction of_columns{
      partials.columns, columns, patches.down, input.columns, patches.across * patches.columns,
      input.columns,    true};
  return reduce<How>(input, of_rows, of_columns, kinds, stream);
}

Blocks make_patches(const BoltzmannMaximaParams& params) {
  const BoltzmannInput& input = params.input;
  return boltzmann::make_patches(input.rows, input.columns, tile_of(input.dtype), kPatches);
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannMaximaParams& params) {
  Scratch scratch(nullptr);
  place(params.input, make_patches(params), 1, true, scratch);
  return scratch.used();
}

cudaError_t launch_boltzmann(const BoltzmannMaximaParams& params, void* memory,
                             cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const Blocks patches = make_patches(params);
  Scratch scratch(memory);
  const Partials partials = place(input, patches, 1, true, scratch);
  cudaError_t error = cudaSuccess;
  if (patches.down * patches.across > 0) {
    error = dispatch(input.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return launch_with_shared(boltzmann_maxima_kernel<T>, patch_grid(patches), Shape<T>::kThreads,
                                sizeof(Shared<T>), stream, params, patches, partials);
    });
  }
  if (error != cudaSuccess) return error;
  return reduce<Largest>(input, patches, partials, 1, params.row_max, params.col_max, stream);
}

// ---- Sums ---------------------------------------------------------------------------------------

namespace {

SumsMode mode_of(const BoltzmannSumsParams& params) {
  if (params.sigmoid) return SumsMode::kSigmoid;
  return params.exact ? SumsMode::kExact : SumsMode::kShared;
}

// Exact sums are nearly never needed: they take less memory, not less time.
Blocks make_patches(const BoltzmannSumsParams& params) {
  const BoltzmannInput& input = params.input;
  return boltzmann::make_patches(input.rows, input.columns, tile_of(input.dtype),
                                 params.exact ? kPatches : kManyPatches);
}

Partials place(const BoltzmannSumsParams& params, const Blocks& patches, Scratch& scratch) {
  return place(params.input, patches, kNumSums, params.columns != nullptr, scratch);
}

cudaError_t launch_patches(const BoltzmannSumsParams& params, const Blocks& patches,
                           const Partials& partials, cudaStream_t stream) {
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_int<0, 1, 2>(static_cast<int>(mode_of(params)), [&](auto mode) {
      constexpr SumsMode kMode = static_cast<SumsMode>(decltype(mode)::value);
      return launch_with_shared(boltzmann_sums_kernel<T, kMode>, patch_grid(patches),
                                Shape<T>::kThreads, sizeof(Shared<T>), stream, params, patches,
                                partials);
    });
  });
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannSumsParams& params) {
  if (takes_warpgroups(params)) return hopper_scratch_bytes(params);
  Scratch scratch(nullptr);
  place(params, make_patches(params), scratch);
  return scratch.used();
}

cudaError_t launch_boltzmann(const BoltzmannSumsParams& params, void* memory, cudaStream_t stream) {
  if (takes_warpgroups(params)) return launch_hopper(params, memory, stream);
  const Blocks patches = make_patches(params);
  Scratch scratch(memory);
  const Partials partials = place(params, patches, scratch);
  const cudaError_t error = patches.down * patches.across == 0
                                ? cudaSuccess
                                : launch_patches(params, patches, partials, stream);
  if (error != cudaSuccess) return error;
  return reduce<Sum>(params.input, patches, partials, kNumSums, params.rows, params.columns,
                     stream);
}

// ---- Gradients ----------------------------------------------------------------------------------

namespace {

Blocks make_blocks(const BoltzmannGradsParams& params) {
  return make_blocks(params.input, grads_elements(params.input.dtype, architecture()));
}

GradsMemory place(const BoltzmannGradsParams& params, const Blocks& blocks, Scratch& scratch) {
  return take_grads_memory(scratch, params, blocks, tile_of(params.input.dtype));
}

cudaError_t launch_logit_grads(const BoltzmannGradsParams& params, const Block& block,
                               const GradsScratch& scratch, cudaStream_t stream) {
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = params.sigmoid ? boltzmann_logit_grads_kernel<T, true>
                                       : boltzmann_logit_grads_kernel<T, false>;
    return launch_with_shared(kernel, tile_grid(block), Shape<T>::kThreads, sizeof(Shared<T>),
                              stream, params, block, scratch);
  });
}

cudaError_t launch_feature_grads(const BoltzmannGradsParams& params, const Block& block,
                                 const void* logit_grads, cudaStream_t stream) {
  const int64_t across = divide_up(params.input.width, tile_of(params.input.dtype).columns);
  const int64_t down =
      (params.grad_z_hat ? block.row_tiles : 0) + (params.grad_z ? block.column_tiles : 0);
  if (across == 0 || down == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_with_shared(boltzmann_feature_grads_kernel<T>, grid, Shape<T>::kThreads,
                              sizeof(Shared<T>), stream, params, block, logit_grads);
  });
}

// Sets all gradients to 0 for no rows or no columns.
cudaError_t clear(const BoltzmannGradsParams& params, cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const auto zero = [&](void* array, int64_t size) {
    if (!array || size == 0) return cudaSuccess;
    return cudaMemsetAsync(array, 0, static_cast<size_t>(size * wide_bytes(input.dtype)), stream);
  };
  cudaError_t error = zero(params.grad_z_hat, input.rows * input.width);
  if (error == cudaSuccess) error = zero(params.grad_z, input.columns * input.width);
  if (error == cudaSuccess) error = zero(params.grad_scale, 1);
  if (error == cudaSuccess) error = zero(params.grad_bias, input.columns);
  if (error == cudaSuccess) error = zero(params.values, input.rows);
  return error;
}

cudaError_t launch_block(const BoltzmannGradsParams& params, const Block& block,
                         const GradsMemory& memory, cudaStream_t stream) {
  cudaError_t error = launch_logit_grads(params, block, memory.tiles, stream);
  if (error == cudaSuccess) {
    error = launch_feature_grads(params, block, memory.tiles.logit_grads, stream);
  }
  if (error != cudaSuccess) return error;
  return add_partials(params, block, memory, stream);
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannGradsParams& params) {
  if (takes_warpgroups(params)) return hopper_scratch_bytes(params);
  Scratch scratch(nullptr);
  place(params, make_blocks(params), scratch);
  return scratch.used();
}

cudaError_t launch_boltzmann(const BoltzmannGradsParams& params, void* memory,
                             cudaStream_t stream) {
  if (takes_warpgroups(params)) return launch_hopper(params, memory, stream);
  const BoltzmannInput& input = params.input;
  if (input.rows == 0 || input.columns == 0) return clear(params, stream);
  const Blocks blocks = make_blocks(params);
  Scratch scratch(memory);
  const GradsMemory pieces = place(params, blocks, scratch);
  return for_blocks(input, blocks, tile_of(input.dtype), [&](const Block& block) {
    return launch_block(params, block, pieces, stream);
  });
}

}  // namespace m3i
