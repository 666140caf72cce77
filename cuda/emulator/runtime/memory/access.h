// Checks of single accesses: inside an allocation, aligned, ordered.
#pragma once

#include "runtime/memory/memory.h"

namespace m3i::emulator {

// Checks an access of the running thread; host code is not checked. `instruction` is its place in
// the report.
void check_at(uintptr_t address, size_t size, Access access, uintptr_t instruction);
// As above, and fails unless the address is a multiple of the size.
void check_aligned(uintptr_t address, size_t size, Access access, uintptr_t instruction);

// The region of an address that has to be in shared memory.
Region& shared_region(uintptr_t address, uintptr_t instruction);

}  // namespace m3i::emulator
