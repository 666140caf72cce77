#include "runtime/launch/device.h"

#include "cuda_runtime_api.h"
#include "runtime/launch/report.h"

#include <string>

namespace m3i::emulator {

namespace {
int architecture = 80;
}

size_t most_shared_bytes() { return (architecture >= 90 ? 227 : 163) * 1024; }

bool has_clusters() { return architecture >= 90; }

void require_architecture(int compute_capability, const char* what, Site site) {
  if (architecture >= compute_capability) return;
  fail((std::string(what) + " on compute capability " + std::to_string(architecture / 10) + "." +
        std::to_string(architecture % 10))
           .c_str(),
       site);
}

void m3i_emulator_set_architecture(int compute_capability) { architecture = compute_capability; }

}  // namespace m3i::emulator

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace m3i::emulator;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedBytes;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = architecture >= 90 ? 132 : 108;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = architecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = architecture % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(most_shared_bytes());
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

#define M3I_ERRORS(row)                                                                         \
  row(cudaSuccess, "no error") row(cudaErrorInvalidValue, "invalid argument")                   \
      row(cudaErrorMemoryAllocation, "out of memory")                                           \
          row(cudaErrorInvalidConfiguration, "invalid configuration argument")                  \
              row(cudaErrorInvalidDeviceFunction, "invalid device function") row(               \
                  cudaErrorInvalidDevice, "invalid device ordinal")                             \
                  row(cudaErrorIllegalAddress, "an illegal memory access was encountered") row( \
                      cudaErrorLaunchOutOfResources, "too many resources requested for launch") \
                      row(cudaErrorAssert, "device-side assert triggered")                      \
                          row(cudaErrorMisalignedAddress, "misaligned address")                 \
                              row(cudaErrorLaunchFailure, "unspecified launch failure")         \
                                  row(cudaErrorNotSupported, "operation not supported")         \
                                      row(cudaErrorInvalidClusterSize, "cluster misconfiguration")

#define M3I_NAME(error, text) \
  case error:                 \
    return #error;
#define M3I_TEXT(error, text) \
  case error:                 \
    return text;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) { M3I_ERRORS(M3I_NAME) }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) { M3I_ERRORS(M3I_TEXT) }
  return "unrecognized error code";
}
