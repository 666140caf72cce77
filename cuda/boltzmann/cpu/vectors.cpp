// boltzmann on vectors, on the CPU (vectors/params.h).
//
// A sum's or a maximum's parts are runs of neighbouring rows, which threads share out: what they
// leave does not depend on how many threads there are.
#include "boltzmann/cpu/tiles.h"

#include "boltzmann/tiling.h"
#include "boltzmann/vectors/args.h"
#include "boltzmann/vectors/losses.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace m3i {
namespace {

using namespace boltzmann;
using torch::headeronly::ScalarType;

template <class Body>
void dispatch_wide(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body(Type<double>{}) : body(Type<float>{});
}

template <class A>
A number(const void* at) {
  return at ? *static_cast<const A*>(at) : A{1};
}

// The share of one of the parts in `length` elements.
Extent extent_of(int64_t part, int64_t num_parts, int64_t length) {
  const int64_t each = (length + num_parts - 1) / num_parts;
  const int64_t first = std::min(part * each, length);
  return {first, std::min(each, length - first)};
}

// body(part) for all parts, divided among threads by the work of all.
template <class Body>
void for_parts(int64_t num_parts, int64_t work, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, num_parts * kGrainElements / (work + 1));
  torch::stable::parallel_for(0, num_parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part);
  });
}

// ---- Ids ----------------------------------------------------------------------------------------

// The first column of each id, in open addressing.
class IdTable {
 public:
  IdTable(const int64_t* ids, int64_t count)
      : size_(table_size(count)), keys_(size_, kIgnoredRow), firsts_(size_) {
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] == kIgnoredRow) continue;
      const uint64_t slot = find(ids[i]);
      if (keys_[slot] == ids[i]) continue;
      keys_[slot] = ids[i];
      firsts_[slot] = static_cast<int32_t>(i);
    }
  }

  // `otherwise` for an id of no column.
  int32_t first_column(int64_t id, int64_t otherwise) const {
    const uint64_t slot = find(id);
    return keys_[slot] == id ? firsts_[slot] : static_cast<int32_t>(otherwise);
  }

 private:
  uint64_t find(int64_t id) const {
    uint64_t slot = slot_of(id, size_);
    while (keys_[slot] != kIgnoredRow && keys_[slot] != id) slot = (slot + 1) & (size_ - 1);
    return slot;
  }

  int64_t size_;
  std::vector<int64_t> keys_;  // kIgnoredRow: free
  std::vector<int32_t> firsts_;
};

void write_ids(const BoltzmannPrepareParams& params) {
  const int64_t num_columns = params.num_columns;
  if (!params.row_ids) {
    for (int64_t i = 0; i < params.rows; ++i) {
      params.out_row_ids[i] = static_cast<int32_t>(params.first_column + i);
    }
  } else if (!params.col_ids) {
    for (int64_t i = 0; i < params.rows; ++i) {
      const int64_t id = params.row_ids[i];
      STD_TORCH_CHECK(num_columns == 0 || (kIgnoredRow <= id && id < num_columns),
                      "targets: expected rows of z from 0 to ", num_columns - 1,
                      ", or -1 to ignore, got ", id, " in place ", i);
      params.out_row_ids[i] = static_cast<int32_t>(id);
    }
  } else {
    const IdTable table(params.col_ids, num_columns);
    const auto write = [&](const int64_t* ids, int64_t count, int32_t ignored, int32_t* to) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = ids[i] == kIgnoredRow ? ignored : table.first_column(ids[i], num_columns);
      }
    };
    write(params.row_ids, params.rows, kIgnoredRow, params.out_row_ids);
    write(params.col_ids, num_columns, kIgnoredColumn, params.out_col_ids);
  }
}

// ---- Prepare ------------------------------------------------------------------------------------

template <class A>
void write_bias(const BoltzmannPrepareParams& params) {
  const A* const bias = static_cast<const A*>(params.bias);
  A* const to = static_cast<A*>(params.out_bias);
  for (int64_t j = 0; j < params.columns; ++j) {
    to[j] = bias ? bias[params.has_bias_each ? j : 0] : A{0};
    if (params.col_ids && params.col_ids[params.first_column + j] == kIgnoredRow) {
      to[j] = -std::numeric_limits<A>::infinity();
    }
  }
}

template <class A>
void write_extremes(const BoltzmannPrepareParams& params) {
  const BoltzmannCpuKernels<A>& kernels = fastest_kernels<A>();
  const A* const bias = static_cast<const A*>(params.out_bias);
  const int64_t row_bytes = params.width * boltzmann::bytes_of(params.dtype);
  const auto add_length = [&](const void* rows, int64_t i, A& square) {
    const void* row = static_cast<const char*>(rows) + i * row_bytes;
    square = larger_or_nan(square, kernels.square_length(params.dtype, row, params.width));
  };
  for_parts(params.num_parts, (params.rows + params.columns) * params.width, [&](int64_t part) {
    A extremes[kNumExtremes] = {};
    const Extent rows = extent_of(part, params.num_parts, params.rows);
    const Extent columns = extent_of(part, params.num_parts, params.columns);
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
      if (params.out_row_ids[i] == kIgnoredRow) continue;
      extremes[kNumRows] += 1;
      add_length(params.z_hat, i, extremes[kLongestRow]);
    }
    for (int64_t j = columns.first; j < columns.first + columns.count; ++j) {
      if (bias[j] == -std::numeric_limits<A>::infinity()) continue;
      extremes[kLargestBias] =
          larger_or_nan(extremes[kLargestBias], bias[j] < 0 ? -bias[j] : bias[j]);
      add_length(params.z, j, extremes[kLongestColumn]);
    }
    for (const int which : {kLongestRow, kLongestColumn})
      extremes[which] = root_of(extremes[which]);
    std::copy(extremes, extremes + kNumExtremes,
              static_cast<A*>(params.extremes) + part * kNumExtremes);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> boltzmann_prepare_cpu(
    const Tensor& z_hat, const Tensor& z, OptionalTensor bias, OptionalTensor row_ids,
    OptionalTensor col_ids, int64_t first_column, std::optional<int64_t> num_columns) {
  const BoltzmannPrepareCall call =
      prepare_boltzmann_prepare(z_hat, z, bias, row_ids, col_ids, first_column, num_columns);
  write_ids(call.params);
  dispatch_wide(call.params.dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    write_bias<A>(call.params);
    write_extremes<A>(call.params);
  });
  return call.out;
}

// ---- Shifts -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> boltzmann_shift_cpu(const Tensor& extremes,
                                                               const Tensor& scale,
                                                               const Tensor& row_ids,
                                                               const Tensor& bias) {
  const BoltzmannShiftCall call = prepare_boltzmann_shift(extremes, scale, row_ids, bias);
  const BoltzmannShiftParams& params = call.params;
  dispatch_wide(params.wide, [&](auto type) {
    using A = typename decltype(type)::type;
    const A* from = static_cast<const A*>(params.extremes);
    A most[kNumExtremes] = {};
    for (int64_t i = 0; i < params.num_parts * kNumExtremes; ++i) {
      A& of = most[i % kNumExtremes];
      of = larger_or_nan(of, from[i]);
    }
    const Shift<A> shift = shift_of(most, number<A>(params.scale));
    std::fill_n(static_cast<A*>(params.row_shift), params.rows, shift.common);
    std::fill_n(static_cast<A*>(params.col_shift), params.columns, shift.common);
    *static_cast<A*>(params.bound) = shift.bound;
    *params.run = shift.run;
  });
  return call.out;
}

template <class A>
bool any_out_of_range(const void* sums, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const SumsOfOne<A> of = sums_at<A>(sums, length, i);
    if (is_out_of_range(of.negatives, of.positives, of.count)) return true;
  }
  return false;
}

Tensor boltzmann_exact_cpu(const Tensor& rows, const Tensor& cols, const Tensor& run) {
  const BoltzmannExactCall call = prepare_boltzmann_exact(rows, cols, run);
  const BoltzmannExactParams& params = call.params;
  dispatch_wide(params.wide, [&](auto type) {
    using A = typename decltype(type)::type;
    *params.exact = !*params.run || any_out_of_range<A>(params.sums.of_rows, params.sums.rows) ||
                    any_out_of_range<A>(params.sums.of_columns, params.sums.columns);
  });
  return call.out;
}

std::tuple<Tensor, Tensor> boltzmann_exact_shift_cpu(const Tensor& row_max, const Tensor& col_max,
                                                     const Tensor& row_shift,
                                                     const Tensor& col_shift, const Tensor& exact) {
  const BoltzmannExactShiftCall call =
      prepare_boltzmann_exact_shift(row_max, col_max, row_shift, col_shift, exact);
  const BoltzmannExactShiftParams& params = call.params;
  dispatch_wide(params.wide, [&](auto type) {
    using A = typename decltype(type)::type;
    const auto write = [&](const void* most, const void* shift, int64_t length, void* to) {
      const A* from = static_cast<const A*>(*params.exact ? most : shift);
      // The maximum of a row whose columns are all ignored
      std::transform(from, from + length, static_cast<A*>(to), [](A value) {
        return value == -std::numeric_limits<A>::infinity() ? A{0} : value;
      });
    };
    write(params.row_max, params.row_shift, params.rows, params.out_row_shift);
    write(params.col_max, params.col_shift, params.columns, params.out_col_shift);
  });
  return call.out;
}

// ---- Losses -------------------------------------------------------------------------------------

const BoltzmannSumsOf& settled(const BoltzmannLossInput& input) {
  return input.has_again && *input.exact ? input.again : input.sums;
}

template <class A>
void write_totals(const BoltzmannTotalsParams& params) {
  const BoltzmannSumsOf& sums = settled(params.input);
  // A logarithm or two of each, about as long as this many elements of a row
  constexpr int64_t kElements = 16;
  for_parts(params.num_parts, (sums.rows + sums.columns) * kElements, [&](int64_t part) {
    A totals[kNumTotals] = {};
    const auto add = [&](const void* of_all, int64_t length, const void* shifts, int loss) {
      const Extent extent = extent_of(part, params.num_parts, length);
      for (int64_t i = extent.first; i < extent.first + extent.count; ++i) {
        const SumsOfOne<A> of = sums_at<A>(of_all, length, i);
        totals[loss] += loss_of(of, static_cast<const A*>(shifts)[i]);
        totals[loss + 1] += of.count > 0 ? 1 : 0;
      }
    };
    add(sums.of_rows, sums.rows, params.input.row_shift, kRowLoss);
    add(sums.of_columns, sums.columns, params.input.col_shift, kColumnLoss);
    std::copy(totals, totals + kNumTotals, static_cast<A*>(params.totals) + part * kNumTotals);
  });
}

Tensor boltzmann_totals_cpu(const Tensor& rows, const Tensor& cols, OptionalTensor rows_again,
                            OptionalTensor cols_again, const Tensor& row_shift,
                            const Tensor& col_shift, const Tensor& exact) {
  const BoltzmannTotalsCall call =
      prepare_boltzmann_totals({rows, cols, rows_again, cols_again, row_shift, col_shift, exact});
  dispatch_wide(call.params.input.wide,
                [&](auto type) { write_totals<typename decltype(type)::type>(call.params); });
  return call.out;
}

template <class A>
void write_loss(const BoltzmannLossParams& params) {
  const bool symmetric = params.input.symmetric;
  A totals[kNumTotals] = {};
  for (int64_t i = 0; i < params.num_parts * kNumTotals; ++i) {
    totals[i % kNumTotals] += static_cast<const A*>(params.totals)[i];
  }
  const Shares<A> shares = shares_of(totals, symmetric, params.mean);
  const BoltzmannSumsOf& sums = settled(params.input);
  A* const row_weights = static_cast<A*>(params.row_weights);
  A* const col_weights = static_cast<A*>(params.col_weights);
  for (int64_t i = 0; i < sums.rows; ++i) {
    write_weights(sums_at<A>(sums.of_rows, sums.rows, i), A{1}, sums.rows, row_weights + i);
  }
  for (int64_t i = 0; i < params.num_columns; ++i) {
    const SumsOfOne<A> of =
        symmetric ? sums_at<A>(sums.of_columns, sums.columns, i) : SumsOfOne<A>{};
    write_weights(of, shares.column / shares.row, params.num_columns, col_weights + i);
  }
  *static_cast<A*>(params.value) = value_of(totals, shares, number<A>(params.bound), symmetric);
  *static_cast<A*>(params.share) = shares.row * static_cast<A>(params.ranks);
  *static_cast<A*>(params.num_rows) = totals[kRowCount];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_loss_cpu(
    const Tensor& rows, const Tensor& cols, OptionalTensor rows_again, OptionalTensor cols_again,
    const Tensor& row_shift, const Tensor& col_shift, const Tensor& exact, const Tensor& totals,
    const Tensor& bound, bool symmetric, bool mean, int64_t ranks) {
  const BoltzmannLossCall call =
      prepare_boltzmann_loss({rows, cols, rows_again, cols_again, row_shift, col_shift, exact},
                             totals, bound, symmetric, mean, ranks);
  dispatch_wide(call.params.input.wide,
                [&](auto type) { write_loss<typename decltype(type)::type>(call.params); });
  return call.out;
}

std::tuple<Tensor, Tensor> boltzmann_sigmoid_loss_cpu(const Tensor& values, const Tensor& extremes,
                                                      const Tensor& bound, bool mean,
                                                      int64_t ranks) {
  const BoltzmannSigmoidLossCall call =
      prepare_boltzmann_sigmoid_loss(values, extremes, bound, mean, ranks);
  const BoltzmannSigmoidLossParams& params = call.params;
  dispatch_wide(params.wide, [&](auto type) {
    using A = typename decltype(type)::type;
    const A* const of_rows = static_cast<const A*>(params.values);
    const A* const of_parts = static_cast<const A*>(params.extremes);
    double sum = 0;
    for (int64_t i = 0; i < params.num_values; ++i) sum += of_rows[i];
    A rows = 0;
    for (int64_t i = 0; i < params.num_parts; ++i) rows += of_parts[i * kNumExtremes + kNumRows];
    const A share = sigmoid_share(rows, mean), limit = number<A>(params.bound);
    *static_cast<A*>(params.value) = share * static_cast<A>(sum) + (limit - limit);
    *static_cast<A*>(params.share) = share * static_cast<A>(ranks);
  });
  return call.out;
}

// ---- Backward -----------------------------------------------------------------------------------

template <class A>
void write_scaled(const BoltzmannScaleParams& params) {
  const BoltzmannCpuKernels<A>& kernels = fastest_kernels<A>();
  const A shared = number<A>(params.grad_out) * number<A>(params.share);
  const A factor = shared * number<A>(params.scale);
  const auto scale = [&](const void* from, int64_t count, void* to) {
    torch::stable::parallel_for(0, count, kGrainElements, [&](int64_t begin, int64_t end) {
      kernels.scale(params.from,
                    static_cast<const char*>(from) + begin * boltzmann::bytes_of(params.from),
                    factor, end - begin, params.to,
                    static_cast<char*>(to) + begin * boltzmann::bytes_of(params.to));
    });
  };
  scale(params.z_hat, params.num_z_hat, params.out_z_hat);
  scale(params.z, params.num_z, params.out_z);
  kernels.scale(kDType<A>, params.of_bias, shared, params.num_bias, kDType<A>, params.out_of_bias);
  *static_cast<A*>(params.factor) = factor;
  *static_cast<A*>(params.out_of_scale) = number<A>(params.of_scale) * shared;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> boltzmann_scale_cpu(
    const Tensor& grad_out, OptionalTensor share, OptionalTensor scale, const Tensor& grad_z_hat,
    const Tensor& grad_z, const Tensor& grad_scale, const Tensor& grad_bias, ScalarType dtype) {
  const BoltzmannScaleCall call = prepare_boltzmann_scale(grad_out, share, scale, grad_z_hat,
                                                          grad_z, grad_scale, grad_bias, dtype);
  dispatch_wide(call.params.wide,
                [&](auto type) { write_scaled<typename decltype(type)::type>(call.params); });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("boltzmann_prepare", TORCH_BOX(&boltzmann_prepare_cpu));
  library.impl("boltzmann_shift", TORCH_BOX(&boltzmann_shift_cpu));
  library.impl("boltzmann_exact", TORCH_BOX(&boltzmann_exact_cpu));
  library.impl("boltzmann_exact_shift", TORCH_BOX(&boltzmann_exact_shift_cpu));
  library.impl("boltzmann_totals", TORCH_BOX(&boltzmann_totals_cpu));
  library.impl("boltzmann_loss", TORCH_BOX(&boltzmann_loss_cpu));
  library.impl("boltzmann_sigmoid_loss", TORCH_BOX(&boltzmann_sigmoid_loss_cpu));
  library.impl("boltzmann_scale", TORCH_BOX(&boltzmann_scale_cpu));
}

}  // namespace
}  // namespace m3i
