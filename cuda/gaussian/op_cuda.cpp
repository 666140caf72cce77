// gaussian: registration for CUDA.
#include "gaussian/op.h"
#include "gaussian/products.h"
#include "m3i/host/cuda_stream.h"

#include <torch/csrc/stable/library.h>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Makes C and leaves the sums of its product with p^T p.
void decorrelate(const Tensor& z_hat, const Tensor& z, GaussianCall& call, void* products) {
  const GaussianRows& of = call.params.of;
  const Tensor of_targets = gaussian_gram(call.normalised ? *call.normalised : z, of);
  call.normalised.reset();
  const Tensor of_predictions = gaussian_gram(z_hat, of);
  GaussianProductParams params;
  params.size = of.width * of.width;
  params.prediction = of.prediction;
  params.scale = 1.0 / static_cast<double>(of.rows);
  params.of_targets = of_targets.const_data_ptr();
  params.of_predictions = of_predictions.const_data_ptr();
  params.covariance = call.covariance.mutable_data_ptr();
  STD_CUDA_CHECK(launch_gaussian_product(params, products, current_stream(z_hat)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_cuda(const Tensor& z_hat, const Tensor& z,
                                                         double sigma, bool normalise, double eps,
                                                         double decorrelation_weight) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  GaussianCall call = prepare_gaussian(z_hat, z, {sigma, normalise, eps, decorrelation_weight});
  const GaussianRows& of = call.params.of;
  if (of.rows == 0) {
    torch::stable::zero_(call.value);
    torch::stable::zero_(call.covariance);
    return {call.value, call.mean, call.rstd, call.covariance};
  }
  GaussianValueParams params;
  params.accumulator = of.prediction == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  params.num_distances = gaussian_num_distances(of.rows);
  params.num_products = call.decorrelates ? gaussian_num_products(of.width * of.width) : 0;
  params.distance_scale = call.distance_scale;
  params.product_scale = call.product_scale;
  const auto accumulator = call.value.scalar_type();
  Tensor distances = torch::stable::new_empty(z_hat, {params.num_distances}, accumulator);
  Tensor products = torch::stable::new_empty(z_hat, {params.num_products}, accumulator);
  params.distances = distances.const_data_ptr();
  params.products = products.const_data_ptr();
  params.value = call.value.mutable_data_ptr();
  const cudaStream_t stream = current_stream(z_hat);
  STD_CUDA_CHECK(launch_gaussian(call.params, distances.mutable_data_ptr(), stream));
  if (call.decorrelates) decorrelate(z_hat, z, call, products.mutable_data_ptr());
  STD_CUDA_CHECK(launch_gaussian_value(params, stream));
  return {call.value, call.mean, call.rstd, call.covariance};
}

Tensor gaussian_bwd_cuda(const Tensor& grad_out, const Tensor& z_hat, const Tensor& z,
                         const Tensor& mean, const Tensor& rstd, const Tensor& covariance,
                         double sigma, bool normalise, double eps, double decorrelation_weight) {
  const torch::stable::accelerator::DeviceGuard guard(z_hat.get_device_index());
  GaussianBwdCall call = prepare_gaussian_bwd(grad_out, z_hat, z, mean, rstd, covariance,
                                              {sigma, normalise, eps, decorrelation_weight});
  if (call.params.of.rows == 0) return call.grad;
  std::optional<Tensor> pull;
  if (call.decorrelates) {
    pull = gaussian_pull(z_hat, covariance, call.params.of);
    call.params.pull = pull->const_data_ptr();
  }
  STD_CUDA_CHECK(launch_gaussian_bwd(call.params, current_stream(z_hat)));
  return call.grad;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("gaussian", TORCH_BOX(&gaussian_cuda));
  library.impl("gaussian_bwd", TORCH_BOX(&gaussian_bwd_cuda));
}

}  // namespace
}  // namespace m3i
