// add_layer_norm: the ops on the CPU; kernels in cpu/kernels.h, once for each instruction set.
//
// Threads share out blocks of rows whose number does not depend on theirs, and the blocks' sums are
// added in order: any number of threads gives the same bits.
#include "add_layer_norm/cpu/kernel_table.h"

#include "add_layer_norm/args.h"
#include "m3i/cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Elements of a block, at least: fewer are not worth waking a thread, and leave more sums to add.
constexpr int64_t kBlockElements = 32 * 1024;

const AddLayerNormCpuKernels& fastest_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kAddLayerNormAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kAddLayerNormAvx2;
#endif
  return kAddLayerNormBaseline;
}

int64_t rows_of_block(const AddLayerNormRows& of) {
  return (kBlockElements + of.width - 1) / of.width;
}

int64_t num_blocks(const AddLayerNormRows& of) {
  return (of.rows + rows_of_block(of) - 1) / rows_of_block(of);
}

// body(begin, end, block) of every block of rows.
template <class Body>
void for_each_block(const AddLayerNormRows& of, const Body& body) {
  const int64_t rows = rows_of_block(of);
  torch::stable::parallel_for(0, num_blocks(of), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * rows, std::min(of.rows, (block + 1) * rows), block);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x,
                                                              const std::optional<Tensor>& branch,
                                                              const Tensor& weight,
                                                              const Tensor& bias, double eps,
                                                              torch::headeronly::ScalarType dtype) {
  const AddLayerNormCall call = prepare_add_layer_norm(x, branch, weight, bias, eps, dtype);
  const AddLayerNormCpuKernels& kernels = fastest_kernels();
  for_each_block(call.params.of, [&](int64_t begin, int64_t end, int64_t) {
    kernels.forward(call.params, begin, end);
  });
  return {call.sum, call.normed, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd_cpu(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, bool needs_branch,
    bool needs_affine) {
  AddLayerNormBwdCall call = prepare_add_layer_norm_bwd(grad_normed, grad_sum, sum, weight, mean,
                                                        rstd, needs_branch, needs_affine);
  const AddLayerNormRows& of = call.params.of;
  const AddLayerNormCpuKernels& kernels = fastest_kernels();
  const int64_t blocks = needs_affine ? num_blocks(of) : 0;
  Tensor partials = torch::stable::new_empty(sum, {blocks, 2, of.width}, call.accumulator);
  call.params.partials = needs_affine ? partials.mutable_data_ptr() : nullptr;
  for_each_block(of, [&](int64_t begin, int64_t end, int64_t block) {
    kernels.backward(call.params, begin, end, block);
  });
  if (needs_affine) kernels.affine(affine_params(call, blocks, partials));
  return {call.grad_x, call.grad_branch, call.grad_weight, call.grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cpu));
  library.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd_cpu));
}

}  // namespace
}  // namespace m3i
