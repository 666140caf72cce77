// gaussian: checks of both ops' arguments, the same for every device, and their parameters.
#pragma once

#include "gaussian/params.h"
#include "m3i/host/check.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace m3i {

// The arguments of a call besides its tensors.
struct GaussianOptions {
  double sigma;
  bool normalise;
  double eps;
  double decorrelation_weight;
};

namespace detail {

inline DType gaussian_dtype(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, ": expected dtype float32, float64, float16 or bfloat16, got ",
                  dtype_name(dtype));
  return dtype == ScalarType::Float    ? DType::kFloat32
         : dtype == ScalarType::Double ? DType::kFloat64
         : dtype == ScalarType::Half   ? DType::kFloat16
                                       : DType::kBFloat16;
}

inline void check_gaussian_options(const GaussianOptions& options) {
  STD_TORCH_CHECK(options.sigma > 0 && std::isfinite(options.sigma),
                  "sigma: expected a finite value > 0, got ", options.sigma);
  STD_TORCH_CHECK(options.eps > 0 && std::isfinite(options.eps),
                  "eps: expected a finite value > 0, got ", options.eps);
  STD_TORCH_CHECK(std::isfinite(options.decorrelation_weight),
                  "decorrelation_weight: expected a finite value, got ",
                  options.decorrelation_weight);
}

// Checks that a tensor is contiguous, of this shape and dtype, and on the device of z_hat.
inline void check_like_z_hat(const torch::stable::Tensor& tensor, const char* name,
                             const torch::stable::Tensor& z_hat,
                             const std::vector<int64_t>& expected,
                             torch::headeronly::ScalarType dtype) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == expected, name,
                  ": expected shape ", shape_string(expected), ", got ", shape_string(sizes));
  check_dtype(tensor, name, dtype);
  check_same_device(tensor, name, z_hat, "z_hat");
  check_contiguous(tensor, name);
}

// The dtype of sums, means and the value.
inline torch::headeronly::ScalarType gaussian_accumulator(const torch::stable::Tensor& z_hat) {
  using torch::headeronly::ScalarType;
  return z_hat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Throws, naming the argument, what was expected and what was given.
inline GaussianRows check_gaussian(const torch::stable::Tensor& z_hat,  // [..., D]
                                   const torch::stable::Tensor& z,      // [..., D]
                                   const GaussianOptions& options) {
  GaussianRows of;
  of.prediction = gaussian_dtype(z_hat, "z_hat");
  of.target = gaussian_dtype(z, "z");
  const auto sizes = z_hat.sizes();
  STD_TORCH_CHECK(sizes.size() > 0 && sizes[sizes.size() - 1] > 0,
                  "z_hat: expected shape [..., D] with D > 0, got ", shape_string(sizes));
  STD_TORCH_CHECK((of.prediction == DType::kFloat64) == (of.target == DType::kFloat64),
                  "z: expected float64 beside float64 alone, got ", dtype_name(z.scalar_type()),
                  " beside ", dtype_name(z_hat.scalar_type()));
  check_contiguous(z_hat, "z_hat");
  check_like_z_hat(z, "z", z_hat, {sizes.begin(), sizes.end()}, z.scalar_type());
  check_gaussian_options(options);
  of.width = sizes[sizes.size() - 1];
  of.rows = z_hat.numel() / of.width;
  of.normalise = options.normalise;
  of.z_hat = z_hat.const_data_ptr();
  of.z = z.const_data_ptr();
  return of;
}

inline double distance_scale(const GaussianRows& of, const GaussianOptions& options) {
  return 0.5 / (options.sigma * options.sigma) / static_cast<double>(of.rows) /
         static_cast<double>(of.width);
}

inline double product_scale(const GaussianRows& of, const GaussianOptions& options) {
  return options.decorrelation_weight / static_cast<double>(of.rows) /
         static_cast<double>(of.width);
}

}  // namespace detail

struct GaussianCall {
  // All uninitialised; mean and rstd are [0] unless normalise, covariance is [0] and normalised
  // absent without decorrelation.
  torch::stable::Tensor value, mean, rstd, covariance;
  std::optional<torch::stable::Tensor> normalised;
  bool decorrelates;
  double distance_scale, product_scale;
  GaussianParams params;
};

// Checks the arguments and allocates the outputs, on the device of z_hat.
inline GaussianCall prepare_gaussian(const torch::stable::Tensor& z_hat,
                                     const torch::stable::Tensor& z,
                                     const GaussianOptions& options) {
  const GaussianRows of = detail::check_gaussian(z_hat, z, options);
  const auto accumulator = detail::gaussian_accumulator(z_hat);
  const auto of_rows = [&] {
    return torch::stable::new_empty(z_hat, {options.normalise ? of.rows : 0}, accumulator);
  };
  const bool decorrelates = options.decorrelation_weight != 0;
  GaussianCall call{torch::stable::new_empty(z_hat, {}, accumulator),
                    of_rows(),
                    of_rows(),
                    decorrelates ? torch::stable::new_empty(z_hat, {of.width, of.width})
                                 : torch::stable::new_empty(z_hat, {0}),
                    std::nullopt,
                    decorrelates,
                    detail::distance_scale(of, options),
                    detail::product_scale(of, options),
                    {}};
  if (decorrelates && options.normalise) call.normalised = torch::stable::empty_like(z);
  call.params.of = of;
  call.params.eps = options.eps;
  call.params.mean = options.normalise ? call.mean.mutable_data_ptr() : nullptr;
  call.params.rstd = options.normalise ? call.rstd.mutable_data_ptr() : nullptr;
  call.params.normalised = call.normalised ? call.normalised->mutable_data_ptr() : nullptr;
  return call;
}

struct GaussianBwdCall {
  torch::stable::Tensor grad;  // [..., D], uninitialised
  bool decorrelates;
  GaussianBwdParams params;  // complete except for the pull
};

// Checks the arguments and allocates the gradient, on the device of z_hat.
inline GaussianBwdCall prepare_gaussian_bwd(const torch::stable::Tensor& grad_out,    // []
                                            const torch::stable::Tensor& z_hat,       // [..., D]
                                            const torch::stable::Tensor& z,           // [..., D]
                                            const torch::stable::Tensor& mean,        // [R] or [0]
                                            const torch::stable::Tensor& rstd,        // [R] or [0]
                                            const torch::stable::Tensor& covariance,  // [D, D], [0]
                                            const GaussianOptions& options) {
  const GaussianRows of = detail::check_gaussian(z_hat, z, options);
  const auto accumulator = detail::gaussian_accumulator(z_hat);
  const int64_t stored = options.normalise ? of.rows : 0;
  const bool decorrelates = options.decorrelation_weight != 0;
  detail::check_like_z_hat(grad_out, "grad_out", z_hat, {}, accumulator);
  detail::check_like_z_hat(mean, "mean", z_hat, {stored}, accumulator);
  detail::check_like_z_hat(rstd, "rstd", z_hat, {stored}, accumulator);
  detail::check_like_z_hat(
      covariance, "covariance", z_hat,
      decorrelates ? std::vector<int64_t>{of.width, of.width} : std::vector<int64_t>{0},
      z_hat.scalar_type());
  GaussianBwdCall call{torch::stable::empty_like(z_hat), decorrelates, {}};
  GaussianBwdParams& params = call.params;
  params.of = of;
  params.distance_scale = detail::distance_scale(of, options);
  params.product_scale = detail::product_scale(of, options);
  params.grad_out = grad_out.const_data_ptr();
  params.mean = options.normalise ? mean.const_data_ptr() : nullptr;
  params.rstd = options.normalise ? rstd.const_data_ptr() : nullptr;
  params.pull = nullptr;
  params.grad = call.grad.mutable_data_ptr();
  return call;
}

}  // namespace m3i
