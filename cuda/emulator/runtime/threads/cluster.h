// Accesses between the blocks of a cluster.
#pragma once

#include "runtime/threads/block.h"

namespace m3i::emulator {

// The address in the block of a rank that corresponds to one in the running thread's block.
uintptr_t map_to_rank(uintptr_t address, uint32_t rank, Site site);

// Fails unless the owner of this shared memory, another block than the running thread's, is known
// to have begun and has not returned.
void check_reachable(const Region& region, uintptr_t address, Site site);

// Checks an access of the running thread to such memory, or an arrival at an mbarrier there, which
// the owner has to synchronise with before it returns.
void visit(const Region& region, uintptr_t address, Site site);

// Removes a returning thread from those that the cluster's barrier waits for.
void leave_cluster(Thread& thread);

// Fails if a thread of another block may still use the shared memory of a block whose last thread
// returns.
void check_visitors_are_done(const Block& block);

}  // namespace m3i::emulator
