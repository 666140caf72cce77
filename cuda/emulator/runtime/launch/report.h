// Reports of errors in a kernel. The first report of a launch ends it.
#pragma once

#include "cuda_runtime_api.h"
#include "runtime/memory/memory.h"
#include "runtime/threads/block.h"

#include <string>

namespace m3i::emulator {

std::string to_string(uint3 index);
std::string to_string(Site site);
std::string hex(uint64_t value);
bool same(Site a, Site b);
inline Site at(uintptr_t instruction) {
  return {nullptr, 0, reinterpret_cast<const void*>(instruction)};
}
// Describes bytes of a region for a message.
std::string describe_memory(const Region& region, uintptr_t address, size_t size);

// The running thread, or `thread`, did `what`; the launch returns `error`.
[[noreturn]] void fail_with(cudaError_t error, const std::string& what, Site site);
[[noreturn]] void fail_thread(const Thread& thread, const std::string& what, Site site);

// As fail_with, but returns, so that the caller leaves the thread.
void record_failure(cudaError_t error, const std::string& what, Site site);

// Reports a deadlock: no thread can continue.
void report_deadlock(const Cluster& cluster);
void report_standstill(const Cluster& cluster);

// Of the running launch: cudaSuccess while nothing was reported.
cudaError_t launch_error();
void begin_reports(const void* kernel);
// Clears an older report, before a call that may fail without one.
void forget_report();

// Text of the last launch's report; empty if there was none.
extern "C" M3I_EMULATOR_API const char* m3i_emulator_report();

}  // namespace m3i::emulator
