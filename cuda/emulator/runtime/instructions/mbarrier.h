// Barriers in shared memory, for asynchronous copies that complete on them.
#pragma once

#include "runtime/memory/memory.h"
#include "runtime/threads/block.h"

#include <string>

namespace m3i::emulator {

// The mbarrier that a copy of the running thread is to land through; fails unless it was made, and
// made known to copies by mbarrier_init_fence.
Mbarrier& mbarrier_for_copy(uintptr_t address, Site site);

// Bytes that land through an mbarrier may be read by threads that have waited for its current
// phase. Once all bytes of a copy have landed, complete_bytes counts them for the phase. Any thread
// may be running, or none.
void mark_landed(const Mbarrier& barrier, Region& region, uintptr_t address, size_t size);
void complete_bytes(Mbarrier& barrier, size_t bytes);

// Describes an mbarrier for reports: its address and state.
std::string describe_mbarrier(uintptr_t address);
std::string describe_mbarriers(const Cluster& cluster);

}  // namespace m3i::emulator
