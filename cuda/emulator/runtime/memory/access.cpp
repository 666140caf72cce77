// Every access of a kernel comes here: through the calls that g++'s -fsanitize=thread inserts
// before plain accesses, those of -fsanitize=alignment,bounds, and those of the emulator's own
// intrinsics.
#include "runtime/memory/access.h"
#include "runtime/launch/module.h"
#include "runtime/launch/report.h"
#include "runtime/memory/memory.h"
#include "runtime/memory/race.h"
#include "runtime/memory/requests.h"
#include "runtime/threads/cluster.h"
#include "runtime/threads/scheduler.h"

#include <cstring>
#include <string>

namespace m3i::emulator {

namespace {

std::string sized(const char* kind, Access access, uintptr_t address, size_t size) {
  return std::string(kind) + " " + name_of(access) + " of " + std::to_string(size) + " bytes at " +
         hex(address);
}

// Constants and device variables of the kernel's own library.
bool in_module(uintptr_t address, size_t size, Access access, uintptr_t instruction) {
  const Module* module = module_of(reinterpret_cast<const void*>(instruction));
  const Segment* segment = module ? module->segment_at(address) : nullptr;
  return segment && address + size <= segment->end && (!writes(access) || segment->writable);
}

[[noreturn]] void fail_outside(uintptr_t address, size_t size, Access access,
                               uintptr_t instruction) {
  for (uint32_t id = 0; id < running_cluster->num_threads(); ++id) {
    const Thread& other = running_cluster->thread(id);
    if (other.stack.low && other.stack.holds(address, 1)) {
      fail_with(cudaErrorIllegalAddress,
                sized("out-of-bounds", access, address, size) + ", a local variable of thread " +
                    to_string(other.index),
                at(instruction));
    }
  }
  fail_with(cudaErrorIllegalAddress,
            sized("out-of-bounds", access, address, size) + ", " + describe_outside(address),
            at(instruction));
}

// Between two shared variables lies padding that no kernel may touch.
void check_shared_variable(const Region& region, uintptr_t address, size_t size, Access access,
                           uintptr_t instruction) {
  if (running_cluster->blocks.size() > 1) {
    fail(
        "a static shared variable in a cluster, whose blocks have one copy of it in the emulator: "
        "use dynamic_shared()",
        at(instruction));
  }
  static const Symbol* last = nullptr;
  static uintptr_t last_base = 0;
  const size_t offset = address - region.begin;
  if (last_base != region.begin || !last || offset - last->begin >= last->size) {
    last_base = region.begin;
    last = module_of(reinterpret_cast<const void*>(instruction))->shared_at(offset);
  }
  if (!last || offset + size > last->begin + last->size) {
    fail_with(cudaErrorIllegalAddress,
              sized("out-of-bounds", access, address, size) + ", " +
                  (last ? "across the end of shared variable " + demangle(last->name)
                        : "outside every shared variable"),
              at(instruction));
  }
}

}  // namespace

void check_at(uintptr_t address, size_t size, Access access, uintptr_t instruction) {
  if (!running || running->stack.holds(address, size) || size == 0) return;
  Region* region = region_at(address);
  if (!region) {
    if (in_module(address, size, access, instruction)) return;
    fail_outside(address, size, access, instruction);
  }
  if (region->kind == Region::Kind::kStaticShared) {
    check_shared_variable(*region, address, size, access, instruction);
  } else if (address + size > region->end) {
    fail_with(cudaErrorIllegalAddress,
              sized("out-of-bounds", access, address, size) + ", of which only " +
                  std::to_string(region->end - address) + " lie in it",
              at(instruction));
  } else if (region->shared() && region->block != running_block->rank) {
    visit(*region, address, at(instruction));
  }
  check_race(*region, address, size, access, instruction);
  count_access(*region, address, size, access, instruction);
}

void check_aligned(uintptr_t address, size_t size, Access access, uintptr_t instruction) {
  if (running && address % size != 0) {
    fail_with(cudaErrorMisalignedAddress, sized("misaligned", access, address, size),
              at(instruction));
  }
  check_at(address, size, access, instruction);
}

Region& shared_region(uintptr_t address, uintptr_t instruction) {
  Region* region = region_at(address);
  if (!region || !region->shared()) {
    fail_with(cudaErrorIllegalAddress, hex(address) + " is not in shared memory", at(instruction));
  }
  return *region;
}

void check_access(const volatile void* address, size_t size, Access access,
                  const void* return_address) {
  const auto instruction = reinterpret_cast<uintptr_t>(return_address);
  check_aligned(reinterpret_cast<uintptr_t>(address), size, access, instruction);
  // Clusters draw their tickets in turn.
  if (running && access == Access::kUpdate && running_cluster->barriers.size() > 1) {
    give_way(at(instruction));
  }
}

void check_range(const void* address, size_t size, Access access, const void* return_address) {
  check_at(reinterpret_cast<uintptr_t>(address), size, access,
           reinterpret_cast<uintptr_t>(return_address));
}

}  // namespace m3i::emulator

// ---- Calls that the compiler inserts ------------------------------------------------------------

using m3i::emulator::Access;
using m3i::emulator::check_aligned;
using m3i::emulator::check_at;

#define M3I_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define M3I_ACCESS(size)                                                                         \
  M3I_EMULATOR_API void __tsan_read##size(void* address) {                                       \
    check_aligned(reinterpret_cast<uintptr_t>(address), size, Access::kRead, M3I_CALLER);        \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_write##size(void* address) {                                      \
    check_aligned(reinterpret_cast<uintptr_t>(address), size, Access::kWrite, M3I_CALLER);       \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_unaligned_read##size(void* address) {                             \
    check_at(reinterpret_cast<uintptr_t>(address), size, Access::kRead, M3I_CALLER);             \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_unaligned_write##size(void* address) {                            \
    check_at(reinterpret_cast<uintptr_t>(address), size, Access::kWrite, M3I_CALLER);            \
  }                                                                                              \
  /* A volatile access is meant to meet others, as an atomic one is. */                          \
  M3I_EMULATOR_API void __tsan_volatile_read##size(void* address) {                              \
    check_aligned(reinterpret_cast<uintptr_t>(address), size, Access::kAtomicRead, M3I_CALLER);  \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_volatile_write##size(void* address) {                             \
    check_aligned(reinterpret_cast<uintptr_t>(address), size, Access::kAtomicWrite, M3I_CALLER); \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_unaligned_volatile_read##size(void* address) {                    \
    check_at(reinterpret_cast<uintptr_t>(address), size, Access::kAtomicRead, M3I_CALLER);       \
  }                                                                                              \
  M3I_EMULATOR_API void __tsan_unaligned_volatile_write##size(void* address) {                   \
    check_at(reinterpret_cast<uintptr_t>(address), size, Access::kAtomicWrite, M3I_CALLER);      \
  }

extern "C" {
M3I_ACCESS(1)
M3I_ACCESS(2)
M3I_ACCESS(4)
M3I_ACCESS(8)
M3I_ACCESS(16)

M3I_EMULATOR_API void __tsan_read_range(void* address, size_t size) {
  check_at(reinterpret_cast<uintptr_t>(address), size, Access::kRead, M3I_CALLER);
}
M3I_EMULATOR_API void __tsan_write_range(void* address, size_t size) {
  check_at(reinterpret_cast<uintptr_t>(address), size, Access::kWrite, M3I_CALLER);
}
M3I_EMULATOR_API void __tsan_init() {}
}
