// Every op's schema, once. Kernels are registered in <op>/<op>_cpu.cpp and <op>/<op>_cuda.cpp.
#include "m3i/python_module.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(m3i, library) {
  library.def(
      "mask_mix(Tensor views, Tensor mask, Tensor pairs, float[] mean, float[] std, ScalarType "
      "dtype)"
      " -> Tensor");
}

M3I_PYTHON_MODULE(_C)
