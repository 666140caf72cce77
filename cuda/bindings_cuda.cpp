// The module that carries the CUDA kernels. Its own file: a torch without CUDA cannot load it.
#include "m3i/host/python_module.h"

M3I_PYTHON_MODULE(_C_cuda, nullptr)
