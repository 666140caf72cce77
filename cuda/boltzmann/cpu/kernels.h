// boltzmann on the CPU: the kernels, compiled once for each instruction set.
//
// A row is read once, element by element: a logit, its exponential, and the terms of the sums. Rows
// of a tile whose ids cannot occur among its columns have no positives, and take a loop without
// comparisons of ids.
#pragma once

#include "boltzmann/cpu/kernel_table.h"
#include "m3i/cpu/exp.h"

#include <algorithm>
#include <limits>

namespace m3i {
namespace {

template <class A>
using Values = Vec<A, kLanes<A>>;
template <class A>
using Mask = Vec<IntOf<A>, kLanes<A>>;

template <class A>
inline Values<A> load_values(const A* from) {
  return load<kLanes<A>>(from);
}

template <class A>
inline A sum_of(const Values<A>& values) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += values[i];
  return sum;
}

// The mask of columns with the id.
template <class A>
inline Mask<A> has_id(const int32_t* col_ids, int32_t id) {
  return __builtin_convertvector(load<kLanes<A>>(col_ids), Mask<A>) == static_cast<IntOf<A>>(id);
}

// The values where the mask is set, else 0.
template <class A>
inline Values<A> where(const Mask<A>& mask, const Values<A>& values) {
  return bit_cast<Values<A>>(bit_cast<Mask<A>>(values) & mask);
}

template <class A>
inline void add_to(A* to, const Values<A>& values) {
  store(to, load_values(to) + values);
}

// One row of a tile.
template <class A>
struct Row {
  const BoltzmannTile<A>& tile;
  int64_t index;  // in the tile
  A* products;    // [stride]
  int32_t id;
  A shift;

  Values<A> logits(int64_t j) const {
    return load_values(products + j) * tile.scale + load_values(tile.bias + j);
  }
  bool may_have_positives() const {
    return tile.any_id || (tile.first_id <= id && id < tile.end_id);
  }
  A weight(BoltzmannWeight which) const { return tile.row_weights[which * tile.num_rows + index]; }
  Values<A> col_weight(BoltzmannWeight which, int64_t j) const {
    return load_values(tile.col_weights + which * tile.stride + j);
  }
};

// body(row) for each row that is not ignored; ignored(row) for the others.
template <class A, class Body, class Ignored>
inline void for_rows(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, const Body& body,
                     const Ignored& ignored) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t id = tile.row_ids[i];
    const Row<A> row{tile, i, tile.products + i * tile.stride, id, tile.row_shift[i]};
    id < 0 ? ignored(row) : body(row);
  }
}

// ---- Maxima -------------------------------------------------------------------------------------

template <class A>
void maxima(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, A* row_max, A* col_max) {
  constexpr A kLeast = -std::numeric_limits<A>::infinity();
  std::fill(col_max, col_max + tile.stride, kLeast);
  const auto larger = [](const Values<A>& a, const Values<A>& b) { return a > b ? a : b; };
  for_rows(
      tile, begin, end,
      [&](const Row<A>& row) {
        Values<A> most = kLeast - Values<A>{};
        for (int64_t j = 0; j < tile.stride; j += kLanes<A>) {
          const Values<A> logit = row.logits(j);
          most = larger(logit, most);
          store(col_max + j, larger(logit, load_values(col_max + j)));
        }
        for (int k = 0; k < kLanes<A>; ++k) {
          row_max[row.index] = std::max(row_max[row.index], static_cast<A>(most[k]));
        }
      },
      [](const Row<A>&) {});
}

// ---- Sums ---------------------------------------------------------------------------------------

template <class A>
struct RowSums {
  Values<A> values[kNumSums] = {};

  void add_to_row(const Row<A>& row, A* rows) const {
    for (int which = 0; which < kNumSums; ++which) {
      rows[which * row.tile.num_rows + row.index] += sum_of<A>(values[which]);
    }
  }
};

template <class A>
inline Values<A> ones(const Mask<A>& mask) {
  return where<A>(mask, A{1} - Values<A>{});
}

template <class A, bool kExact, bool kWithPositives>
void sum_row(const Row<A>& row, A* rows, A* columns) {
  const BoltzmannTile<A>& tile = row.tile;
  RowSums<A> sums;
  for (int64_t j = 0; j < tile.stride; j += kLanes<A>) {
    const Values<A> logit = row.logits(j);
    const Values<A> of_row = exp_of<kLanes<A>>(logit - row.shift);
    Values<A> of_col = of_row;
    if constexpr (kExact) of_col = exp_of<kLanes<A>>(logit - load_values(tile.col_shift + j));
    A* column = columns + j;
    if constexpr (kWithPositives) {
      const Mask<A> positive = has_id<A>(tile.col_ids + j, row.id);
      const Values<A> of_both[] = {where<A>(~positive, of_row), where<A>(positive, of_row),
                                   where<A>(positive, logit), ones<A>(positive)};
      for (int which = 0; which < kNumSums; ++which) sums.values[which] += of_both[which];
      add_to(column + kNegatives * tile.stride, where<A>(~positive, of_col));
      add_to(column + kPositives * tile.stride, where<A>(positive, of_col));
      add_to(column + kPositiveLogits * tile.stride, of_both[kPositiveLogits]);
      add_to(column + kCount * tile.stride, of_both[kCount]);
    } else {
      sums.values[kNegatives] += of_row;
      add_to(column + kNegatives * tile.stride, of_col);
    }
  }
  sums.add_to_row(row, rows);
}

// softplus(x) = log(1 + exp(x)), and sigmoid(x).
template <class A>
struct Softplus {
  Values<A> value, slope;

  explicit Softplus(const Values<A>& x) {
    const Values<A> magnitude = x > 0 ? x : -x;
    const Values<A> small = exp_of<kLanes<A>>(-magnitude);
    const Values<A> larger = A{1} / (small + A{1});
    value = (x > 0 ? x : Values<A>{}) + log1p_of<kLanes<A>>(small);
    slope = x > 0 ? larger : small * larger;
  }
};

template <class A>
void sigmoid_sum_row(const Row<A>& row, A* rows, A* columns) {
  RowSums<A> sums;
  for (int64_t j = 0; j < row.tile.stride; j += kLanes<A>) {
    const Values<A> logit = row.logits(j);
    const Mask<A> positive = has_id<A>(row.tile.col_ids + j, row.id);
    sums.values[kNegatives] += Softplus<A>(positive ? -logit : logit).value;
    sums.values[kCount] += ones<A>(positive);
    add_to(columns + kCount * row.tile.stride + j, ones<A>(positive));
  }
  sums.add_to_row(row, rows);
}

template <class A>
void sums(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, bool exact, bool sigmoid,
          A* rows, A* columns) {
  std::fill(columns, columns + kNumSums * tile.stride, A{0});
  for_rows(
      tile, begin, end,
      [&](const Row<A>& row) {
        if (sigmoid) return sigmoid_sum_row(row, rows, columns);
        const bool positives = row.may_have_positives();
        if (exact) return sum_row<A, true, true>(row, rows, columns);
        positives ? sum_row<A, false, true>(row, rows, columns)
                  : sum_row<A, false, false>(row, rows, columns);
      },
      [](const Row<A>&) {});
}

// ---- Gradients ----------------------------------------------------------------------------------

template <class A>
struct GradSums {
  double* grad_scale;
  A* grad_bias;  // [stride]
};

// Overwrites C by G = grad(j, logits).
template <class A, class Grad>
inline void write_grads(const Row<A>& row, const GradSums<A>& sums, const Grad& grad) {
  Values<A> grad_scale{};
  for (int64_t j = 0; j < row.tile.stride; j += kLanes<A>) {
    const Values<A> product = load_values(row.products + j);
    const Values<A> g = grad(j, product * row.tile.scale + load_values(row.tile.bias + j));
    store(row.products + j, g);
    grad_scale += g * product;
    add_to(sums.grad_bias + j, g);
  }
  *sums.grad_scale += sum_of<A>(grad_scale);
}

template <class A, bool kExact, bool kWithPositives>
void grad_row(const Row<A>& row, const GradSums<A>& sums) {
  const A negative = row.weight(kNegativeWeight), positive = row.weight(kPositiveWeight);
  const A target = row.weight(kTarget);
  write_grads(row, sums, [&](int64_t j, const Values<A>& logit) -> Values<A> {
    const Values<A> of_row = exp_of<kLanes<A>>(logit - row.shift);
    Values<A> of_col = of_row;
    if constexpr (kExact) of_col = exp_of<kLanes<A>>(logit - load_values(row.tile.col_shift + j));
    const Values<A> g = of_row * negative + of_col * row.col_weight(kNegativeWeight, j);
    if constexpr (!kWithPositives) return g;
    const Values<A> of_positive = of_row * positive + of_col * row.col_weight(kPositiveWeight, j) -
                                  (row.col_weight(kTarget, j) + target);
    return has_id<A>(row.tile.col_ids + j, row.id) ? of_positive : g;
  });
}

template <class A>
void sigmoid_grad_row(const Row<A>& row, const GradSums<A>& sums, A* values) {
  Values<A> value{};
  write_grads(row, sums, [&](int64_t j, const Values<A>& logit) -> Values<A> {
    const Mask<A> positive = has_id<A>(row.tile.col_ids + j, row.id);
    const Softplus<A> softplus(positive ? -logit : logit);
    value += softplus.value;
    return positive ? -softplus.slope : softplus.slope;
  });
  values[row.index] += sum_of<A>(value);
}

template <class A>
void grads(const BoltzmannTile<A>& tile, int64_t begin, int64_t end, bool exact, bool sigmoid,
           double* grad_scale, A* grad_bias, A* values) {
  std::fill(grad_bias, grad_bias + tile.stride, A{0});
  *grad_scale = 0;
  const GradSums<A> sums{grad_scale, grad_bias};
  for_rows(
      tile, begin, end,
      [&](const Row<A>& row) {
        if (sigmoid) return sigmoid_grad_row(row, sums, values);
        if (exact) return grad_row<A, true, true>(row, sums);
        row.may_have_positives() ? grad_row<A, false, true>(row, sums)
                                 : grad_row<A, false, false>(row, sums);
      },
      [&](const Row<A>& row) { std::fill(row.products, row.products + tile.stride, A{0}); });
}

// ---- Storage types ------------------------------------------------------------------------------

template <class T, class A>
void widen_from(const void* from, int64_t count, A* to) {
  const T* elements = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load_wide<kLanes<A>>(elements + i));
  for (; i < count; ++i) to[i] = load_wide<1>(elements + i)[0];
}

template <class A>
void widen(DType dtype, const void* from, int64_t count, A* to) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtype == DType::kBFloat16) return widen_from<BFloat16>(from, count, to);
    if (dtype == DType::kFloat16) return widen_from<Float16>(from, count, to);
  }
  return widen_from<A>(from, count, to);
}

template <class T, class A>
A square_length_of(const void* from, int64_t count) {
  const T* elements = static_cast<const T*>(from);
  Values<A> even{}, odd{};  // two additions under way
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= count; i += 2 * kLanes<A>) {
    const Values<A> first = load_wide<kLanes<A>>(elements + i);
    const Values<A> second = load_wide<kLanes<A>>(elements + i + kLanes<A>);
    even += first * first;
    odd += second * second;
  }
  A sum = sum_of<A>(even + odd);
  for (; i < count; ++i) {
    const A value = load_wide<1>(elements + i)[0];
    sum += value * value;
  }
  return sum;
}

template <class A>
A square_length(DType dtype, const void* from, int64_t count) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtype == DType::kBFloat16) return square_length_of<BFloat16, A>(from, count);
    if (dtype == DType::kFloat16) return square_length_of<Float16, A>(from, count);
  }
  return square_length_of<A, A>(from, count);
}

template <class From, class To, class A>
void scale_elements(const void* from, A factor, int64_t count, void* to) {
  const From* in = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    const Values<A> values = load_wide<kLanes<A>>(in + i);
    store_rounded<kLanes<A>>(out + i, values * factor);
  }
  for (; i < count; ++i) store_rounded<1>(out + i, load_wide<1>(in + i) * factor);
}

template <class From, class A>
void scale_from(const void* from, A factor, int64_t count, DType to_dtype, void* to) {
  if constexpr (std::is_same_v<A, float>) {
    if (to_dtype == DType::kBFloat16)
      return scale_elements<From, BFloat16>(from, factor, count, to);
    if (to_dtype == DType::kFloat16) return scale_elements<From, Float16>(from, factor, count, to);
  }
  scale_elements<From, A>(from, factor, count, to);
}

template <class A>
void scale(DType from_dtype, const void* from, A factor, int64_t count, DType to_dtype, void* to) {
  if constexpr (std::is_same_v<A, float>) {
    if (from_dtype == DType::kBFloat16) {
      return scale_from<BFloat16>(from, factor, count, to_dtype, to);
    }
    if (from_dtype == DType::kFloat16) {
      return scale_from<Float16>(from, factor, count, to_dtype, to);
    }
  }
  scale_from<A>(from, factor, count, to_dtype, to);
}

template <class A>
constexpr BoltzmannCpuKernels<A> kBoltzmannKernels{maxima<A>, sums<A>,          grads<A>,
                                                   widen<A>,  square_length<A>, scale<A>};

}  // namespace
}  // namespace m3i
