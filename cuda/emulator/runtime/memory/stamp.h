// The bits of a stamp, which records the thread and time of an access to a byte.
#pragma once

#include "runtime/memory/memory.h"

namespace m3i::emulator {

// From its low bits: clock, thread, flag, epoch. 0: never accessed. Ranks from the number of
// threads on are those of the asynchronous proxy's agents.
inline constexpr unsigned kClockBits = 20, kThreadBits = 14;
inline constexpr Stamp kFlag = Stamp{1} << (kClockBits + kThreadBits);
inline constexpr unsigned kEpochShift = kClockBits + kThreadBits + 1;

constexpr Stamp make_stamp(uint64_t epoch, uint32_t rank, uint32_t clock) {
  return epoch << kEpochShift | Stamp{rank} << kClockBits | clock;
}

constexpr uint32_t clock_of(Stamp stamp) {
  return static_cast<uint32_t>(stamp & ((1u << kClockBits) - 1));
}
constexpr uint32_t thread_of(Stamp stamp) {
  return (stamp >> kClockBits) & ((1u << kThreadBits) - 1);
}
constexpr uint64_t epoch_of(Stamp stamp) { return stamp >> kEpochShift; }

// Clocks start at 1: 0 marks bytes to which a copy is in flight.
inline constexpr Stamp kClockMask = (Stamp{1} << kClockBits) - 1;
// In the place of a thread it marks the bytes of an mbarrier.
inline constexpr uint32_t kOfMbarrier = (1u << kThreadBits) - 1;
constexpr bool in_flight(Stamp stamp) { return stamp != 0 && clock_of(stamp) == 0; }

}  // namespace m3i::emulator
