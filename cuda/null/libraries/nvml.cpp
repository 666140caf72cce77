// libnvidia-ml.so.1: what the project's telemetry, its doctor and torch ask of NVML. Sizes are the
// card's; all other numbers are constants that no card has, and every text says that it is null.
//
// No package carries nvml.h: the types below are those of NVIDIA's reference manual.
#include <cstdio>
#include <cstring>

#include "runtime/null.h"

using Device = long;  // a device's number and 1: no handle is a null pointer

namespace {

enum Result { kSuccess = 0, kInvalidArgument = 2, kNotSupported = 3, kNotFound = 6, kTooSmall = 7 };

constexpr unsigned kMilliwatts = 1000, kLimitMilliwatts = 2000, kMegahertz = 1, kCelsius = 1;
constexpr unsigned kSamplingMicroseconds = 1000;
constexpr unsigned long long kIdle = 1;  // the event reason "GPU is idle"

struct Memory {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct Rates {
  unsigned gpu, memory;
};

Result write_text(char* text, unsigned length, const char* value) {
  if (std::strlen(value) >= length) return kTooSmall;
  std::strcpy(text, value);
  return kSuccess;
}

// As torch spells what cudaGetDeviceProperties gives.
void uuid_of(Device device, char* text, size_t length) {
  std::snprintf(text, length, "GPU-%02lx000000-0000-0000-0000-000000000000", device);
}

bool exists(Device device) { return device >= 1 && device <= m3i::null::device_count(); }

template <typename T>
Result write(Device device, T* to, T value) {
  if (!exists(device) || to == nullptr) return kInvalidArgument;
  *to = value;
  return kSuccess;
}

}  // namespace

M3I_EXPORT Result nvmlInit() { return kSuccess; }
M3I_EXPORT Result nvmlInit_v2() { return kSuccess; }
M3I_EXPORT Result nvmlInitWithFlags(unsigned) { return kSuccess; }
M3I_EXPORT Result nvmlShutdown() { return kSuccess; }
M3I_EXPORT const char* nvmlErrorString(Result) { return "error of the null NVML"; }

// ---- The driver ---------------------------------------------------------------------------------

M3I_EXPORT Result nvmlSystemGetDriverVersion(char* text, unsigned length) {
  return write_text(text, length, "null");
}

M3I_EXPORT Result nvmlSystemGetNVMLVersion(char* text, unsigned length) {
  return write_text(text, length, "null");
}

M3I_EXPORT Result nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = CUDART_VERSION;
  return kSuccess;
}

// ---- Devices ------------------------------------------------------------------------------------

M3I_EXPORT Result nvmlDeviceGetCount_v2(unsigned* count) {
  *count = static_cast<unsigned>(m3i::null::device_count());
  return kSuccess;
}

M3I_EXPORT Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device* device) {
  return write(static_cast<Device>(index) + 1, device, static_cast<Device>(index) + 1);
}

M3I_EXPORT Result nvmlDeviceGetHandleByUUID(const char* uuid, Device* device) {
  for (Device each = 1; exists(each); ++each) {
    char own[64];
    uuid_of(each, own, sizeof own);
    if (std::strcmp(own, uuid) == 0) return write(each, device, each);
  }
  return kNotFound;
}

M3I_EXPORT Result nvmlDeviceGetHandleByPciBusId_v2(const char* address, Device* device) {
  unsigned domain, bus;
  if (std::sscanf(address, "%x:%x:", &domain, &bus) != 2 || domain != 0) return kNotFound;
  Device each = static_cast<Device>(bus);  // as cudaGetDeviceProperties numbers them
  return exists(each) ? write(each, device, each) : kNotFound;
}

M3I_EXPORT Result nvmlDeviceGetUUID(Device device, char* text, unsigned length) {
  if (!exists(device)) return kInvalidArgument;
  char own[64];
  uuid_of(device, own, sizeof own);
  return write_text(text, length, own);
}

M3I_EXPORT Result nvmlDeviceGetName(Device device, char* text, unsigned length) {
  if (!exists(device)) return kInvalidArgument;
  return write_text(text, length, (std::string(m3i::null::card().name) + " (null)").c_str());
}

M3I_EXPORT Result nvmlDeviceGetMemoryInfo(Device device, Memory* memory) {
  size_t total = m3i::null::card().memory;
  return write(device, memory, Memory{total, total, 0});
}

M3I_EXPORT Result nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2* memory) {
  size_t total = m3i::null::card().memory;
  if (memory == nullptr) return kInvalidArgument;
  return write(device, memory, MemoryV2{memory->version, total, 0, total, 0});
}

// torch names the processes of a card that ran out of memory.
M3I_EXPORT Result nvmlDeviceGetComputeRunningProcesses(Device device, unsigned* count, void*) {
  return write(device, count, 0u);
}

// ---- Figures ------------------------------------------------------------------------------------

M3I_EXPORT Result nvmlDeviceGetPowerUsage(Device device, unsigned* milliwatts) {
  return write(device, milliwatts, kMilliwatts);
}

M3I_EXPORT Result nvmlDeviceGetEnforcedPowerLimit(Device device, unsigned* milliwatts) {
  return write(device, milliwatts, kLimitMilliwatts);
}

M3I_EXPORT Result nvmlDeviceGetClockInfo(Device device, int, unsigned* megahertz) {
  return write(device, megahertz, kMegahertz);
}

M3I_EXPORT Result nvmlDeviceGetCurrentClocksEventReasons(Device device, unsigned long long* bits) {
  return write(device, bits, kIdle);
}

M3I_EXPORT Result nvmlDeviceGetCurrentClocksThrottleReasons(Device device,
                                                            unsigned long long* bits) {
  return write(device, bits, kIdle);
}

M3I_EXPORT Result nvmlDeviceGetTemperature(Device device, int, unsigned* celsius) {
  return write(device, celsius, kCelsius);
}

M3I_EXPORT Result nvmlDeviceGetUtilizationRates(Device device, Rates* rates) {
  return write(device, rates, Rates{0, 0});
}

M3I_EXPORT Result nvmlDeviceGetJpgUtilization(Device device, unsigned* percent, unsigned* period) {
  return write(device, period, kSamplingMicroseconds) ? kInvalidArgument
                                                      : write(device, percent, 0u);
}

M3I_EXPORT Result nvmlDeviceGetDecoderUtilization(Device device, unsigned* percent,
                                                  unsigned* period) {
  return write(device, period, kSamplingMicroseconds) ? kInvalidArgument
                                                      : write(device, percent, 0u);
}

M3I_EXPORT Result nvmlDeviceGetTotalEccErrors(Device device, int, int, unsigned long long* errors) {
  return write(device, errors, 0ull);
}

M3I_EXPORT Result nvmlDeviceGetRemappedRows(Device device, unsigned* corrected,
                                            unsigned* uncorrected, unsigned* pending,
                                            unsigned* failed) {
  for (unsigned* each : {corrected, uncorrected, pending}) {
    if (write(device, each, 0u) != kSuccess) return kInvalidArgument;
  }
  return write(device, failed, 0u);
}
