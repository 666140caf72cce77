// A warpgroup, four warps that multiply matrices together, and its operations in flight.
#pragma once

#include "emulator/runtime.h"

#include <array>
#include <bitset>
#include <deque>
#include <vector>

namespace m3i::emulator {

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kWarpgroupSize = 128;

// An operation of the asynchronous proxy with the shared memory that it reads. The threads in
// [first, last) issued it, whole warps or a single thread.
struct AsyncRead {
  uint32_t first, last;
  uint64_t stamp;  // of its reads
  Site site;
  std::vector<uint32_t> chunks;  // of 16 bytes of dynamic shared memory
  // Stamps of writes that are known to come before, each in the place of its thread
  std::array<uint64_t, kWarpgroupSize> checked{};
};

// An accumulator D of wgmma in flight: the registers hold a mark until each thread has waited.
struct Accumulator {
  uint32_t columns;
  uint64_t end;                           // products issued up to the last one that adds to it
  std::vector<float> values;              // [64, columns]
  std::vector<float*> registers;          // of each thread
  std::bitset<kWarpgroupSize> in_flight;  // threads that have not waited
};

struct Warpgroup {
  std::vector<void*> payloads;  // of the threads that have come to a product
  uint32_t arrived = 0;
  std::deque<AsyncRead> reads;  // of the products that are not known to be complete
  std::vector<Accumulator> accumulators;
  uint64_t issued = 0;  // products; each is the next tick of the agent's clock
  uint32_t agent = 0;
};

}  // namespace m3i::emulator
