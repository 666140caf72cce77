// dcnv3: launchers.
#include "dcnv3/dcnv3.h"

#include "dcnv3/dcnv3.cuh"
#include "m3i/dispatch.h"
#include "m3i/launch.h"

#include <algorithm>

namespace m3i {
namespace {

using namespace dcnv3;

uint64_t address(const void* array) { return reinterpret_cast<uintptr_t>(array); }

dim3 make_grid(const Dcnv3Shape& shape, const Tiling& tiling) {
  const int64_t blocks = blocks_per_image(shape, tiling);
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

}  // namespace

cudaError_t launch_dcnv3(const Dcnv3Params& params, cudaStream_t stream) {
  const Dcnv3Shape& shape = params.shape;
  if (shape.batch == 0) return cudaSuccess;
  return dispatch_vector(
      params.dtype, shape.group_size, address(params.x) | address(params.out),
      [&](auto type, auto size) {
        using T = typename decltype(type)::type;
        constexpr int kVector = decltype(size)::value;
        const Tiling tiling = make_tiling(shape.group_size, shape.points, kVector);
        return launch_with_shared(dcnv3_kernel<T, kVector>, make_grid(shape, tiling), kThreads,
                                  block_bytes<Accumulator<T>>(tiling, false), stream, params,
                                  tiling);
      });
}

}  // namespace m3i
