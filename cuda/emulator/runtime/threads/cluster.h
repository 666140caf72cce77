// What the blocks of a cluster share.
#pragma once

#include "runtime/threads/block.h"

namespace m3i::emulator {

// Where the block of a rank has what the running thread's has at an address.
uintptr_t map_to_rank(uintptr_t address, uint32_t rank, Site site);

// Fails unless the block, another one than the running thread's, whose shared memory this is, is
// known to have begun and has not returned.
void check_reachable(const Region& region, uintptr_t address, Site site);

// The running thread is about to access such memory, or to arrive at an mbarrier there: checked,
// and the owner has to hear of it before it returns.
void visit(const Region& region, uintptr_t address, Site site);

// A thread of the cluster returns: its barrier does not wait for it any more.
void leave_cluster(Thread& thread);

// Fails if a thread of another block may still use the shared memory of a block whose last thread
// returns.
void check_visitors_are_done(const Block& block);

}  // namespace m3i::emulator
