// boltzmann_rows_pass on CUDA. Included by op_cuda.cpp, which registers it.
#pragma once

#include "boltzmann/rows/args.h"
#include "boltzmann/rows/op.h"
#include "m3i/host/cuda_stream.h"

namespace m3i {

inline void boltzmann_rows_pass_cuda(
    const torch::stable::Tensor& products, std::optional<torch::stable::Tensor> target_products,
    int64_t columns, const torch::stable::Tensor& scale, std::optional<torch::stable::Tensor> bias,
    std::optional<torch::stable::Tensor> target_scale,
    std::optional<torch::stable::Tensor> target_bias, std::optional<torch::stable::Tensor> row_ids,
    std::optional<torch::stable::Tensor> row_weights, const torch::stable::Tensor& nll,
    std::optional<torch::stable::Tensor> scale_grads, std::optional<torch::stable::Tensor> rounded,
    bool writes_products) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const BoltzmannRowsParams params = prepare_boltzmann_rows({{products, scale, bias},
                                                             target_products,
                                                             columns,
                                                             target_scale,
                                                             target_bias,
                                                             row_ids,
                                                             row_weights,
                                                             nll,
                                                             scale_grads,
                                                             rounded,
                                                             writes_products});
  for (const void* matrix : {params.logits.products, params.targets.products, params.rounded}) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(matrix) % 16 == 0,
                    "products: expected matrices aligned to 16 bytes");
  }
  STD_CUDA_CHECK(launch_boltzmann_rows(params, current_stream(products)));
}

}  // namespace m3i
