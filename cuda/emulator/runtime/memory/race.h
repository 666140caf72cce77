// The race check: the last accesses to each byte, and whether another access is ordered after them.
//
// Time is counted in epochs: a new one begins at each launch, block and __syncthreads, and
// everything before it is ordered before everything in it, except for other blocks of the same
// launch. Inside an epoch, __syncwarp, named barriers and mbarriers order some threads after
// others: each thread has a vector clock, a count of its own synchronisations and the last known
// counts of the others. A cluster of several blocks has one epoch, in which __syncthreads is such a
// barrier.
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
// Orders all earlier accesses of a block's threads before all later ones.
void order_threads(Block& block);

// Orders a thread's accesses before its release to a clock before those of a thread after it has
// acquired from that clock.
void release(Thread& thread, SyncClock& clock);
void acquire(const Thread& thread, const SyncClock& clock);

// Records an access of the running thread to bytes of a region, and fails if it races with another
// one, or reads shared memory that the block has not written.
void check_race(Region& region, uintptr_t address, size_t size, Access access,
                uintptr_t instruction);

// Marks bytes to which a copy of the running thread is in flight: any access to them fails until it
// has landed.
void mark_in_flight(Region& region, uintptr_t address, size_t size);
void mark_written(Region& region, uintptr_t address, size_t size);

// Marks bytes of which the running thread has made an mbarrier: plain accesses to them fail.
void mark_mbarrier(Region& region, uintptr_t address);

// The stamp of an access by the running thread now.
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
// Names the owner of a stamp for a message.
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

// Records that the owner of a stamp reads these bytes.
void note_read(Region& region, uintptr_t address, size_t size, Stamp stamp);
// Makes the thread's writes so far visible to the asynchronous proxy, after a barrier.
void note_proxy_fence(Thread& thread);
void note_global_proxy_fence(Thread& thread);
// The thread had heard of what `stamp` marks at its last global fence, or it is its own.
bool known_at_global_fence(const Thread& thread, Stamp stamp);

}  // namespace m3i::emulator
