// Barriers in shared memory, as copies use them that land by themselves.
#pragma once

#include "runtime/memory/memory.h"
#include "runtime/threads/block.h"

#include <string>

namespace m3i::emulator {

// The mbarrier that a copy of the running thread is to land through; fails unless it was made, and
// made known to copies by mbarrier_init_fence.
Mbarrier& mbarrier_for_copy(uintptr_t address, Site site);

// Bytes that land through an mbarrier: who has waited for its present phase may read them. Once all
// bytes of a copy are there, complete_bytes lets the phase know. Any thread may run, or none.
void mark_landed(const Mbarrier& barrier, Region& region, uintptr_t address, size_t size);
void complete_bytes(Mbarrier& barrier, size_t bytes);

// For reports: where an mbarrier is, and how far.
std::string describe_mbarrier(uintptr_t address);
std::string describe_mbarriers(const Cluster& cluster);

}  // namespace m3i::emulator
