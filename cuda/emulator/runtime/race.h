// Who touched which byte, and whether another access is ordered after it.
//
// Time is counted in epochs: a new one begins at each launch, block and __syncthreads, and
// everything before it is ordered before everything in it, but for another block of the same
// launch. Inside an epoch, __syncwarp and named barriers order some threads after others: each
// thread has a clock of its own synchronisations and a row of the clocks of the others, as of when
// it last heard of them.
#pragma once

#include "block.h"
#include "memory.h"

namespace m3i::emulator {

constexpr bool reads(Access access) {
  return access != Access::kWrite && access != Access::kAtomicWrite;
}
constexpr bool writes(Access access) {
  return access != Access::kRead && access != Access::kAtomicRead;
}
constexpr bool atomic(Access access) { return access >= Access::kAtomicRead; }
const char* name_of(Access access);

void begin_launch_epoch();
void begin_block_epoch();
void begin_epoch();

// What a thread did before it releases to a clock is ordered before what a thread does after it has
// acquired from it.
void release(Thread& thread, SyncClock& clock);
void acquire(const Thread& thread, const SyncClock& clock);

// Notes an access of the running thread to part of a region, and fails if it races with another
// one, or reads shared memory that the block has not written.
void check_race(Region& region, uintptr_t address, size_t size, Access access,
                uintptr_t instruction);

// The running thread's copy to these bytes is under way: any access of them fails until it has
// landed.
void mark_in_flight(Region& region, uintptr_t address, size_t size);
void mark_written(Region& region, uintptr_t address, size_t size);

}  // namespace m3i::emulator
