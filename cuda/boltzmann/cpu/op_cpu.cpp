// boltzmann: the ops on the CPU; kernels in cpu/kernels.h, once for each instruction set.
//
// The dot products are computed a tile at a time, by torch's own GEMM with all of its threads, and
// the threads then share out the tile's rows for everything else. A tile is written and read while
// it lies in the cache; at 512 features it costs 1,000 flops an element in the GEMMs and about 30
// in the rest. Gradients take three GEMMs on each tile: C again, then both products with G, which
// has taken C's place. The memory is that of a tile, whatever N and M are.
//
// Sums over columns are added up by runs of kRunRows rows, in the order of the runs: like all else
// here but the GEMMs, they do not depend on how many threads there are.
#include "boltzmann/cpu/tiles.h"

#include "boltzmann/args.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace m3i {
namespace {

bool has_work(const BoltzmannInput& input) { return !input.run || *input.run; }

void check_ids(const BoltzmannInput& input) {
  if (input.col_ids || input.columns == 0) return;  // of no columns there are no ids either
  for (int64_t i = 0; i < input.rows; ++i) {
    STD_TORCH_CHECK(-1 <= input.row_ids[i] && input.row_ids[i] < input.columns,
                    "targets: expected rows of z from 0 to ", input.columns - 1,
                    ", or -1 to ignore, got ", input.row_ids[i], " in place ", i);
  }
}

// body(Type<A>{}), A the wide type.
template <class Body>
void dispatch_wide(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body(Type<double>{}) : body(Type<float>{});
}

template <class A>
void compute_maxima(const BoltzmannMaximaParams& params) {
  Tiles<A> tiles(params.input);
  const int64_t stride = tiles.tiling.stride;
  A* const row_max = static_cast<A*>(params.row_max);
  A* const col_max = static_cast<A*>(params.col_max);
  std::fill(row_max, row_max + params.input.rows, -std::numeric_limits<A>::infinity());
  std::fill(col_max, col_max + params.input.columns, -std::numeric_limits<A>::infinity());
  std::vector<A> of_runs(tiles.tiling.runs * stride);
  tiles.for_each([&](const BoltzmannTile<A>& tile, const Extent& rows, const Extent& columns,
                     const auto&, const auto&) {
    tiles.for_runs(rows, [&](int64_t run, int64_t begin, int64_t end) {
      tiles.kernels.maxima(tile, begin, end, row_max + rows.first, of_runs.data() + run * stride);
    });
    for (int64_t run = 0; run * kRunRows < rows.count; ++run) {
      for (int64_t j = 0; j < columns.count; ++j) {
        A& most = col_max[columns.first + j];
        most = std::max(most, of_runs[run * stride + j]);
      }
    }
  });
}

template <class A>
void compute_sums(const BoltzmannSumsParams& params) {
  const int64_t num_rows = params.input.rows, num_columns = params.input.columns;
  Tiles<A> tiles(params.input);
  tiles.use(params.shift, nullptr, nullptr);
  const int64_t run_size = kNumSums * tiles.tiling.stride;
  A* const row_sums = static_cast<A*>(params.rows);
  A* const col_sums = static_cast<A*>(params.columns);
  std::fill(row_sums, row_sums + kNumSums * num_rows, A{0});
  if (col_sums) std::fill(col_sums, col_sums + kNumSums * num_columns, A{0});
  std::vector<A> of_runs(tiles.tiling.runs * run_size);
  tiles.for_each([&](const BoltzmannTile<A>& tile, const Extent& rows, const Extent& columns,
                     const auto&, const auto&) {
    tiles.for_runs(rows, [&](int64_t run, int64_t begin, int64_t end) {
      tiles.kernels.sums(tile, begin, end, params.exact, params.sigmoid, row_sums + rows.first,
                         of_runs.data() + run * run_size);
    });
    for (int64_t run = 0; col_sums && run * kRunRows < rows.count; ++run) {
      for (int which = 0; which < kNumSums; ++which) {
        const A* from = of_runs.data() + run * run_size + which * tile.stride;
        A* to = col_sums + which * num_columns + columns.first;
        for (int64_t j = 0; j < columns.count; ++j) to[j] += from[j];
      }
    }
  });
}

template <class A>
void compute_grads(const BoltzmannGradsParams& params) {
  const BoltzmannInput& input = params.input;
  Tiles<A> tiles(input);
  tiles.use(params.shift, params.row_weights, params.col_weights);
  const int64_t stride = tiles.tiling.stride, width = input.width;
  std::vector<A> bias_of_runs(tiles.tiling.runs * stride);
  std::vector<double> scale_of_runs(tiles.tiling.runs);
  double grad_scale = 0;
  A* const grad_z_hat = static_cast<A*>(params.grad_z_hat);
  A* const grad_z = static_cast<A*>(params.grad_z);
  A* const grad_bias = static_cast<A*>(params.grad_bias);
  A* const values = static_cast<A*>(params.values);
  if (grad_z_hat && !input.columns) std::fill(grad_z_hat, grad_z_hat + input.rows * width, A{0});
  if (grad_z && !input.rows) std::fill(grad_z, grad_z + input.columns * width, A{0});
  if (grad_bias) std::fill(grad_bias, grad_bias + input.columns, A{0});
  if (values) std::fill(values, values + input.rows, A{0});
  tiles.for_each([&](const BoltzmannTile<A>& tile, const Extent& rows, const Extent& columns,
                     const Matrix<A>& z_hat, const Matrix<A>& z) {
    tiles.for_runs(rows, [&](int64_t run, int64_t begin, int64_t end) {
      tiles.kernels.grads(tile, begin, end, *params.exact, params.sigmoid, &scale_of_runs[run],
                          bias_of_runs.data() + run * stride,
                          values ? values + rows.first : values);
    });
    for (int64_t run = 0; run * kRunRows < rows.count; ++run) {
      grad_scale += scale_of_runs[run];
      for (int64_t j = 0; grad_bias && j < columns.count; ++j) {
        grad_bias[columns.first + j] += bias_of_runs[run * stride + j];
      }
    }
    const Matrix<A> g = tiles.products(rows, columns);
    const auto rows_of = [&](A* grad, const Extent& extent) {
      return Matrix<A>{grad + extent.first * width, extent.count, width, width, 1};
    };
    if (grad_z_hat) multiply(rows_of(grad_z_hat, rows), g, z, columns.first > 0);
    if (grad_z) multiply(rows_of(grad_z, columns), g.transposed(), z_hat, rows.first > 0);
  });
  *static_cast<A*>(params.grad_scale) = static_cast<A>(grad_scale);
}

std::tuple<Tensor, Tensor> boltzmann_maxima_cpu(const Tensor& z_hat, const Tensor& z,
                                                const Tensor& scale, const Tensor& bias,
                                                const Tensor& row_ids, std::optional<Tensor> run) {
  const BoltzmannMaximaCall call =
      prepare_boltzmann_maxima({z_hat, z, scale, bias, row_ids, std::nullopt}, run);
  if (!has_work(call.params.input)) return call.out;
  dispatch_wide(call.params.input.dtype,
                [&](auto type) { compute_maxima<typename decltype(type)::type>(call.params); });
  return call.out;
}

std::tuple<Tensor, Tensor> boltzmann_sums_cpu(const Tensor& z_hat, const Tensor& z,
                                              const Tensor& scale, const Tensor& bias,
                                              const Tensor& row_ids, std::optional<Tensor> col_ids,
                                              const Tensor& row_shift, const Tensor& col_shift,
                                              bool exact, bool symmetric, bool sigmoid,
                                              std::optional<Tensor> run) {
  const BoltzmannSumsCall call =
      prepare_boltzmann_sums({z_hat, z, scale, bias, row_ids, col_ids}, row_shift, col_shift, exact,
                             symmetric, sigmoid, run);
  if (!has_work(call.params.input)) return call.out;
  check_ids(call.params.input);
  dispatch_wide(call.params.input.dtype,
                [&](auto type) { compute_sums<typename decltype(type)::type>(call.params); });
  return call.out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_grads_cpu(
    const Tensor& z_hat, const Tensor& z, const Tensor& scale, const Tensor& bias,
    const Tensor& row_ids, std::optional<Tensor> col_ids, const Tensor& row_shift,
    const Tensor& col_shift, const Tensor& exact, const Tensor& row_weights,
    const Tensor& col_weights, bool sigmoid, std::vector<bool> needs_grad) {
  const BoltzmannGradsCall call =
      prepare_boltzmann_grads({z_hat, z, scale, bias, row_ids, col_ids}, row_shift, col_shift,
                              exact, row_weights, col_weights, sigmoid, needs_grad);
  check_ids(call.params.input);
  dispatch_wide(call.params.input.dtype,
                [&](auto type) { compute_grads<typename decltype(type)::type>(call.params); });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("boltzmann_maxima", TORCH_BOX(&boltzmann_maxima_cpu));
  library.impl("boltzmann_sums", TORCH_BOX(&boltzmann_sums_cpu));
  library.impl("boltzmann_grads", TORCH_BOX(&boltzmann_grads_cpu));
}

}  // namespace
}  // namespace m3i
