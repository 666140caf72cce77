// cudaError_t and cudaStream_t, for the declarations of launchers. A file built without the CUDA
// headers (a CPU kernel that shares the parameter struct) or by NVRTC calls no launcher and gets
// incomplete stand-ins.
#pragma once

#if !defined(__CUDACC_RTC__) && __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else
enum class M3iNoCudaError : int;
using cudaError_t = M3iNoCudaError;
using cudaStream_t = struct CUstream_st*;
#endif
