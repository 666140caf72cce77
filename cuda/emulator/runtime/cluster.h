// What the blocks of a cluster share.
#pragma once

#include "block.h"

namespace m3i::emulator {

// The running thread is about to access shared memory of another block of its cluster, or to arrive
// at an mbarrier there. Fails unless that block is known to have begun and has not returned.
void visit(const Region& region, uintptr_t address, Site site);

// A thread of the cluster returns: its barrier does not wait for it any more.
void leave_cluster(Thread& thread);

// Fails if a thread of another block may still use the shared memory of a block whose last thread
// returns.
void check_visitors_are_done(const Block& block);

}  // namespace m3i::emulator
