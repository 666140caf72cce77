// add_layer_norm: launchers.
#include "add_layer_norm/op.h"

#include "add_layer_norm/dispatch.h"
#include "add_layer_norm/sm80/kernels.cuh"
#include "m3i/host/launch.h"

#include <algorithm>

namespace m3i {
namespace {

using namespace add_layer_norm;

uint64_t address(const void* array) { return reinterpret_cast<uintptr_t>(array); }

// body(Type<X>{}, Type<P>{}, std::integral_constant<int, elements of an access>{})
template <class Body>
cudaError_t dispatch_vector(const AddLayerNormRows& of, uint64_t addresses, const Body& body) {
  return dispatch_add_layer_norm(of, [&](auto stream, auto branch) {
    constexpr int kVector = kWidest<typename decltype(stream)::type>;
    return dispatch_int<kVector, 1>(vector_size(of.width, kVector, addresses),
                                    [&](auto size) { return body(stream, branch, size); });
  });
}

int64_t num_groups(int64_t rows, DType stream) {
  const int64_t of_group = stream == DType::kFloat64 ? kRows<double> : kRows<float>;
  return (rows + of_group - 1) / of_group;
}

}  // namespace

int64_t add_layer_norm_num_partials(int64_t rows, DType stream) {
  return std::min(num_groups(rows, stream), kMaxPartials);
}

cudaError_t launch_add_layer_norm(const AddLayerNormParams& params, cudaStream_t stream) {
  const AddLayerNormRows& of = params.of;
  const auto grid =
      static_cast<unsigned>(std::min<int64_t>(num_groups(of.rows, of.stream), kMaxGridX));
  const uint64_t addresses = address(params.x) | address(params.branch) | address(params.weight) |
                             address(params.bias) | address(params.sum) | address(params.normed);
  return dispatch_vector(of, addresses, [&](auto x, auto p, auto size) {
    using X = typename decltype(x)::type;
    constexpr int kVector = decltype(size)::value;
    const auto kernel = add_layer_norm_kernel<X, typename decltype(p)::type, kVector>;
    return launch(kernel, grid, num_threads<X, kVector>(of.width), stream, params);
  });
}

cudaError_t launch_add_layer_norm_bwd(const AddLayerNormBwdParams& params, cudaStream_t stream) {
  const AddLayerNormRows& of = params.of;
  const auto grid = static_cast<unsigned>(add_layer_norm_num_partials(of.rows, of.stream));
  const uint64_t addresses = address(params.grad_sum) | address(params.grad_normed) |
                             address(params.sum) | address(params.weight) | address(params.grad_x) |
                             address(params.grad_branch) | address(params.partials);
  return dispatch_vector(of, addresses, [&](auto x, auto p, auto size) {
    using X = typename decltype(x)::type;
    constexpr int kVector = decltype(size)::value;
    const auto kernel = add_layer_norm_bwd_kernel<X, typename decltype(p)::type, kVector>;
    return launch(kernel, grid, num_threads<X, kVector>(of.width), stream, params);
  });
}

cudaError_t launch_add_layer_norm_affine(const AddLayerNormAffineParams& params,
                                         cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((2 * params.width + kColumns - 1) / kColumns);
  return dispatch_dtype<float, double>(params.accumulator, [&](auto type) {
    return launch(add_layer_norm_affine_kernel<typename decltype(type)::type>, grid,
                  kColumns * kColumns, stream, params);
  });
}

}  // namespace m3i
