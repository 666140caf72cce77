// gaussian: the ops on the CPU; kernels in cpu/kernels.h, once for each instruction set.
//
// Threads share out blocks of rows whose number does not depend on theirs, and the blocks' sums are
// added in order: any number of threads gives the same bits.
#include "gaussian/cpu/kernel_table.h"

#include "gaussian/products.h"
#include "m3i/cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Elements of a block, at least: fewer are not worth waking a thread.
constexpr int64_t kBlockElements = 16 * 1024;

const GaussianCpuKernels& fastest_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kGaussianAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kGaussianAvx2;
#endif
  return kGaussianBaseline;
}

// body(begin, end) of every block of `size` items of `width` elements.
template <class Body>
void for_each_block(int64_t size, int64_t width, const Body& body) {
  const int64_t items = (kBlockElements + width - 1) / width;
  torch::stable::parallel_for(0, (size + items - 1) / items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * items, std::min(size, (block + 1) * items));
    }
  });
}

// The sum of body(begin, end) over the blocks, in their order.
template <class Body>
double sum_over_blocks(int64_t size, int64_t width, const Body& body) {
  const int64_t items = (kBlockElements + width - 1) / width;
  std::vector<double> sums((size + items - 1) / items);
  for_each_block(size, width,
                 [&](int64_t begin, int64_t end) { sums[begin / items] = body(begin, end); });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

double decorrelation(const GaussianCpuKernels& kernels, const Tensor& z_hat, const Tensor& z,
                     GaussianCall& call) {
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
  const double sum = sum_over_blocks(params.size, 1, [&](int64_t begin, int64_t end) {
    return kernels.product(params, begin, end);
  });
  return call.product_scale * sum;
}

void write_value(const Tensor& value, double number) {
  if (value.scalar_type() == torch::headeronly::ScalarType::Double) {
    *value.mutable_data_ptr<double>() = number;
  } else {
    *value.mutable_data_ptr<float>() = static_cast<float>(number);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_cpu(const Tensor& z_hat, const Tensor& z,
                                                        double sigma, bool normalise, double eps,
                                                        double decorrelation_weight) {
  GaussianCall call = prepare_gaussian(z_hat, z, {sigma, normalise, eps, decorrelation_weight});
  const GaussianParams& params = call.params;
  const GaussianCpuKernels& kernels = fastest_kernels();
  double number = 0;
  if (params.of.rows > 0) {
    number = call.distance_scale *
             sum_over_blocks(params.of.rows, params.of.width, [&](int64_t begin, int64_t end) {
               return kernels.forward(params, begin, end);
             });
    if (call.decorrelates) number += decorrelation(kernels, z_hat, z, call);
  } else {
    torch::stable::zero_(call.covariance);
  }
  write_value(call.value, number);
  return {call.value, call.mean, call.rstd, call.covariance};
}

Tensor gaussian_bwd_cpu(const Tensor& grad_out, const Tensor& z_hat, const Tensor& z,
                        const Tensor& mean, const Tensor& rstd, const Tensor& covariance,
                        double sigma, bool normalise, double eps, double decorrelation_weight) {
  GaussianBwdCall call = prepare_gaussian_bwd(grad_out, z_hat, z, mean, rstd, covariance,
                                              {sigma, normalise, eps, decorrelation_weight});
  GaussianBwdParams& params = call.params;
  if (params.of.rows == 0) return call.grad;
  std::optional<Tensor> pull;
  if (call.decorrelates) {
    pull = gaussian_pull(z_hat, covariance, params.of);
    params.pull = pull->const_data_ptr();
  }
  const GaussianCpuKernels& kernels = fastest_kernels();
  for_each_block(params.of.rows, params.of.width,
                 [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
  return call.grad;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("gaussian", TORCH_BOX(&gaussian_cpu));
  library.impl("gaussian_bwd", TORCH_BOX(&gaussian_bwd_cpu));
}

}  // namespace
}  // namespace m3i
