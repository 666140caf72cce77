// boltzmann on vectors: launchers.
#include "boltzmann/vectors/op.h"

#include "boltzmann/sm80/vectors.cuh"
#include "m3i/dispatch.h"
#include "m3i/host/launch.h"

#include <algorithm>

namespace m3i {
namespace {

using namespace boltzmann;

// Blocks of a grid over `length` elements, at most: eight on each of 132 multiprocessors.
constexpr int64_t kMostBlocks = 1056;

unsigned blocks_of(int64_t length, int64_t of_block = kVectorThreads) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((length + of_block - 1) / of_block, 1, kMostBlocks));
}

template <class Body>
cudaError_t dispatch(DType dtype, const Body& body) {
  return dispatch_dtype<BFloat16, Float16, float, double>(dtype, body);
}

template <class Body>
cudaError_t dispatch_wide(DType wide, const Body& body) {
  return dispatch_dtype<float, double>(wide, body);
}

uint64_t address(const void* array) { return reinterpret_cast<uintptr_t>(array); }

int64_t num_slots(const BoltzmannPrepareParams& params) {
  return params.col_ids ? table_size(params.num_columns) : 0;
}

}  // namespace

int64_t boltzmann_scratch_bytes(const BoltzmannPrepareParams& params) {
  return num_slots(params) * static_cast<int64_t>(sizeof(unsigned long long) + sizeof(unsigned));
}

cudaError_t launch_boltzmann(const BoltzmannPrepareParams& params, void* scratch,
                             cudaStream_t stream) {
  IdTable table{nullptr, nullptr, num_slots(params)};
  if (params.col_ids) {
    table.keys = static_cast<unsigned long long*>(scratch);
    table.firsts = reinterpret_cast<unsigned*>(table.keys + table.size);
    cudaError_t error = cudaMemsetAsync(
        scratch, 0xff, static_cast<size_t>(boltzmann_scratch_bytes(params)), stream);
    if (error == cudaSuccess) {
      error = launch(boltzmann_insert_kernel<int64_t>, blocks_of(params.num_columns),
                     kVectorThreads, stream, params.col_ids, params.num_columns, table);
    }
    if (error != cudaSuccess) return error;
  }
  return dispatch(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(T));
    const bool aligned = params.width % kVector == 0 &&
                         (address(params.z_hat) | address(params.z)) % kAccessBytes == 0;
    const auto kernel =
        aligned ? boltzmann_prepare_kernel<T, kVector> : boltzmann_prepare_kernel<T, 1>;
    return launch(kernel, static_cast<unsigned>(params.num_parts), kVectorThreads, stream, params,
                  table);
  });
}

cudaError_t launch_boltzmann(const BoltzmannShiftParams& params, cudaStream_t stream) {
  const dim3 grid(blocks_of(std::max(params.rows, params.columns)), 2);
  return dispatch_wide(params.wide, [&](auto type) {
    return launch(boltzmann_shift_kernel<typename decltype(type)::type>, grid, kVectorThreads,
                  stream, params);
  });
}

cudaError_t launch_boltzmann(const BoltzmannExactParams& params, cudaStream_t stream) {
  return dispatch_wide(params.wide, [&](auto type) {
    return launch(boltzmann_exact_kernel<typename decltype(type)::type>, 1, kFlagThreads, stream,
                  params);
  });
}

cudaError_t launch_boltzmann(const BoltzmannExactShiftParams& params, cudaStream_t stream) {
  const dim3 grid(blocks_of(std::max(params.rows, params.columns)), 2);
  return dispatch_wide(params.wide, [&](auto type) {
    return launch(boltzmann_exact_shift_kernel<typename decltype(type)::type>, grid, kVectorThreads,
                  stream, params);
  });
}

cudaError_t launch_boltzmann(const BoltzmannTotalsParams& params, cudaStream_t stream) {
  return dispatch_wide(params.input.wide, [&](auto type) {
    return launch(boltzmann_totals_kernel<typename decltype(type)::type>,
                  static_cast<unsigned>(params.num_parts), kVectorThreads, stream, params);
  });
}

cudaError_t launch_boltzmann(const BoltzmannLossParams& params, cudaStream_t stream) {
  const dim3 grid(blocks_of(std::max(params.input.sums.rows, params.num_columns)), 2);
  return dispatch_wide(params.input.wide, [&](auto type) {
    return launch(boltzmann_loss_kernel<typename decltype(type)::type>, grid, kVectorThreads,
                  stream, params);
  });
}

cudaError_t launch_boltzmann(const BoltzmannSigmoidLossParams& params, cudaStream_t stream) {
  return dispatch_wide(params.wide, [&](auto type) {
    return launch(boltzmann_sigmoid_loss_kernel<typename decltype(type)::type>, 1, kFlagThreads,
                  stream, params);
  });
}

// ---- Backward -----------------------------------------------------------------------------------

namespace {

template <class From, class To>
cudaError_t launch_scale(const BoltzmannScaleParams& params, cudaStream_t stream) {
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(From));
  const uint64_t addresses =
      address(params.z_hat) | address(params.z) | address(params.out_z_hat) | address(params.out_z);
  const bool aligned = addresses % kAccessBytes == 0;
  const int64_t longest = std::max({params.num_z_hat, params.num_z, params.num_bias});
  const dim3 grid(blocks_of(longest, int64_t{kVectorThreads} * kVector), params.num_z ? 2 : 1);
  const auto kernel =
      aligned ? boltzmann_scale_kernel<From, To, kVector> : boltzmann_scale_kernel<From, To, 1>;
  return launch(kernel, grid, kVectorThreads, stream, params);
}

}  // namespace

cudaError_t launch_boltzmann(const BoltzmannScaleParams& params, cudaStream_t stream) {
  if (params.from == DType::kFloat32 && params.to != DType::kFloat32) {
    return dispatch_dtype<BFloat16, Float16>(params.to, [&](auto type) {
      return launch_scale<float, typename decltype(type)::type>(params, stream);
    });
  }
  return dispatch(params.from, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_scale<T, T>(params, stream);
  });
}

}  // namespace m3i
