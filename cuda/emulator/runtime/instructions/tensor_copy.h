// Tensor copies that a thread has started.
#pragma once

#include "emulator/instructions/tma.h"
#include "runtime/threads/warpgroup.h"

#include <vector>

namespace m3i::emulator {

// The box of a copy, and where it is in the matrix.
struct Box {
  MappedMatrix matrix;
  int64_t row, column;
};

// A copy from shared to global memory, which is written once its thread waits.
struct BoxStore {
  Box box;
  bool add;
  AsyncRead read;
  bool is_read = false;              // shared memory may be written again
  std::vector<unsigned char> bytes;  // in rows, without a swizzle
};

// A copy in flight from global to shared memory.
struct BoxLoad {
  Box box;
  uintptr_t to, mbarrier;
};

}  // namespace m3i::emulator
