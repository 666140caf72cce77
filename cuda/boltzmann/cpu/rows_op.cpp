// boltzmann_rows_pass on the CPU; kernels in cpu/rows_kernels.h, once for each instruction set.
#include "boltzmann/cpu/rows_table.h"
#include "boltzmann/rows/args.h"
#include "m3i/cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Smallest number of elements for which another thread pays off.
constexpr int64_t kGrainElements = 16 * 1024;

const BoltzmannRowsTable& fastest_table() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kBoltzmannRowsAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kBoltzmannRowsAvx2;
#endif
  return kBoltzmannRowsBaseline;
}

void check_classes(const BoltzmannRowsParams& params) {
  for (int64_t i = 0; params.row_ids && i < params.rows; ++i) {
    STD_TORCH_CHECK(-1 <= params.row_ids[i] && params.row_ids[i] < params.columns,
                    "targets: expected rows of z from 0 to ", params.columns - 1,
                    ", or -1 to ignore, got ", params.row_ids[i], " in place ", i);
  }
}

void boltzmann_rows_pass_cpu(const Tensor& products, std::optional<Tensor> target_products,
                             int64_t columns, const Tensor& scale, std::optional<Tensor> bias,
                             std::optional<Tensor> target_scale, std::optional<Tensor> target_bias,
                             std::optional<Tensor> row_ids, std::optional<Tensor> row_weights,
                             const Tensor& nll, std::optional<Tensor> scale_grads,
                             std::optional<Tensor> rounded, bool writes_products) {
  STD_TORCH_CHECK(!rounded, "rounded: expected None on a CPU, whose products are wide");
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
  check_classes(params);
  const BoltzmannRowsTable& table = fastest_table();
  const BoltzmannRowsKernels& kernels =
      params.dtype == DType::kFloat64 ? table.of_double : table.of_float;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, params.columns));
  torch::stable::parallel_for(0, params.rows, grain, [&](int64_t begin, int64_t end) {
    params.row_ids ? kernels.classes(params, begin, end) : kernels.soft(params, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("boltzmann_rows_pass", TORCH_BOX(&boltzmann_rows_pass_cpu));
}

}  // namespace
}  // namespace m3i
