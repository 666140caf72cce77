// boltzmann_rows_pass on the CPU: the kernels, compiled once for each instruction set.
//
// A row is read three times: for its largest logit, for its sums, which leave the exponentials in
// the products' place, and to make G of them. A row of 20,000 columns stays in the second-level
// cache meanwhile.
#pragma once

#include "boltzmann/cpu/rows_table.h"
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
constexpr A kNothing = -std::numeric_limits<A>::infinity();

template <class A>
inline A sum_of(const Values<A>& values) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += values[i];
  return sum;
}

template <class A>
inline Values<A> where(const Mask<A>& mask, const Values<A>& values) {
  return bit_cast<Values<A>>(bit_cast<Mask<A>>(values) & mask);
}

template <class A>
inline Mask<A> lanes() {
  Mask<A> indices{};
  for (int i = 0; i < kLanes<A>; ++i) indices[i] = i;
  return indices;
}

// One row of logits.
template <class A>
struct LogitRow {
  A* products;
  const A* bias;  // or null
  A scale;
  int64_t columns;

  LogitRow(const BoltzmannRowsParams& params, const BoltzmannLogits& logits, int64_t row)
      : products(static_cast<A*>(logits.products) + row * params.stride),
        bias(static_cast<const A*>(logits.bias)),
        scale(*static_cast<const A*>(logits.scale)),
        columns(params.columns) {}

  int64_t whole() const { return columns / kLanes<A> * kLanes<A>; }

  // Z of the dot products, -inf beyond the last column.
  Values<A> logits(int64_t j, const Values<A>& product) const {
    if (j + kLanes<A> <= columns) {
      const Values<A> logit = product * scale;
      return bias ? logit + load<kLanes<A>>(bias + j) : logit;
    }
    Values<A> of_bias{};
    for (int64_t k = j; bias && k < columns; ++k) of_bias[k - j] = bias[k];
    return there(j) ? product * scale + of_bias : kNothing<A> - Values<A>{};
  }

  Values<A> load_products(int64_t j) const {
    const Values<A> product = load<kLanes<A>>(products + j);
    return j + kLanes<A> <= columns ? product : where<A>(there(j), product);
  }

  Mask<A> there(int64_t j) const { return lanes<A>() < static_cast<IntOf<A>>(columns - j); }

  A logit(int64_t j) const { return products[j] * scale + (bias ? bias[j] : A{0}); }
};

// body(j) for the vectors of all columns; the last one may go beyond them.
template <class A, class Body>
inline void for_vectors(const LogitRow<A>& row, const Body& body) {
  int64_t j = 0;
  for (; j < row.whole(); j += kLanes<A>) body(j);
  if (j < row.columns) body(j);
}

// The largest logit, 0 where there is none; NaN where a product is not finite.
template <class A>
A shift_of(const LogitRow<A>& row) {
  Values<A> most = kNothing<A> - Values<A>{}, lost{};
  for_vectors(row, [&](int64_t j) {
    const Values<A> product = row.load_products(j);
    const Values<A> logit = row.logits(j, product);
    most = logit > most ? logit : most;
    lost += product * A{0};
  });
  A largest = kNothing<A>;
  for (int i = 0; i < kLanes<A>; ++i) largest = std::max<A>(largest, most[i]);
  return (largest == kNothing<A> ? A{0} : largest) + sum_of<A>(lost);
}

template <class A>
struct RowResult {
  A nll, scale_grad;
};

// ---- Classes ------------------------------------------------------------------------------------

// -log P of the class and, if asked for, G in the products' place.
//
// With n the sum of the other columns' exponentials and p that of the class, the loss is
// log1p(n / p) and G of the class is -n / (n + p): no difference of numbers that are nearly equal.
template <class A>
RowResult<A> class_row(const LogitRow<A>& row, int64_t target, A weight, bool needs_grad) {
  const A shift = shift_of(row), own = row.logit(target), own_product = row.products[target];
  Values<A> negatives{}, pull{};
  const auto add = [&](int64_t j, const Mask<A>& counts) {
    const Values<A> product = row.load_products(j);
    const Values<A> e = where<A>(counts, exp_of<kLanes<A>>(row.logits(j, product) - shift));
    negatives += e;
    if (!needs_grad) return;
    pull += e * (product - own_product);
    store(row.products + j, e);
  };
  const Mask<A> all = ~Mask<A>{};
  const int64_t special = target / kLanes<A> * kLanes<A>, whole = row.whole();
  for (int64_t j = 0; j < special; j += kLanes<A>) add(j, all);
  add(special, lanes<A>() != static_cast<IntOf<A>>(target - special));
  int64_t j = special + kLanes<A>;
  for (; j < whole; j += kLanes<A>) add(j, all);
  if (j < row.columns) add(j, all);
  const A n = sum_of<A>(negatives), p = exp_of<1>(Vec<A, 1>{own - shift})[0];
  const A nll = n <= p ? std::log1p(n / p) : std::log(n + p) + shift - own;
  const A factor = weight / (n + p);
  if (needs_grad) {
    for_vectors(row, [&](int64_t at) {
      store(row.products + at, load<kLanes<A>>(row.products + at) * factor);
    });
    row.products[target] = -n * factor;
  }
  return {weight * nll, factor * sum_of<A>(pull)};
}

template <class A>
void classes(const BoltzmannRowsParams& params, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(params.row_weights);
  A* scale_grads = static_cast<A*>(params.scale_grads);
  for (int64_t i = begin; i < end; ++i) {
    const LogitRow<A> row(params, params.logits, i);
    const int32_t target = params.row_ids[i];
    RowResult<A> result{0, 0};
    if (target >= 0) {
      result = class_row<A>(row, target, weights ? weights[i] : A{1}, params.writes_products);
    } else if (params.writes_products) {
      std::fill(row.products, row.products + params.columns, A{0});
    }
    static_cast<A*>(params.nll)[i] = result.nll;
    if (scale_grads) scale_grads[i] = result.scale_grad;
  }
}

// ---- Soft targets -------------------------------------------------------------------------------

// Sums of a row's exponentials e = exp(Z - shift): those that are 1 are counted, and the rest
// added.
template <class A>
struct SoftSums {
  Values<A> count{}, rest{}, products{};

  void add(const Values<A>& e, const Values<A>& product) {
    const Mask<A> one = e == A{1};
    count += where<A>(one, e);
    rest += where<A>(~one, e);
    products += e * product;
  }
};

template <class A>
struct SoftTotals {
  A count, rest, total, mean_product;

  explicit SoftTotals(const SoftSums<A>& sums)
      : count(sum_of<A>(sums.count)),
        rest(sum_of<A>(sums.rest)),
        total(count + rest),
        mean_product(sum_of<A>(sums.products) / total) {}

  A log() const { return count == 1 ? std::log1p(rest) : std::log(total); }
};

// The cross entropy of T with P and, if asked for, G = P - T in the products' place.
//
// Of log sum exp Z - Z_j = (shift - Z_j) + log(total) no term is negative, so that a small loss is
// precise. Where both softmaxes are nearly certain of the same column, its G is the difference of
// what they leave to the others.
template <class A>
RowResult<A> soft_row(const LogitRow<A>& row, const LogitRow<A>& of_target, A weight,
                      bool needs_grad) {
  const A shift = shift_of(row), target_shift = shift_of(of_target);
  SoftSums<A> sums, target_sums;
  Values<A> distance{};
  for_vectors(row, [&](int64_t j) {
    const Values<A> product = row.load_products(j), logit = row.logits(j, product) - shift;
    const Values<A> target_logit = of_target.logits(j, of_target.load_products(j));
    const Values<A> e = exp_of<kLanes<A>>(logit);
    const Values<A> t = exp_of<kLanes<A>>(target_logit - target_shift);
    sums.add(e, product);
    target_sums.add(t, product);
    distance -= where<A>(t != A{0}, t * logit);  // not 0 times infinity
    if (!needs_grad) return;
    store(row.products + j, e);
    store(of_target.products + j, t);
  });
  const SoftTotals<A> totals(sums), targets(target_sums);
  const A nll = sum_of<A>(distance) / targets.total + totals.log();
  const A scale_grad = totals.mean_product - targets.mean_product;
  if (needs_grad) {
    const A factor = weight / totals.total, target_factor = weight / targets.total;
    const bool certain = totals.count == 1 && targets.count == 1;
    const A of_both = targets.rest * target_factor - totals.rest * factor;
    for_vectors(row, [&](int64_t j) {
      const Values<A> e = load<kLanes<A>>(row.products + j);
      const Values<A> t = load<kLanes<A>>(of_target.products + j);
      const Values<A> g = e * factor - t * target_factor;
      const Mask<A> both = (e == A{1}) & (t == A{1});
      store(row.products + j, certain ? (both ? of_both - Values<A>{} : g) : g);
    });
  }
  return {weight * nll, weight * scale_grad};
}

template <class A>
void soft(const BoltzmannRowsParams& params, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(params.row_weights);
  A* scale_grads = static_cast<A*>(params.scale_grads);
  for (int64_t i = begin; i < end; ++i) {
    const LogitRow<A> row(params, params.logits, i), of_target(params, params.targets, i);
    const A weight = weights ? weights[i] : A{1};
    const RowResult<A> result = soft_row<A>(row, of_target, weight, params.writes_products);
    static_cast<A*>(params.nll)[i] = result.nll;
    if (scale_grads) scale_grads[i] = result.scale_grad;
  }
}

template <class A>
constexpr BoltzmannRowsKernels kRowsKernels{classes<A>, soft<A>};

}  // namespace
}  // namespace m3i
