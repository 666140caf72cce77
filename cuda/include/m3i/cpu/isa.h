// The vector instructions that CPU kernels may use, detected once at run time.
#pragma once

#include <cstdlib>
#include <cstring>

// Marks a function built for more than the baseline, to be called only where cpu_isa() allows.
#if defined(__x86_64__)
#define M3I_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define M3I_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

namespace m3i {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// ATEN_CPU_CAPABILITY=default|avx2 lowers it, as it does for torch's own kernels.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = [] {
#if defined(__x86_64__)
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const auto limited_to = [&](const char* name) { return limit && !std::strcmp(limit, name); };
    if (limited_to("default")) return CpuIsa::kBaseline;
    if (!limited_to("avx2") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return CpuIsa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
    return CpuIsa::kBaseline;
  }();
  return isa;
}

}  // namespace m3i
