// Who touched which byte, and whether another access is ordered after it.
//
// Time is counted in epochs: a new one begins at each launch, block and __syncthreads, and
// everything before it is ordered before everything in it, but for another block of the same
// launch. Inside an epoch, __syncwarp, named barriers and mbarriers order some threads after
// others: each thread has a clock of its own synchronisations and a row of the clocks of the
// others, as of when it last heard of them. A cluster of several blocks has one epoch, and
// __syncthreads is one of these in it.
#pragma once

#include "runtime/memory/memory.h"
#include "runtime/threads/block.h"

#include <string>

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
// For the threads of the running cluster.
void begin_cluster_epoch();
// What the threads of a block did before is ordered before what they do now.
void order_threads(Block& block);

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

// The running thread has made an mbarrier of these bytes: no plain access may touch them any more.
void mark_mbarrier(Region& region, uintptr_t address);

// Now, by the running thread.
Stamp own_stamp();
// What `stamp` marks happened before what the running thread, or the thread of that id, does now,
// or is its own.
bool ordered(Stamp stamp);
bool ordered(Stamp stamp, uint32_t id);
// The stamp, or 0 if an earlier cluster made it.
Stamp of_this_cluster(Stamp stamp);
// The thread has heard of one of the block; one of the block has heard of that thread's clock.
bool heard_of_block(const Thread& thread, const Block& block);
bool block_heard_of(const Block& block, uint32_t id, uint32_t clock);
// Whose stamp it is, for a message.
std::string who(Stamp stamp);

// Somebody beside the threads of the block: the copies that land through one mbarrier, or the
// products of a warpgroup. Its clock is the phase in which they land, or how many were issued, from
// 1 on; __syncthreads orders nobody after it who has not heard of that phase.
uint32_t add_agent();
Stamp agent_stamp(uint32_t agent, uint64_t phase);
void mark_written_by_agent(Region& region, uintptr_t address, size_t size, uint32_t agent,
                           uint32_t phase);
// All that it wrote up to this phase is ordered before what the thread does now.
void hear_of_agent(const Thread& thread, uint32_t agent, uint32_t phase);

// The owner of a stamp reads these bytes.
void note_read(Region& region, uintptr_t address, size_t size, Stamp stamp);
// What the thread wrote so far is visible to the asynchronous proxy, where a barrier orders it.
void note_proxy_fence(Thread& thread);

}  // namespace m3i::emulator
