// boltzmann on vectors: checks of the operators' arguments, the same for every device, and their
// parameters.
#pragma once

#include "boltzmann/args.h"
#include "boltzmann/vectors/params.h"

namespace m3i {

using OptionalTensor = std::optional<torch::stable::Tensor>;

namespace detail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The wide type that a tensor has.
inline DType dtype_of_wide(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  ": expected dtype float32 or float64, got ", dtype_name(dtype));
  return dtype == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
}

// A tensor of the dtype of `like`, contiguous and on its device.
inline const void* check_like(const Tensor& tensor, const char* name,
                              std::initializer_list<int64_t> shape, const Tensor& like) {
  check_boltzmann_tensor(tensor, name, like.scalar_type(), shape, like);
  return tensor.const_data_ptr();
}

inline const int64_t* check_ids(const OptionalTensor& ids, const char* name, int64_t count,
                                const Tensor& z_hat) {
  if (!ids) return nullptr;
  check_boltzmann_tensor(*ids, name, ScalarType::Long, {count}, z_hat);
  return ids->const_data_ptr<int64_t>();
}

inline Tensor new_like(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, like.scalar_type());
}

}  // namespace detail

// ---- Before the sums ----------------------------------------------------------------------------

struct BoltzmannPrepareCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
             torch::stable::Tensor>
      out;  // row_ids, col_ids, bias, extremes
  BoltzmannPrepareParams params;
};

inline BoltzmannPrepareCall prepare_boltzmann_prepare(
    const torch::stable::Tensor& z_hat, const torch::stable::Tensor& z, const OptionalTensor& bias,
    const OptionalTensor& row_ids, const OptionalTensor& col_ids, int64_t first_column,
    std::optional<int64_t> columns_of_all) {
  using namespace detail;
  BoltzmannPrepareCall call;
  BoltzmannPrepareParams& params = call.params;
  params.dtype = boltzmann_dtype(z_hat);
  const ScalarType wide = wide_dtype(z_hat);
  check_shape(z_hat, "z_hat", {kAny, kAny});
  check_contiguous(z_hat, "z_hat");
  check_boltzmann_tensor(z, "z", z_hat.scalar_type(), {kAny, z_hat.size(1)}, z_hat);
  params.rows = z_hat.size(0);
  params.columns = z.size(0);
  params.width = z_hat.size(1);
  params.z_hat = z_hat.const_data_ptr();
  params.z = z.const_data_ptr();
  params.first_column = first_column;
  const int64_t num_columns = params.num_columns = columns_of_all.value_or(params.columns);
  STD_TORCH_CHECK(
      0 <= first_column && first_column + params.columns <= num_columns && num_columns < 1 << 30,
      "first_column, num_columns: expected the place of ", params.columns,
      " columns among fewer than 2^30, got ", first_column, " of ", num_columns);
  params.has_bias_each = bias && bias->dim() > 0;
  if (params.has_bias_each) {
    check_boltzmann_tensor(*bias, "bias", wide, {params.columns}, z_hat);
  } else if (bias) {
    check_boltzmann_tensor(*bias, "bias", wide, {}, z_hat);
  }
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.row_ids = check_ids(row_ids, "row_ids", params.rows, z_hat);
  params.col_ids = check_ids(col_ids, "col_ids", num_columns, z_hat);
  STD_TORCH_CHECK(row_ids || !col_ids, "row_ids: expected beside col_ids, got none");
  auto& [out_row_ids, out_col_ids, out_bias, extremes] = call.out;
  out_row_ids = torch::stable::new_empty(z_hat, {params.rows}, ScalarType::Int);
  out_col_ids = torch::stable::new_empty(z_hat, {col_ids ? num_columns : 0}, ScalarType::Int);
  out_bias = torch::stable::new_empty(z_hat, {params.columns}, wide);
  params.num_parts = boltzmann_parts(params.rows, params.columns);
  extremes = torch::stable::new_empty(z_hat, {params.num_parts, kNumExtremes}, wide);
  params.out_row_ids = out_row_ids.mutable_data_ptr<int32_t>();
  params.out_col_ids = out_col_ids.mutable_data_ptr<int32_t>();
  params.out_bias = out_bias.mutable_data_ptr();
  params.extremes = extremes.mutable_data_ptr();
  return call;
}

struct BoltzmannShiftCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
             torch::stable::Tensor>
      out;  // row_shift, col_shift, bound, run
  BoltzmannShiftParams params;
};

inline BoltzmannShiftCall prepare_boltzmann_shift(const torch::stable::Tensor& extremes,
                                                  const torch::stable::Tensor& scale,
                                                  const torch::stable::Tensor& row_ids,
                                                  const torch::stable::Tensor& bias) {
  using namespace detail;
  BoltzmannShiftCall call;
  BoltzmannShiftParams& params = call.params;
  params.wide = dtype_of_wide(scale, "scale");
  params.scale = check_like(scale, "scale", {}, scale);
  params.extremes = check_like(extremes, "extremes", {kAny, kNumExtremes}, scale);
  check_shape(row_ids, "row_ids", {kAny});
  check_shape(bias, "bias", {kAny});
  const int64_t rows = row_ids.size(0), columns = bias.size(0);
  params.num_parts = extremes.size(0);
  params.rows = rows;
  params.columns = columns;
  auto& [row_shift, col_shift, bound, run] = call.out;
  row_shift = new_like(scale, {rows});
  col_shift = new_like(scale, {columns});
  bound = new_like(scale, {});
  run = torch::stable::new_empty(scale, {}, ScalarType::Bool);
  params.row_shift = row_shift.mutable_data_ptr();
  params.col_shift = col_shift.mutable_data_ptr();
  params.bound = bound.mutable_data_ptr();
  params.run = run.mutable_data_ptr<bool>();
  return call;
}

// ---- Between both sums --------------------------------------------------------------------------

namespace detail {

// cols: [4, M], or [4, 0] without sums over columns.
inline BoltzmannSumsOf make_sums(const Tensor& rows, const Tensor& cols) {
  BoltzmannSumsOf sums;
  sums.of_rows = check_like(rows, "rows", {kNumSums, kAny}, rows);
  sums.of_columns = check_like(cols, "cols", {kNumSums, kAny}, rows);
  sums.rows = rows.size(1);
  sums.columns = cols.size(1);
  return sums;
}

}  // namespace detail

struct BoltzmannExactCall {
  torch::stable::Tensor out;
  BoltzmannExactParams params;
};

inline BoltzmannExactCall prepare_boltzmann_exact(const torch::stable::Tensor& rows,
                                                  const torch::stable::Tensor& cols,
                                                  const torch::stable::Tensor& run) {
  BoltzmannExactCall call;
  call.params.wide = detail::dtype_of_wide(rows, "rows");
  call.params.sums = detail::make_sums(rows, cols);
  call.params.run = detail::check_flag(run, "run", rows);
  call.out = torch::stable::new_empty(rows, {}, torch::headeronly::ScalarType::Bool);
  call.params.exact = call.out.mutable_data_ptr<bool>();
  return call;
}

struct BoltzmannExactShiftCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> out;  // row_shift, col_shift
  BoltzmannExactShiftParams params;
};

inline BoltzmannExactShiftCall prepare_boltzmann_exact_shift(const torch::stable::Tensor& row_max,
                                                             const torch::stable::Tensor& col_max,
                                                             const torch::stable::Tensor& row_shift,
                                                             const torch::stable::Tensor& col_shift,
                                                             const torch::stable::Tensor& exact) {
  using namespace detail;
  BoltzmannExactShiftCall call;
  BoltzmannExactShiftParams& params = call.params;
  params.wide = dtype_of_wide(row_max, "row_max");
  params.row_max = check_like(row_max, "row_max", {kAny}, row_max);
  params.col_max = check_like(col_max, "col_max", {kAny}, row_max);
  params.rows = row_max.size(0);
  params.columns = col_max.size(0);
  params.row_shift = check_like(row_shift, "row_shift", {params.rows}, row_max);
  params.col_shift = check_like(col_shift, "col_shift", {params.columns}, row_max);
  params.exact = check_flag(exact, "exact", row_max);
  auto& [out_row_shift, out_col_shift] = call.out;
  out_row_shift = new_like(row_max, {params.rows});
  out_col_shift = new_like(row_max, {params.columns});
  params.out_row_shift = out_row_shift.mutable_data_ptr();
  params.out_col_shift = out_col_shift.mutable_data_ptr();
  return call;
}

// ---- After the sums -----------------------------------------------------------------------------

// What both operators on sums take, in their order.
struct BoltzmannLossArgs {
  const torch::stable::Tensor& rows;       // [4, N]
  const torch::stable::Tensor& cols;       // [4, M or 0]
  const OptionalTensor& rows_again;        // [4, N]
  const OptionalTensor& cols_again;        // [4, M or 0]
  const torch::stable::Tensor& row_shift;  // [N]
  const torch::stable::Tensor& col_shift;  // [M]
  const torch::stable::Tensor& exact;      // [] bool
};

namespace detail {

inline BoltzmannLossInput make_loss_input(const BoltzmannLossArgs& args) {
  BoltzmannLossInput input;
  input.wide = dtype_of_wide(args.rows, "rows");
  input.sums = make_sums(args.rows, args.cols);
  STD_TORCH_CHECK(args.rows_again.has_value() == args.cols_again.has_value(),
                  "rows_again, cols_again: expected both or neither");
  input.has_again = args.rows_again.has_value();
  input.again = {input.sums.rows, input.sums.columns, nullptr, nullptr};
  if (args.rows_again) {
    input.again.of_rows =
        check_like(*args.rows_again, "rows_again", {kNumSums, input.sums.rows}, args.rows);
    input.again.of_columns =
        check_like(*args.cols_again, "cols_again", {kNumSums, input.sums.columns}, args.rows);
  }
  input.row_shift = check_like(args.row_shift, "row_shift", {input.sums.rows}, args.rows);
  input.col_shift = check_like(args.col_shift, "col_shift", {kAny}, args.rows);
  // Without columns there is nothing to add, symmetric or not.
  input.symmetric = input.sums.columns > 0;
  STD_TORCH_CHECK(!input.symmetric || args.col_shift.size(0) == input.sums.columns,
                  "col_shift: expected shape [", input.sums.columns, "], got [",
                  args.col_shift.size(0), "]");
  input.exact = check_flag(args.exact, "exact", args.rows);
  return input;
}

}  // namespace detail

struct BoltzmannTotalsCall {
  torch::stable::Tensor out;
  BoltzmannTotalsParams params;
};

inline BoltzmannTotalsCall prepare_boltzmann_totals(const BoltzmannLossArgs& args) {
  BoltzmannTotalsCall call;
  call.params.input = detail::make_loss_input(args);
  const BoltzmannSumsOf& sums = call.params.input.sums;
  call.params.num_parts = boltzmann_parts(sums.rows, sums.columns);
  call.out = detail::new_like(args.rows, {call.params.num_parts, kNumTotals});
  call.params.totals = call.out.mutable_data_ptr();
  return call;
}

struct BoltzmannLossCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
             torch::stable::Tensor, torch::stable::Tensor>
      out;  // value, share, num_rows, row_weights, col_weights
  BoltzmannLossParams params;
};

inline BoltzmannLossCall prepare_boltzmann_loss(const BoltzmannLossArgs& args,
                                                const torch::stable::Tensor& totals,
                                                const torch::stable::Tensor& bound, bool symmetric,
                                                bool mean, int64_t ranks) {
  using namespace detail;
  BoltzmannLossCall call;
  BoltzmannLossParams& params = call.params;
  params.input = make_loss_input(args);
  STD_TORCH_CHECK(!symmetric || params.input.sums.columns == args.col_shift.size(0),
                  "cols: expected shape [4, ", args.col_shift.size(0), "], got [4, ",
                  params.input.sums.columns, "]");
  params.input.symmetric = symmetric;
  params.totals = check_like(totals, "totals", {kAny, kNumTotals}, args.rows);
  params.num_columns = args.col_shift.size(0);
  params.num_parts = totals.size(0);
  params.bound = check_like(bound, "bound", {}, args.rows);
  params.mean = mean;
  params.ranks = ranks;
  auto& [value, share, num_rows, row_weights, col_weights] = call.out;
  value = new_like(args.rows, {});
  share = new_like(args.rows, {});
  num_rows = new_like(args.rows, {});
  row_weights = new_like(args.rows, {kNumWeights, params.input.sums.rows});
  col_weights = new_like(args.rows, {kNumWeights, args.col_shift.size(0)});
  params.value = value.mutable_data_ptr();
  params.share = share.mutable_data_ptr();
  params.num_rows = num_rows.mutable_data_ptr();
  params.row_weights = row_weights.mutable_data_ptr();
  params.col_weights = col_weights.mutable_data_ptr();
  return call;
}

struct BoltzmannSigmoidLossCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> out;  // value, share
  BoltzmannSigmoidLossParams params;
};

inline BoltzmannSigmoidLossCall prepare_boltzmann_sigmoid_loss(
    const torch::stable::Tensor& values, const torch::stable::Tensor& extremes,
    const torch::stable::Tensor& bound, bool mean, int64_t ranks) {
  using namespace detail;
  BoltzmannSigmoidLossCall call;
  BoltzmannSigmoidLossParams& params = call.params;
  params.wide = dtype_of_wide(values, "values");
  params.values = check_like(values, "values", {kAny}, values);
  params.extremes = check_like(extremes, "extremes", {kAny, kNumExtremes}, values);
  params.bound = check_like(bound, "bound", {}, values);
  params.num_values = values.size(0);
  params.num_parts = extremes.size(0);
  params.mean = mean;
  params.ranks = ranks;
  auto& [value, share] = call.out;
  value = new_like(values, {});
  share = new_like(values, {});
  params.value = value.mutable_data_ptr();
  params.share = share.mutable_data_ptr();
  return call;
}

// ---- Backward -----------------------------------------------------------------------------------

struct BoltzmannScaleCall {
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
             torch::stable::Tensor, torch::stable::Tensor>
      out;  // factor, grad_z_hat, grad_z, grad_scale, grad_bias
  BoltzmannScaleParams params;
};

inline BoltzmannScaleCall prepare_boltzmann_scale(
    const torch::stable::Tensor& grad_out, const OptionalTensor& share, const OptionalTensor& scale,
    const torch::stable::Tensor& grad_z_hat, const torch::stable::Tensor& grad_z,
    const torch::stable::Tensor& grad_scale, const torch::stable::Tensor& grad_bias,
    torch::headeronly::ScalarType dtype) {
  using namespace detail;
  BoltzmannScaleCall call;
  BoltzmannScaleParams& params = call.params;
  params.wide = dtype_of_wide(grad_out, "grad_out");
  params.from = boltzmann_dtype(grad_z_hat);
  params.grad_out = check_like(grad_out, "grad_out", {}, grad_out);
  params.share = share ? check_like(*share, "share", {}, grad_out) : nullptr;
  params.scale = scale ? check_like(*scale, "scale", {}, grad_out) : nullptr;
  params.of_scale = check_like(grad_scale, "grad_scale", {}, grad_out);
  check_contiguous(grad_z_hat, "grad_z_hat");
  check_same_device(grad_z_hat, "grad_z_hat", grad_out, "grad_out");
  check_dtype(grad_z, "grad_z", grad_z_hat.scalar_type());
  check_contiguous(grad_z, "grad_z");
  check_same_device(grad_z, "grad_z", grad_out, "grad_out");
  check_dtype(grad_bias, "grad_bias", grad_out.scalar_type());
  check_contiguous(grad_bias, "grad_bias");
  check_same_device(grad_bias, "grad_bias", grad_out, "grad_out");
  STD_TORCH_CHECK(
      dtype == grad_z_hat.scalar_type() ||
          (grad_z_hat.scalar_type() == ScalarType::Float &&
           (dtype == ScalarType::Half || dtype == ScalarType::BFloat16)),
      "dtype: expected that of grad_z_hat, or float16 or bfloat16 of a float32 one, got ",
      dtype_name(dtype), " of ", dtype_name(grad_z_hat.scalar_type()));
  params.z_hat = grad_z_hat.const_data_ptr();
  params.z = grad_z.const_data_ptr();
  params.of_bias = grad_bias.const_data_ptr();
  params.num_z_hat = grad_z_hat.numel();
  params.num_z = grad_z.numel();
  params.num_bias = grad_bias.numel();
  auto& [factor, out_z_hat, out_z, out_of_scale, out_of_bias] = call.out;
  const auto sizes = [](const Tensor& of) {
    return std::vector<int64_t>(of.sizes().begin(), of.sizes().end());
  };
  factor = new_like(grad_out, {});
  out_z_hat = torch::stable::new_empty(grad_z_hat, sizes(grad_z_hat), dtype);
  out_z = torch::stable::new_empty(grad_z, sizes(grad_z), dtype);
  out_of_scale = new_like(grad_out, {});
  out_of_bias = new_like(grad_out, sizes(grad_bias));
  params.to = boltzmann_dtype(out_z_hat);
  params.factor = factor.mutable_data_ptr();
  params.out_z_hat = out_z_hat.mutable_data_ptr();
  params.out_z = out_z.mutable_data_ptr();
  params.out_of_scale = out_of_scale.mutable_data_ptr();
  params.out_of_bias = out_of_bias.mutable_data_ptr();
  return call;
}

}  // namespace m3i
