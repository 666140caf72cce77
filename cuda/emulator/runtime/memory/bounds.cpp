// The calls of g++'s -fsanitize=alignment,bounds: an access that its type's alignment does not
// allow, and an index outside an array whose size the type gives.
#include "runtime/launch/report.h"
#include "runtime/threads/scheduler.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

// What the compiler passes, as far as it is used.
struct Location {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Location location;
  const Type* type;
};
struct OutOfBounds {
  Location location;
  const Type* array;
};

using namespace m3i::emulator;

void fail_at(cudaError_t error, const std::string& what, const Location& location) {
  const Site site{location.file, static_cast<int>(location.line), nullptr};
  if (running) fail_with(error, what, site);
  std::fprintf(stderr, "%s, in host code at %s\n", what.c_str(), to_string(site).c_str());
  std::abort();
}

}  // namespace

extern "C" {

M3I_EMULATOR_API void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
  fail_at(cudaErrorMisalignedAddress,
          "misaligned access at " + hex(address) + " to " + data->type->name, data->location);
}

M3I_EMULATOR_API void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  fail_at(cudaErrorIllegalAddress,
          "out-of-bounds index " + std::to_string(static_cast<intptr_t>(index)) + " of an array " +
              data->array->name,
          data->location);
}
}
