// add_layer_norm on the CPU: the table of kernels of one instruction set.
#pragma once

#include "add_layer_norm/params.h"

namespace m3i {

struct AddLayerNormCpuKernels {
  // Writes the outputs of rows [begin, end).
  void (*forward)(const AddLayerNormParams& params, int64_t begin, int64_t end);
  // Writes the gradients of rows [begin, end), and their sums to the partial sums of `block`.
  void (*backward)(const AddLayerNormBwdParams& params, int64_t begin, int64_t end, int64_t block);
  void (*affine)(const AddLayerNormAffineParams& params);
};

extern const AddLayerNormCpuKernels kAddLayerNormBaseline;
#if defined(__x86_64__)
extern const AddLayerNormCpuKernels kAddLayerNormAvx2;
extern const AddLayerNormCpuKernels kAddLayerNormAvx512;
#endif

}  // namespace m3i
