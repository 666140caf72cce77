// boltzmann: the ops on the CPU; kernels in boltzmann_cpu_kernels.h, once for each instruction set.
//
// The dot products are computed a tile at a time, by torch's own GEMM with all of its threads, and
// the threads then share out the tile's rows for everything else. A tile is written and read while
// it lies in the cache; at 512 features it costs 1,000 flops an element in the GEMMs and about 30
// in the rest. Gradients take three GEMMs on each tile: C again, then both products with G, which
// has taken C's place. The memory is that of a tile, whatever N and M are.
//
// Sums over columns are added up by runs of kRunRows rows, in the order of the runs: like all else
// here but the GEMMs, they do not depend on how many threads there are.
#include "boltzmann/boltzmann_cpu.h"

#include "boltzmann/boltzmann_args.h"
#include "m3i/cpu_isa.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Of a tile; measured at N = M = 8192, D = 512 with two threads.
constexpr int64_t kTileColumns = 768;
constexpr int64_t kRunRows = 128;
constexpr int64_t kLeastRuns = 8, kMostRuns = 32;

// Below this many elements of a tile a thread is not worth waking.
constexpr int64_t kGrainElements = 16 * 1024;

// What the columns of padding have, and those that are ignored.
constexpr int32_t kNoId = -2;

template <class A>
const BoltzmannCpuKernels<A>& pick(const BoltzmannCpuKernels<float>& of_float,
                                   const BoltzmannCpuKernels<double>& of_double) {
  if constexpr (std::is_same_v<A, float>) {
    return of_float;
  } else {
    return of_double;
  }
}

template <class A>
const BoltzmannCpuKernels<A>& fastest_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return pick<A>(kBoltzmannAvx512Float, kBoltzmannAvx512Double);
  if (cpu_isa() == CpuIsa::kAvx2) return pick<A>(kBoltzmannAvx2Float, kBoltzmannAvx2Double);
#endif
  return pick<A>(kBoltzmannBaselineFloat, kBoltzmannBaselineDouble);
}

// ---- Products -----------------------------------------------------------------------------------

// A matrix of wide elements in memory that something else owns.
template <class A>
struct Matrix {
  A* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }

  // Not a view of an input: torch would ask whether that needs a gradient.
  Tensor tensor() const {
    using torch::headeronly::ScalarType;
    constexpr auto kType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    kType);
  }
};

// to = a b, or to += a b
template <class A>
void multiply(const Matrix<A>& to, const Matrix<A>& a, const Matrix<A>& b, bool add) {
  const Tensor out = to.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.tensor().get(),
                                                         b.tensor().get(), add ? 1.0 : 0.0, 1.0));
}

// Rows of an input in wide elements: where they lie, or widened.
template <class A>
class WideRows {
 public:
  WideRows(const BoltzmannCpuKernels<A>& kernels, DType dtype, const void* rows, int64_t width,
           int64_t most)
      : kernels_(kernels), dtype_(dtype), rows_(rows), width_(width) {
    if (dtype != kDType<A>) copy_.resize(most * width);
  }

  Matrix<A> get(int64_t first, int64_t count) {
    if (dtype_ == kDType<A>) {
      return matrix(static_cast<A*>(const_cast<void*>(rows_)) + first * width_, count);
    }
    const auto* from = static_cast<const uint16_t*>(rows_) + first * width_;
    torch::stable::parallel_for(
        0, count, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width_)),
        [&](int64_t begin, int64_t end) {
          kernels_.widen(dtype_, from + begin * width_, (end - begin) * width_,
                         copy_.data() + begin * width_);
        });
    return matrix(copy_.data(), count);
  }

 private:
  Matrix<A> matrix(A* data, int64_t count) const { return {data, count, width_, width_, 1}; }

  const BoltzmannCpuKernels<A>& kernels_;
  DType dtype_;
  const void* rows_;
  int64_t width_;
  std::vector<A> copy_;
};

// ---- Tiles --------------------------------------------------------------------------------------

struct Extent {
  int64_t first, count;
};

struct Tiling {
  int64_t rows, columns, stride, runs;

  explicit Tiling(const BoltzmannInput& input) {
    const int64_t threads = torch::stable::get_num_threads();
    runs = std::clamp(threads, kLeastRuns, kMostRuns);
    runs = std::min(runs, (input.rows + kRunRows - 1) / kRunRows);
    rows = std::min(runs * kRunRows, input.rows);
    columns = std::min(kTileColumns, input.columns);
    stride = padded(columns);
  }
  static int64_t padded(int64_t columns) {
    return (columns + kBoltzmannPadding - 1) / kBoltzmannPadding * kBoltzmannPadding;
  }
};

// A row of a [count, total] array, from `first` on, into padded memory.
template <class A>
void copy_padded(const void* from, const Extent& extent, int64_t stride, A filler, A* to) {
  const A* values = static_cast<const A*>(from) + extent.first;
  std::copy(values, values + extent.count, to);
  std::fill(to + extent.count, to + stride, filler);
}

// Goes through all tiles: columns outside, so that what belongs to them is prepared once.
template <class A>
class Tiles {
 public:
  explicit Tiles(const BoltzmannInput& input)
      : kernels(fastest_kernels<A>()),
        tiling(input),
        input_(input),
        z_hat_(kernels, input.dtype, input.z_hat, input.width, tiling.rows),
        z_(kernels, input.dtype, input.z, input.width, tiling.columns),
        products_(tiling.rows * tiling.stride),
        bias_(tiling.stride),
        shift_(tiling.stride),
        weights_(kNumWeights * tiling.stride),
        ids_(tiling.stride),
        zeros_(kNumWeights * input.rows) {
    tile_.num_rows = input.rows;
    tile_.scale = *static_cast<const A*>(input.scale);
    tile_.any_id = input.col_ids != nullptr;
    tile_.bias = bias_.data();
    tile_.col_ids = ids_.data();
    tile_.col_shift = shift_.data();
    tile_.col_weights = weights_.data();
    tile_.products = products_.data();
  }

  // Where null, shifts and weights are 0.
  void use(const BoltzmannShift& shift, const void* row_weights, const void* col_weights) {
    shift_of_all_ = shift;
    row_weights_ = row_weights;
    col_weights_ = col_weights;
  }

  // body(tile, rows, columns, z_hat of these rows, z of these columns), with C in the tile.
  template <class Body>
  void for_each(const Body& body) {
    for (int64_t first = 0; first < input_.columns; first += tiling.columns) {
      const Extent columns{first, std::min(tiling.columns, input_.columns - first)};
      const Matrix<A> z = z_.get(columns.first, columns.count);
      set_columns(columns);
      for (int64_t row = 0; row < input_.rows; row += tiling.rows) {
        const Extent rows{row, std::min(tiling.rows, input_.rows - row)};
        const Matrix<A> z_hat = z_hat_.get(rows.first, rows.count);
        set_rows(rows);
        multiply(products(rows, columns), z_hat, z.transposed(), false);
        body(tile_, rows, columns, z_hat, z);
      }
    }
  }

  // body(run, begin, end) for runs of the tile's rows, shared out among threads.
  template <class Body>
  void for_runs(const Extent& rows, const Body& body) const {
    const int64_t runs = (rows.count + kRunRows - 1) / kRunRows;
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (kRunRows * tile_.stride));
    torch::stable::parallel_for(0, runs, grain, [&](int64_t first, int64_t last) {
      for (int64_t run = first; run < last; ++run) {
        body(run, run * kRunRows, std::min((run + 1) * kRunRows, rows.count));
      }
    });
  }

  // The tile's first columns.count columns.
  Matrix<A> products(const Extent& rows, const Extent& columns) {
    return {products_.data(), rows.count, columns.count, tile_.stride, 1};
  }

  const BoltzmannCpuKernels<A>& kernels;
  const Tiling tiling;

 private:
  void set_columns(const Extent& extent) {
    const int64_t stride = tile_.stride = Tiling::padded(extent.count);
    // The GEMM leaves padding alone: what an earlier, wider tile left there may be no number.
    std::fill(products_.begin(), products_.end(), A{0});
    copy_padded(input_.bias, extent, stride, -std::numeric_limits<A>::infinity(), bias_.data());
    if (shift_of_all_.columns) {
      copy_padded(shift_of_all_.columns, extent, stride, A{0}, shift_.data());
    }
    for (int which = 0; col_weights_ && which < kNumWeights; ++which) {
      const Extent of_weight{which * input_.columns + extent.first, extent.count};
      copy_padded(col_weights_, of_weight, stride, A{0}, weights_.data() + which * stride);
    }
    tile_.first_id = static_cast<int32_t>(extent.first);
    tile_.end_id = static_cast<int32_t>(extent.first + extent.count);
    for (int64_t j = 0; j < stride; ++j) {
      const int32_t id = input_.col_ids && j < extent.count ? input_.col_ids[extent.first + j]
                                                            : tile_.first_id + int32_t(j);
      ids_[j] = j < extent.count ? id : kNoId;
    }
  }

  void set_rows(const Extent& extent) {
    const auto from_first = [&](const void* of_rows) {
      return (of_rows ? static_cast<const A*>(of_rows) : zeros_.data()) + extent.first;
    };
    tile_.first_row = extent.first;
    tile_.row_ids = input_.row_ids + extent.first;
    tile_.row_shift = from_first(shift_of_all_.rows);
    tile_.row_weights = from_first(row_weights_);
  }

  const BoltzmannInput& input_;
  BoltzmannShift shift_of_all_{nullptr, nullptr};
  const void* row_weights_ = nullptr;
  const void* col_weights_ = nullptr;
  BoltzmannTile<A> tile_{};
  WideRows<A> z_hat_, z_;
  std::vector<A> products_, bias_, shift_, weights_;
  std::vector<int32_t> ids_;
  std::vector<A> zeros_;
};

// ---- Ops ----------------------------------------------------------------------------------------

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
