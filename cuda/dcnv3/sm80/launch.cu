// dcnv3: launchers.
#include "dcnv3/op.h"

#include "dcnv3/sm80/kernels.cuh"
#include "m3i/dispatch.h"
#include "m3i/host/device.h"
#include "m3i/host/launch.h"

#include <algorithm>
#include <type_traits>

namespace m3i {
namespace {

using namespace dcnv3;

uint64_t address(const void* array) { return reinterpret_cast<uintptr_t>(array); }

dim3 make_grid(const Dcnv3Shape& shape, int64_t blocks) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, kMaxGridX)),
              static_cast<unsigned>(std::min<int64_t>(shape.batch, kMaxGridY)));
}

// body(Type<T>{}, std::integral_constant<int, elements of an access>{})
template <class Body>
cudaError_t dispatch_vector(DType dtype, int64_t group_size, uint64_t addresses, const Body& body) {
  return dispatch_dtype<float, BFloat16, Float16, double>(dtype, [&](auto type) {
    constexpr int kWidest = kAccessBytes / static_cast<int>(sizeof(typename decltype(type)::type));
    return dispatch_int<kWidest, 1>(vector_size(group_size, kWidest, addresses),
                                    [&](auto size) { return body(type, size); });
  });
}

// A type of a policy, to pass it to a generic lambda.
template <int kIndex>
struct Tuned {
  static constexpr Policy kPolicy = kPolicies[kIndex];
};
struct Untuned {
  static constexpr Policy kPolicy = kFloat64Policy;
};

// body(Tuned<index>{} or Untuned{})
template <class T, class Body>
cudaError_t dispatch_policy(const Dcnv3Shape& shape, const Body& body) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return body(Untuned{});
  } else {
    static_assert(kNumPolicies == 4);
    return dispatch_int<0, 1, 2, 3>(policy_index(architecture(), shape), [&](auto index) {
      return body(Tuned<decltype(index)::value>{});
    });
  }
}

}  // namespace

namespace {

// Blocks go through images, as many as are at work at once.
template <class T, int kGroupSize, class Tuned>
cudaError_t launch_nine(const Dcnv3Params& params, cudaStream_t stream, Tuned) {
  using Layout = NineLayout<T, kGroupSize>;
  constexpr Policy kPolicy = Tuned::kPolicy;
  constexpr int kThreads = threads_of(kPolicy);
  const Dcnv3Shape& shape = params.shape;
  const int block_units = kPolicy.warps * Layout::kUnits;
  const int64_t blocks = divide_up(units_per_image(shape), block_units);
  const int64_t at_once = multiprocessors() * int64_t{kPolicy.blocks};
  const int64_t least = std::min(shape.batch, std::max<int64_t>(1, at_once / blocks));
  const int64_t rows = std::min(divide_up(shape.batch, divide_up(shape.batch, least)),
                                static_cast<int64_t>(kMaxGridY));
  return launch_with_shared(dcnv3_nine_kernel<T, kGroupSize, kThreads, kPolicy.blocks>,
                            dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows)),
                            kThreads, kPolicy.warps * Layout::kWarpBytes, stream, params,
                            make_nine_shape(shape, block_units, rows));
}

}  // namespace

cudaError_t launch_dcnv3(const Dcnv3Params& params, cudaStream_t stream) {
  const Dcnv3Shape& shape = params.shape;
  if (shape.batch == 0) return cudaSuccess;
  const uint64_t addresses =
      address(params.x) | address(params.out) | address(params.offset) | address(params.mask);
  return dispatch_vector(
      params.dtype, shape.group_size, address(params.x) | address(params.out),
      [&](auto type, auto size) {
        using T = typename decltype(type)::type;
        constexpr int kVector = decltype(size)::value;
        return dispatch_policy<T>(shape, [&](auto tuned) {
          constexpr Policy kPolicy = decltype(tuned)::kPolicy;
          constexpr int kThreads = threads_of(kPolicy);
          if constexpr (kVector > 1 && sizeof(T) < sizeof(double)) {
            if (is_nine(shape, kVector, addresses)) {
              return shape.group_size == 16 ? launch_nine<T, 16>(params, stream, tuned)
                                            : launch_nine<T, 32>(params, stream, tuned);
            }
          }
          const Tiling tiling = make_tiling(shape, kVector, kPolicy);
          return launch_with_shared(dcnv3_kernel<T, kVector, kThreads, kPolicy.blocks>,
                                    make_grid(shape, tiling.blocks), kThreads,
                                    block_bytes<Accumulator<T>>(tiling, kPolicy.warps, false),
                                    stream, params, tiling);
        });
      });
}

// ---- Backward -----------------------------------------------------------------------------------

namespace {

int64_t size_of_x(const Dcnv3Shape& shape) {
  return shape.batch * shape.height * shape.width * shape.groups * shape.group_size;
}

bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

unsigned linear_blocks(int64_t threads) {
  return static_cast<unsigned>(
      std::min((threads + kLinearThreads - 1) / kLinearThreads, int64_t{kMaxGridX}));
}

// Adds to grad_x, where it is not null, and writes the others.
cudaError_t launch_units(const Dcnv3BwdParams& params, void* grad_x, cudaStream_t stream) {
  const Dcnv3Shape& shape = params.shape;
  return dispatch_vector(
      params.dtype, shape.group_size,
      address(params.x) | address(params.grad_out) | address(grad_x), [&](auto type, auto size) {
        using T = typename decltype(type)::type;
        using A = Accumulator<T>;
        constexpr int kVector = decltype(size)::value;
        return dispatch_policy<T>(shape, [&](auto tuned) {
          constexpr Policy kPolicy = decltype(tuned)::kPolicy;
          constexpr int kThreads = threads_of(kPolicy);
          const Tiling tiling = make_tiling(shape, kVector, kPolicy);
          if constexpr (kVector > 1 && std::is_same_v<A, float>) {
            const int bytes = window_block_bytes(tiling, kPolicy.warps);
            if (grad_x && has_windows(shape, kVector) && bytes <= kMostShared) {
              const WindowTiling window = make_window_tiling(shape, kPolicy);
              return launch_with_shared(
                  dcnv3_bwd_window_kernel<T, kVector, kThreads, kPolicy.bwd_blocks>,
                  make_grid(shape, window.blocks), kThreads, bytes, stream, params,
                  static_cast<A*>(grad_x), tiling, window);
            }
          }
          const auto launch_direct = [&](auto by_x) {
            return launch_with_shared(
                dcnv3_bwd_kernel<T, kVector, kThreads, kPolicy.bwd_blocks, decltype(by_x)::value>,
                make_grid(shape, tiling.blocks), kThreads,
                block_bytes<A>(tiling, kPolicy.warps, true), stream, params,
                static_cast<A*>(grad_x), tiling);
          };
          return grad_x ? launch_direct(std::true_type{}) : launch_direct(std::false_type{});
        });
      });
}

// Scratch memory in 64-bit words: the largest product, the sums (for float64 also their
// remainders), and a flag bit an element.
int64_t fixed_words(const Dcnv3BwdParams& params) {
  const int64_t size = size_of_x(params.shape);
  return 2 + size * (params.dtype == DType::kFloat64 ? 2 : 1) + (size + 63) / 64;
}

FixedPoint place_fixed(const Dcnv3BwdParams& params, void* scratch) {
  const int64_t size = size_of_x(params.shape);
  auto* words = static_cast<unsigned long long*>(scratch);
  FixedPoint fixed;
  fixed.largest = words;
  fixed.sums = fixed.largest + 2;
  fixed.rests = fixed.sums + (params.dtype == DType::kFloat64 ? size : 0);
  fixed.not_finite = reinterpret_cast<uint32_t*>(fixed.rests + size);
  return fixed;
}

template <class T>
cudaError_t launch_fixed(const Dcnv3BwdParams& params, void* scratch, cudaStream_t stream) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t units = shape.batch * units_per_image(shape);
  const FixedPoint fixed = place_fixed(params, scratch);
  const auto largest = [&](const void* values, int64_t size, unsigned long long* to) {
    return launch(dcnv3_largest_kernel<T>, linear_blocks((size + 63) / 64), kLinearThreads, stream,
                  static_cast<const T*>(values), size, to);
  };
  cudaError_t error =
      cudaMemsetAsync(scratch, 0, static_cast<size_t>(fixed_words(params) * 8), stream);
  if (error == cudaSuccess) {
    error = largest(params.grad_out, units * shape.group_size, fixed.largest);
  }
  if (error == cudaSuccess && !shape.softmax) {
    error = largest(params.mask, units * shape.points, fixed.largest + 1);
  }
  if (error == cudaSuccess) {
    error = dispatch_policy<T>(shape, [&](auto tuned) {
      constexpr Policy kPolicy = decltype(tuned)::kPolicy;
      constexpr int kThreads = threads_of(kPolicy);
      const Tiling tiling = make_tiling(shape, 1, kPolicy);
      return launch_with_shared(dcnv3_scatter_kernel<T, kThreads, kPolicy.bwd_blocks>,
                                make_grid(shape, tiling.blocks), kThreads,
                                block_bytes<Accumulator<T>>(tiling, kPolicy.warps, false), stream,
                                params, fixed, tiling);
    });
  }
  if (error != cudaSuccess) return error;
  const int64_t size = size_of_x(shape);
  return launch(dcnv3_sums_kernel<T>, linear_blocks(size), kLinearThreads, stream, shape, fixed,
                static_cast<T*>(params.grad_x), size);
}

cudaError_t launch_deterministic(const Dcnv3BwdParams& params, void* scratch, cudaStream_t stream) {
  const cudaError_t error =
      dispatch_dtype<float, BFloat16, Float16, double>(params.dtype, [&](auto type) {
        return launch_fixed<typename decltype(type)::type>(params, scratch, stream);
      });
  if (error != cudaSuccess || (!params.grad_offset && !params.grad_mask)) return error;
  return launch_units(params, nullptr, stream);
}

cudaError_t round_to_grad_x(const Dcnv3BwdParams& params, const float* sums, cudaStream_t stream) {
  return dispatch_dtype<BFloat16, Float16>(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t size = size_of_x(params.shape);
    const int64_t threads = (size * static_cast<int64_t>(sizeof(T)) + 15) / kAccessBytes;
    return launch(dcnv3_round_kernel<T>, linear_blocks(threads), kLinearThreads, stream, sums,
                  static_cast<T*>(params.grad_x), size);
  });
}

}  // namespace

int64_t dcnv3_bwd_scratch_bytes(const Dcnv3BwdParams& params, bool deterministic) {
  if (!params.grad_x) return 0;
  if (deterministic) return fixed_words(params) * 8;
  return is_half(params.dtype) ? size_of_x(params.shape) * 4 : 0;
}

cudaError_t launch_dcnv3_bwd(const Dcnv3BwdParams& params, void* scratch, bool deterministic,
                             cudaStream_t stream) {
  if (params.shape.batch == 0) return cudaSuccess;
  if (!params.grad_x && !params.grad_offset && !params.grad_mask) return cudaSuccess;
  if (!params.grad_x) return launch_units(params, nullptr, stream);
  if (deterministic) return launch_deterministic(params, scratch, stream);

  const bool rounds = is_half(params.dtype);
  void* sums = rounds ? scratch : params.grad_x;
  const int64_t element = params.dtype == DType::kFloat64 ? 8 : 4;
  cudaError_t error =
      cudaMemsetAsync(sums, 0, static_cast<size_t>(size_of_x(params.shape) * element), stream);
  if (error == cudaSuccess) error = launch_units(params, sums, stream);
  if (error != cudaSuccess || !rounds) return error;
  return round_to_grad_x(params, static_cast<const float*>(sums), stream);
}

}  // namespace m3i
