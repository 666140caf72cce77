// The runtime's functions that the emulator's headers call; it is compiled without instrumentation.
#pragma once

#include <cstddef>
#include <cstdint>

#define M3I_EMULATOR_API __attribute__((visibility("default")))

// Marks a header's function that accesses memory of the kernel: it reports the access to the
// runtime, and is not instrumented. Never inlined, so that its return address is in the kernel.
#define M3I_EMULATOR_ACCESS __attribute__((no_sanitize("thread"), noinline))

// A kernel's line, as the default argument of an intrinsic.
#define M3I_EMULATOR_SITE ::m3i::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace m3i::emulator {

// A place in a kernel: its file and line, or, where that is null, an instruction.
struct Site {
  const char* file = nullptr;
  int line = 0;
  const void* instruction = nullptr;
};

// Atomic accesses may overlap each other; kUpdate reads and writes, atomically.
enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite, kUpdate };

// Reports an invalid access of the running thread.
M3I_EMULATOR_API void check_access(const volatile void* address, size_t size, Access access,
                                   const void* return_address);

// Ends the launch with a report in which the running thread says `what`.
[[noreturn]] M3I_EMULATOR_API void fail(const char* what, Site site);

// ---- Synchronisation ----------------------------------------------------------------------------

// Reductions of one value of each thread of a block, at a barrier.
enum class Vote { kNone, kCount, kAnd, kOr };

M3I_EMULATOR_API int block_barrier(Vote vote, bool predicate, Site site);
M3I_EMULATOR_API void named_barrier(int id, int num_threads, bool wait);
M3I_EMULATOR_API void warp_barrier(uint32_t mask, Site site);
M3I_EMULATOR_API void thread_fence();
M3I_EMULATOR_API void yield(Site site);

// The lanes in `mask` wait for each other under the name of the operation. The last one to arrive
// calls complete(lanes that arrived, payload of each lane), then all continue.
using Complete = void (*)(uint32_t lanes, void* const* payloads, Site site);
M3I_EMULATOR_API void meet(uint32_t mask, const char* operation, Complete complete, void* payload,
                           Site site);

// ---- Warp operations, on 64-bit words -----------------------------------------------------------

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Reduction { kAdd, kMin, kMax, kSignedMin, kSignedMax, kAnd, kOr, kXor };

M3I_EMULATOR_API uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand,
                                  int width, Site site);
M3I_EMULATOR_API uint32_t ballot(uint32_t mask, bool predicate, Site site);
// The lanes whose value equals the caller's.
M3I_EMULATOR_API uint32_t match_any(uint32_t mask, uint64_t value, Site site);
M3I_EMULATOR_API uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, Site site);
M3I_EMULATOR_API uint32_t lane_bit();

// ---- Memory -------------------------------------------------------------------------------------

// The dynamic shared memory of the running block.
M3I_EMULATOR_API void* dynamic_shared();

}  // namespace m3i::emulator
