// gaussian: launchers.
#include "gaussian/op.h"

#include "gaussian/dispatch.h"
#include "gaussian/sm80/kernels.cuh"
#include "m3i/host/launch.h"

#include <algorithm>

namespace m3i {
namespace {

using namespace gaussian;

uint64_t address(const void* array) { return reinterpret_cast<uintptr_t>(array); }

// body(Type<P>{}, Type<T>{}, std::integral_constant<int, elements of an access>{})
template <class Body>
cudaError_t dispatch_vector(const GaussianRows& of, uint64_t addresses, const Body& body) {
  return dispatch_gaussian(of, [&](auto prediction, auto target) {
    constexpr int kVector =
        kWidest<typename decltype(prediction)::type, typename decltype(target)::type>;
    return dispatch_int<kVector, 1>(vector_size(of.width, kVector, addresses),
                                    [&](auto size) { return body(prediction, target, size); });
  });
}

}  // namespace

int64_t gaussian_num_distances(int64_t rows) { return num_blocks(rows, kWarps); }

int64_t gaussian_num_products(int64_t size) { return num_blocks(size, kThreads); }

cudaError_t launch_gaussian(const GaussianParams& params, void* distances, cudaStream_t stream) {
  const GaussianRows& of = params.of;
  const auto grid = static_cast<unsigned>(gaussian_num_distances(of.rows));
  const uint64_t addresses = address(of.z_hat) | address(of.z) | address(params.normalised);
  return dispatch_vector(of, addresses, [&](auto prediction, auto target, auto size) {
    using P = typename decltype(prediction)::type;
    using T = typename decltype(target)::type;
    constexpr int kVector = decltype(size)::value;
    auto* kernel = gaussian_kernel<P, T, kVector, false>;
    if constexpr (kVector > 1) {
      if (of.width <= kHeldWidth) kernel = gaussian_kernel<P, T, kVector, true>;
    }
    return launch(kernel, grid, kThreads, stream, params, static_cast<Accumulator<P>*>(distances));
  });
}

cudaError_t launch_gaussian_product(const GaussianProductParams& params, void* products,
                                    cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(gaussian_num_products(params.size));
  return dispatch_dtype<float, BFloat16, Float16, double>(params.prediction, [&](auto type) {
    using P = typename decltype(type)::type;
    return launch(gaussian_product_kernel<P>, grid, kThreads, stream, params,
                  static_cast<Accumulator<P>*>(products));
  });
}

cudaError_t launch_gaussian_value(const GaussianValueParams& params, cudaStream_t stream) {
  return dispatch_dtype<float, double>(params.accumulator, [&](auto type) {
    return launch(gaussian_value_kernel<typename decltype(type)::type>, 1, kThreads, stream,
                  params);
  });
}

cudaError_t launch_gaussian_bwd(const GaussianBwdParams& params, cudaStream_t stream) {
  const GaussianRows& of = params.of;
  const int64_t blocks = (of.rows + kWarps - 1) / kWarps;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, kMaxGridX));
  const uint64_t addresses =
      address(of.z_hat) | address(of.z) | address(params.pull) | address(params.grad);
  return dispatch_vector(of, addresses, [&](auto prediction, auto target, auto size) {
    const auto kernel = gaussian_bwd_kernel<typename decltype(prediction)::type,
                                            typename decltype(target)::type, decltype(size)::value>;
    return launch(kernel, grid, kThreads, stream, params);
  });
}

}  // namespace m3i
