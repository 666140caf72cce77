// boltzmann on the CPU: computes C tile by tile with torch's GEMM; cpu/op_cpu.cpp gives the reason.
#pragma once

#include "boltzmann/cpu/kernel_table.h"
#include "boltzmann/tiles.h"
#include "m3i/cpu/isa.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace m3i {
namespace {

using torch::stable::Tensor;

// The size of a tile, and of the runs of rows that its threads take.
constexpr int64_t kTileColumns = boltzmann::kCpuTileColumns;
constexpr int64_t kRunRows = boltzmann::kCpuRunRows;
constexpr int64_t kLeastRuns = boltzmann::kCpuLeastRuns, kMostRuns = 32;

// Smallest number of a tile's elements for which another thread pays off.
constexpr int64_t kGrainElements = 16 * 1024;

// The id of padding and of ignored columns.
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

// A matrix of wide elements that does not own its memory.
template <class A>
struct Matrix {
  A* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }

  // Not a view of an input, for which torch would check whether it requires a gradient.
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

// Rows of an input in wide elements: in place, or a widened copy.
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

// Copies a row of a [count, total] array, from `first` on, into padded memory.
template <class A>
void copy_padded(const void* from, const Extent& extent, int64_t stride, A filler, A* to) {
  const A* values = static_cast<const A*>(from) + extent.first;
  std::copy(values, values + extent.count, to);
  std::fill(to + extent.count, to + stride, filler);
}

// Iterates over all tiles, columns in the outer loop, so that their arrays are prepared once.
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

  // Calls body(run, begin, end) for runs of the tile's rows, divided among threads.
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
    // The GEMM does not write the padding, where an earlier, wider tile may have left NaN.
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

}  // namespace
}  // namespace m3i
