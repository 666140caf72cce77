// Devices: how many, what they say of themselves, errors and versions.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime/null.h"

namespace m3i::null {

namespace {

constexpr size_t kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB;

// NVIDIA's data sheets and tuning guides of each architecture.
constexpr Card kCards[] = {
    {"NVIDIA A100-SXM4-80GB", 8, 0, 108, 80 * kGiB, 40 * kMiB, 164 * kKiB, 163 * kKiB, 5120,
     1410000},
    {"NVIDIA H100 80GB HBM3", 9, 0, 132, 80 * kGiB, 50 * kMiB, 228 * kKiB, 227 * kKiB, 5120,
     1980000},
    {"NVIDIA B200", 10, 0, 148, 180 * kGiB, 126 * kMiB, 228 * kKiB, 227 * kKiB, 8192, 1965000},
};
constexpr const char* kNames[] = {"a100", "h100", "b200"};

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

[[noreturn]] void refuse(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::_Exit(2);
}

// NULL_CUDA_FAIL=CALL:N:CODE
struct Injection {
  std::string call;
  long at = 0;
  int code = 0;
};

Injection read_injection() {
  const char* text = std::getenv("NULL_CUDA_FAIL");
  if (text == nullptr || *text == '\0') return {};
  std::string all = text;
  size_t first = all.find(':'), second = all.rfind(':');
  if (first == std::string::npos || second == first) {
    refuse("NULL_CUDA_FAIL: expected CALL:N:CODE, as cudaMalloc:3:2, got " + all);
  }
  return {all.substr(0, first), std::atol(all.c_str() + first + 1),
          std::atoi(all.c_str() + second + 1)};
}

}  // namespace

const Card& card() {
  static const Card& chosen = []() -> const Card& {
    const char* name = std::getenv("NULL_CUDA_CARD");
    std::string wanted = name != nullptr && *name != '\0' ? name : "h100";
    for (size_t i = 0; i < sizeof kCards / sizeof *kCards; ++i) {
      if (wanted == kNames[i]) return kCards[i];
    }
    refuse("NULL_CUDA_CARD: expected a100, h100 or b200, got " + wanted);
  }();
  return chosen;
}

int device_count() {
  static const int count = [] {
    const char* text = std::getenv("NULL_CUDA_DEVICES");
    int devices = text != nullptr && *text != '\0' ? std::atoi(text) : 1;
    if (devices < 0) refuse(std::string("NULL_CUDA_DEVICES: expected 0 or more, got ") + text);
    return devices;
  }();
  return count;
}

int current_device() { return device; }

cudaError_t fail(cudaError_t error, const std::string& what) {
  last_error = error;
  Record("error").number("code", error).text("call", what).python_line();
  return error;
}

// Errors after which CUDA says of a process that any further work returns the same error.
bool is_sticky(int code) {
  return code == cudaErrorIllegalAddress || code == cudaErrorLaunchTimeout ||
         code == cudaErrorAssert || code == cudaErrorECCUncorrectable ||
         (code >= cudaErrorHardwareStackError && code <= cudaErrorLaunchFailure);
}

cudaError_t injected_error(const char* call) {
  static const Injection wanted = read_injection();
  if (wanted.call.empty()) return cudaSuccess;
  static long calls = 0;
  std::lock_guard<std::recursive_mutex> guard(lock());
  bool lost = is_sticky(wanted.code) && calls >= wanted.at;
  bool now = wanted.call == call && ++calls == wanted.at;
  return now || lost ? static_cast<cudaError_t>(wanted.code) : cudaSuccess;
}

}  // namespace m3i::null

using namespace m3i::null;

// A wrong setting ends the process when the runtime is loaded, whatever the program goes on to use.
__attribute__((constructor)) static void check_settings() {
  card();
  device_count();
  injected_error("");
}

M3I_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count > 0 ? cudaSuccess : fail(cudaErrorNoDevice, "cudaGetDeviceCount");
}

M3I_EXPORT cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted >= device_count()) return fail(cudaErrorInvalidDevice, "cudaSetDevice");
  device = wanted;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

M3I_EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

// CUDA's names of the errors that this runtime gives; callers compare some of them.
M3I_EXPORT const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define M3I_NAME(name) \
  case name:           \
    return #name;
    M3I_NAME(cudaSuccess)
    M3I_NAME(cudaErrorInvalidValue)
    M3I_NAME(cudaErrorMemoryAllocation)
    M3I_NAME(cudaErrorInvalidConfiguration)
    M3I_NAME(cudaErrorInvalidDevice)
    M3I_NAME(cudaErrorNoDevice)
    M3I_NAME(cudaErrorInvalidDeviceFunction)
    M3I_NAME(cudaErrorNoKernelImageForDevice)
    M3I_NAME(cudaErrorIllegalState)
    M3I_NAME(cudaErrorNotReady)
    M3I_NAME(cudaErrorNotSupported)
    M3I_NAME(cudaErrorIllegalAddress)
    M3I_NAME(cudaErrorLaunchFailure)
    M3I_NAME(cudaErrorStreamCaptureUnsupported)
    M3I_NAME(cudaErrorStreamCaptureInvalidated)
    M3I_NAME(cudaErrorStreamCaptureMerge)
    M3I_NAME(cudaErrorStreamCaptureUnmatched)
    M3I_NAME(cudaErrorStreamCaptureUnjoined)
    M3I_NAME(cudaErrorStreamCaptureIsolation)
    M3I_NAME(cudaErrorStreamCaptureImplicit)
    M3I_NAME(cudaErrorStreamCaptureWrongThread)
    M3I_NAME(cudaErrorCapturedEvent)
#undef M3I_NAME
    default:
      return "cudaError";
  }
}

M3I_EXPORT const char* cudaGetErrorString(cudaError_t error) {
  // torch's messages carry this text; that of memory is what users search for.
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  thread_local char text[96];
  std::snprintf(text, sizeof text, "%s (%d, null CUDA runtime)", cudaGetErrorName(error), error);
  return text;
}

M3I_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int of) {
  if (of < 0 || of >= device_count()) {
    return fail(cudaErrorInvalidDevice, "cudaGetDeviceProperties");
  }
  cudaDeviceProp& p = *properties;
  std::memset(&p, 0, sizeof p);
  std::strncpy(p.name, card().name, sizeof p.name - 1);
  p.uuid.bytes[0] = static_cast<char>(of + 1);
  p.major = card().major;
  p.minor = card().minor;
  p.multiProcessorCount = card().multiprocessors;
  p.totalGlobalMem = card().memory;
  p.l2CacheSize = static_cast<int>(card().l2_cache);
  p.sharedMemPerBlock = 48 * kKiB;
  p.sharedMemPerMultiprocessor = card().shared_per_multiprocessor;
  p.sharedMemPerBlockOptin = card().shared_per_block_optin;
  p.reservedSharedMemPerBlock = kKiB;
  p.memoryBusWidth = card().memory_bus_bits;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.totalConstMem = 64 * kKiB;
  p.memPitch = 2147483647;
  p.textureAlignment = 512;
  p.pciBusID = of + 1;
  p.asyncEngineCount = 3;
  p.unifiedAddressing = p.managedMemory = p.concurrentKernels = p.cooperativeLaunch = 1;
  p.ECCEnabled = p.streamPrioritiesSupported = p.memoryPoolsSupported = 1;
  p.clusterLaunch = card().major >= 9;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = card().major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = card().minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = card().multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * kKiB;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(card().shared_per_block_optin);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(card().shared_per_multiprocessor);
      break;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(card().l2_cache);
      break;
    case cudaDevAttrClockRate:
      *value = card().clock_khz;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = card().memory_bus_bits;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int from, int to) {
  *can = from != to;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

M3I_EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int of) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", of + 1);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
M3I_EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

M3I_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  // The driver's names may carry a version: torch asks for cuMemCreate, the library has it as it
  // is.
  *function = dlsym(RTLD_DEFAULT, name);
  if (result != nullptr) {
    *result =
        *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return *function != nullptr ? cudaSuccess : fail(cudaErrorSymbolNotFound, name);
}
