// gaussian: the matrix products of the decorrelation, by torch.
//
// C = t^T t / R needs the normalised rows as a matrix. Folding mean and rstd into a product of z
// itself would need one factor scaled row by row, also a copy of [R, D], and the difference,
// z^T S z - m m^T, cancels where the mean is large. Therefore the forward kernel, which has the row
// in cache, writes it once in the dtype of z, and the copy is freed once C is computed.
//
// Forward: two products to [D, D], 4 R D^2 flops. Backward: C p is computed again, 2 R D^2 flops,
// rather than saved by the forward, [R, D] elements for the lifetime of the graph.
#pragma once

#include "gaussian/args.h"

#include <array>

namespace m3i {
namespace detail {

// out = a b; out has the dtype of a, or float32 for a half type on CUDA. The out= variant is not
// autocast, which would round float32 factors.
inline void multiply_into(const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                          const torch::stable::Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(a), from(b)};
  const bool widens = a.scalar_type() != out.scalar_type();
  if (widens) stack[2] = from(out.scalar_type());
  stack[widens ? 3 : 2] = from(out);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", widens ? "dtype_out" : "out",
                                                      stack.data(), TORCH_ABI_VERSION));
  // The op returns another handle of `out`, which has to be released.
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// Rows that a CPU widens at a time, since torch's product of half types gives half types there.
inline constexpr int64_t kWidenedRows = 1024;

// x^T x of half types on a CPU, by blocks of rows that are widened to float32.
inline torch::stable::Tensor gram_by_parts(const torch::stable::Tensor& x,  // [R, D] half type
                                           int64_t rows, int64_t width) {
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  const auto new_square = [&] { return torch::stable::new_empty(x, {width, width}, kFloat); };
  torch::stable::Tensor sum = new_square(), part = new_square();
  for (int64_t begin = 0; begin < rows; begin += kWidenedRows) {
    const torch::stable::Tensor wide =
        torch::stable::to(torch::stable::narrow(const_cast<torch::stable::Tensor&>(x), 0, begin,
                                                std::min(kWidenedRows, rows - begin)),
                          kFloat);
    multiply_into(torch::stable::transpose(wide, 0, 1), wide, begin == 0 ? sum : part);
    if (begin == 0) continue;
    float* to = sum.mutable_data_ptr<float>();
    const float* from = part.const_data_ptr<float>();
    for (int64_t i = 0; i < width * width; ++i) to[i] += from[i];
  }
  return sum;
}

}  // namespace detail

// The sum over rows of x x^T.
inline torch::stable::Tensor gaussian_gram(const torch::stable::Tensor& x,  // [..., D], R > 0
                                           const GaussianRows& of) {        // -> [D, D] A
  const torch::stable::Tensor rows = torch::stable::view(x, {of.rows, of.width});
  const auto accumulator = detail::gaussian_accumulator(x);
  if (x.scalar_type() != accumulator && !x.is_cuda()) {
    return detail::gram_by_parts(rows, of.rows, of.width);
  }
  torch::stable::Tensor out = torch::stable::new_empty(x, {of.width, of.width}, accumulator);
  detail::multiply_into(torch::stable::transpose(rows, 0, 1), rows, out);
  return out;
}

// C p for every row p, in the dtype of z_hat.
inline torch::stable::Tensor gaussian_pull(const torch::stable::Tensor& z_hat,       // [..., D]
                                           const torch::stable::Tensor& covariance,  // [D, D]
                                           const GaussianRows& of) {                 // -> [R, D]
  torch::stable::Tensor out = torch::stable::new_empty(z_hat, {of.rows, of.width});
  detail::multiply_into(torch::stable::view(z_hat, {of.rows, of.width}), covariance, out);
  return out;
}

}  // namespace m3i
