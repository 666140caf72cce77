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

bool is_empty(const Block& block) { return block.row_tiles == 0 || block.column_tiles == 0; }

template <class Body>
cudaError_t dispatch(DType dtype, const Body& body) {
  return dispatch_dtype<BFloat16, Float16, float, double>(dtype, body);
}

// Adds the partial sums of the block's tiles to [kinds, N] and [kinds, M], which may be null.
template <class How>
cudaError_t reduce(const BoltzmannInput& input, const Block& block, const Tile& tile,
                   const Partials& partials, int kinds, void* rows, void* columns,
                   cudaStream_t stream) {
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
  const int64_t longest = std::max(rows ? of_rows.length : 0, columns ? of_columns.length : 0);
  if (longest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(divide_up(longest, kReduceThreads)),
                  static_cast<unsigned>(kinds), 2);
  return input.dtype == DType::kFloat64
             ? launch(boltzmann_reduce_kernel<double, How>, grid, kReduceThreads, stream, of_rows,
                      of_columns, input.run)
             : launch(boltzmann_reduce_kernel<float, How>, grid, kReduceThreads, stream, of_rows,
                      of_columns, input.run);
}

template <class A>
cudaError_t add_scale_grads(const BoltzmannGradsParams& params, const Block& block,
                            const GradsMemory& memory, cudaStream_t stream) {
  const bool first = block.row_begin == 0 && block.column_begin == 0;
  return launch(boltzmann_total_kernel<A>, 1, kReduceThreads, stream,
                static_cast<const A*>(memory.tiles.scale_grads),
                block.row_tiles * block.column_tiles, first, static_cast<double*>(memory.total),
                static_cast<A*>(params.grad_scale), params.input.run);
}

}  // namespace

namespace boltzmann {

cudaError_t add_partials(const BoltzmannInput& input, const Block& block, const Tile& tile,
                         const Partials& partials, int kinds, void* rows, void* columns,
                         cudaStream_t stream) {
  return reduce<Sum>(input, block, tile, partials, kinds, rows, columns, stream);
}

cudaError_t add_partials(const BoltzmannGradsParams& params, const Block& block, const Tile& tile,
                         const GradsMemory& memory, cudaStream_t stream) {
  const cudaError_t error = reduce<Sum>(params.input, block, tile, memory.tiles.partials, 1,
                                        params.values, params.grad_bias, stream);
  if (error != cudaSuccess) return error;
  return params.input.dtype == DType::kFloat64
             ? add_scale_grads<double>(params, block, memory, stream)
             : add_scale_grads<float>(params, block, memory, stream);
}

}  // namespace boltzmann

// ---- Maxima -------------------------------------------------------------------------------------

namespace {

Partials place(const BoltzmannMaximaParams& params, const Blocks& blocks, Scratch& scratch) {
  return take_partials(scratch, params.input.dtype, blocks, tile_of(params.input.dtype), 1, true,
                       true);
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannMaximaParams& params) {
  Scratch scratch(nullptr);
  place(params, make_blocks(params.input, kSumsElements), scratch);
  return scratch.used();
}

cudaError_t launch_boltzmann(const BoltzmannMaximaParams& params, void* memory,
                             cudaStream_t stream) {
  const BoltzmannInput& input = params.input;
  const Blocks blocks = make_blocks(input, kSumsElements);
  Scratch scratch(memory);
  const Partials partials = place(params, blocks, scratch);
  return for_blocks(input, blocks, tile_of(input.dtype), [&](const Block& block) {
    cudaError_t error = cudaSuccess;
    if (!is_empty(block)) {
      error = dispatch(input.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return launch_with_shared(boltzmann_maxima_kernel<T>, tile_grid(block), Shape<T>::kThreads,
                                  sizeof(Shared<T>), stream, params, block, partials);
      });
    }
    if (error != cudaSuccess) return error;
    return reduce<Largest>(input, block, tile_of(input.dtype), partials, 1, params.row_max,
                           params.col_max, stream);
  });
}

// ---- Sums ---------------------------------------------------------------------------------------

namespace {

Partials place(const BoltzmannSumsParams& params, const Blocks& blocks, Scratch& scratch) {
  return take_partials(scratch, params.input.dtype, blocks, tile_of(params.input.dtype), kNumSums,
                       true, params.columns != nullptr);
}

SumsMode mode_of(const BoltzmannSumsParams& params) {
  if (params.sigmoid) return SumsMode::kSigmoid;
  return params.exact ? SumsMode::kExact : SumsMode::kShared;
}

cudaError_t launch_tiles(const BoltzmannSumsParams& params, const Block& block,
                         const Partials& partials, cudaStream_t stream) {
  return dispatch(params.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_int<0, 1, 2>(static_cast<int>(mode_of(params)), [&](auto mode) {
      constexpr SumsMode kMode = static_cast<SumsMode>(decltype(mode)::value);
      return launch_with_shared(boltzmann_sums_kernel<T, kMode>, tile_grid(block),
                                Shape<T>::kThreads, sizeof(Shared<T>), stream, params, block,
                                partials);
    });
  });
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannSumsParams& params) {
  if (takes_warpgroups(params)) return hopper_scratch_bytes(params);
  Scratch scratch(nullptr);
  place(params, make_blocks(params.input, kSumsElements), scratch);
  return scratch.used();
}

cudaError_t launch_boltzmann(const BoltzmannSumsParams& params, void* memory, cudaStream_t stream) {
  if (takes_warpgroups(params)) return launch_hopper(params, memory, stream);
  const BoltzmannInput& input = params.input;
  const Blocks blocks = make_blocks(input, kSumsElements);
  Scratch scratch(memory);
  const Partials partials = place(params, blocks, scratch);
  return for_blocks(input, blocks, tile_of(input.dtype), [&](const Block& block) {
    const cudaError_t error =
        is_empty(block) ? cudaSuccess : launch_tiles(params, block, partials, stream);
    if (error != cudaSuccess) return error;
    return add_partials(input, block, tile_of(input.dtype), partials, kNumSums, params.rows,
                        params.columns, stream);
  });
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
  return add_partials(params, block, tile_of(params.input.dtype), memory, stream);
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
