// What the warps of a kernel ask of memory, counted by instruction: requests, the sectors of 32
// bytes that a request touches in global memory, and the wavefronts that it takes in shared memory.
//
// A request is what the lanes of a warp do at one instruction, each for the n-th time: lanes that
// have gone apart and come together again are so counted as one request, as a GPU's warp that
// reconverges. Wavefronts follow from the 32 banks of 4 bytes: of an access of 8 or 16 bytes a half
// or a quarter of the warp has its turn at once, words that several lanes read are read once, and
// atomic operations on one word follow each other.
#pragma once

#include "runtime/memory/memory.h"

namespace m3i::emulator {

// Counts an access of the running thread, if requests are counted.
void count_access(const Region& region, uintptr_t address, size_t size, Access access,
                  uintptr_t instruction);
// Counts an arrival at a barrier of the block.
void count_barrier(Site site);

// Counts the requests of the cluster that has ended, of which not all lanes have come.
void finish_requests();
// Writes what was counted in a launch, and forgets it.
void log_requests(const void* kernel);

// From now on the counts of each launch are a line of JSON at the end of this file: `kernel`, and
// of each instruction and size a row of `places` with `module` and `offset`, or `file` and `line`;
// `memory` (global, shared, barrier), `access` (read, write, atomic), `bytes` (of a lane),
// `requests`, `lanes` and `units` (sectors or wavefronts; of a barrier its arrivals). Null: none
// is.
extern "C" M3I_EMULATOR_API void m3i_emulator_count_requests(const char* file);

}  // namespace m3i::emulator
