// The part of the CUDA runtime's host API that this project's launchers use, run by the emulator.
#pragma once

#include "emulator/numbers/vector_types.h"
#include "emulator/runtime.h"

#include <cstddef>

// The errors that launches and kernels return here, with CUDA's numbers.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorAssert = 710,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// With C++ linkage: CUDA's own runtime, whose names are those of C, may be in the same process.
M3I_EMULATOR_API const char* cudaGetErrorName(cudaError_t error);
M3I_EMULATOR_API const char* cudaGetErrorString(cudaError_t error);
// The error of the last failed launch; the first function also clears it.
M3I_EMULATOR_API cudaError_t cudaGetLastError();
M3I_EMULATOR_API cudaError_t cudaPeekAtLastError();

M3I_EMULATOR_API cudaError_t cudaGetDevice(int* device);
M3I_EMULATOR_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                    int device);
// A launch returns after the kernel has finished, so that these have nothing to wait for.
M3I_EMULATOR_API cudaError_t cudaDeviceSynchronize();
M3I_EMULATOR_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);

// Memory that a kernel may access. It ends at an inaccessible page, and its bytes are 0xff.
M3I_EMULATOR_API cudaError_t cudaMalloc(void** memory, size_t size);
M3I_EMULATOR_API cudaError_t cudaFree(void* memory);
M3I_EMULATOR_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size,
                                             cudaMemcpyKind kind, cudaStream_t stream);
M3I_EMULATOR_API cudaError_t cudaMemsetAsync(void* memory, int value, size_t size,
                                             cudaStream_t stream);

namespace m3i::emulator {

M3I_EMULATOR_API cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute,
                                                    int value);

}  // namespace m3i::emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return m3i::emulator::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute,
                                               value);
}
