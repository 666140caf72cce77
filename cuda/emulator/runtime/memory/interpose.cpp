// Functions of the C library that a kernel calls; the linker's --wrap sends the calls here.
#include "runtime/launch/report.h"
#include "runtime/threads/scheduler.h"

#include <cassert>
#include <cstdlib>
#include <cstring>
#include <string>

// access.cpp
namespace m3i::emulator {
void check_range(const void* address, size_t size, Access access, const void* return_address);
}

using m3i::emulator::Access;
using m3i::emulator::check_range;

extern "C" {

M3I_EMULATOR_API void* __wrap_memcpy(void* to, const void* from, size_t size) {
  check_range(from, size, Access::kRead, __builtin_return_address(0));
  check_range(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memcpy(to, from, size);
}

M3I_EMULATOR_API void* __wrap_memmove(void* to, const void* from, size_t size) {
  check_range(from, size, Access::kRead, __builtin_return_address(0));
  check_range(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memmove(to, from, size);
}

M3I_EMULATOR_API void* __wrap_memset(void* to, int value, size_t size) {
  check_range(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memset(to, value, size);
}

[[noreturn]] M3I_EMULATOR_API void __wrap___assert_fail(const char* condition, const char* file,
                                                        unsigned line, const char* function) {
  using namespace m3i::emulator;
  if (!running) __assert_fail(condition, file, line, function);
  fail_with(cudaErrorAssert, std::string("assertion failed: ") + condition,
            {file, static_cast<int>(line), nullptr});
}
}
