// gaussian on the CPU: the table of kernels of one instruction set.
#pragma once

#include "gaussian/params.h"

namespace m3i {

struct GaussianCpuKernels {
  // Writes the outputs of rows [begin, end) and returns their sum of (t - p)^2.
  double (*forward)(const GaussianParams& params, int64_t begin, int64_t end);
  // Writes elements [begin, end) of C and returns their sum of C * (p^T p).
  double (*product)(const GaussianProductParams& params, int64_t begin, int64_t end);
  // Writes the gradient of rows [begin, end).
  void (*backward)(const GaussianBwdParams& params, int64_t begin, int64_t end);
};

extern const GaussianCpuKernels kGaussianBaseline;
#if defined(__x86_64__)
extern const GaussianCpuKernels kGaussianAvx2;
extern const GaussianCpuKernels kGaussianAvx512;
#endif

}  // namespace m3i
