// Operations in which the lanes of a warp take part together.
#include "runtime/launch/report.h"
#include "runtime/memory/race.h"
#include "runtime/threads/scheduler.h"

#include <cstring>
#include <string>

namespace m3i::emulator {

namespace {

bool same_operation(const Thread& a, const Thread& b) {
  return a.mask == b.mask && std::strcmp(a.operation, b.operation) == 0;
}

std::string describe(const Thread& thread) {
  return std::string(thread.operation) + " with mask " + hex(thread.mask);
}

// The lanes that take part are those of the mask that have not returned: CUDA lets a mask name
// lanes that have.
uint32_t participants(const Warp& warp, const Thread& thread) { return thread.mask & warp.alive; }

// Whether all lanes have come that `thread`, who waits, waits for.
bool all_arrived(const Warp& warp, const Thread& thread) {
  return (participants(warp, thread) & ~warp.at_collective) == 0;
}

// A lane of the mask that waits elsewhere in the warp will never come.
void check_same_operation(Block& block, uint32_t lanes, const Thread& thread) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const Thread& lane = block.lane_of(thread, static_cast<uint32_t>(__builtin_ctz(rest)));
    if (same_operation(lane, thread)) continue;
    fail((describe(thread) + ", while thread " + to_string(lane.index) + " waits at " +
          describe(lane) + ", " + to_string(lane.site))
             .c_str(),
         thread.site);
  }
}

void complete_one(Block& block, Warp& warp, Thread& thread, Complete complete) {
  void* payloads[kWarpSize] = {};
  const uint32_t lanes = participants(warp, thread);
  check_same_operation(block, lanes, thread);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const auto lane = static_cast<uint32_t>(__builtin_ctz(rest));
    payloads[lane] = block.lane_of(thread, lane).payload;
  }
  complete(lanes, payloads, thread.site);
  warp.at_collective &= ~lanes;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    block.make_ready(block.lane_of(thread, static_cast<uint32_t>(__builtin_ctz(rest))));
  }
}

}  // namespace

void meet(uint32_t mask, const char* operation, Complete complete, void* payload, Site site) {
  Thread& thread = *running;
  Block& block = *running_block;
  Warp& warp = block.warp_of(thread);
  thread.mask = mask;
  thread.operation = operation;
  thread.complete = complete;
  thread.payload = payload;
  thread.site = site;
  if (!(mask >> thread.lane & 1u)) {
    fail(
        (describe(thread) + ", which does not name the calling lane " + std::to_string(thread.lane))
            .c_str(),
        site);
  }
  const uint32_t waiting = participants(warp, thread) & warp.at_collective;
  check_same_operation(block, waiting & -waiting, thread);
  warp.at_collective |= 1u << thread.lane;
  if (all_arrived(warp, thread)) {
    complete_one(block, warp, thread, complete);
  } else {
    wait(Thread::State::kAtCollective, site);
  }
}

void complete_collectives(Warp& warp, Thread& any_lane) {
  Block& block = *running_block;
  for (uint32_t rest = warp.at_collective; rest; rest &= rest - 1) {
    Thread& lane = block.lane_of(any_lane, static_cast<uint32_t>(__builtin_ctz(rest)));
    const bool waits = warp.at_collective >> lane.lane & 1u;  // not woken with a lane before it
    if (waits && all_arrived(warp, lane)) complete_one(block, warp, lane, lane.complete);
  }
}

// ---- The operations -----------------------------------------------------------------------------

namespace {

template <class Payload>
Payload& at(void* const* payloads, uint32_t lane) {
  return *static_cast<Payload*>(payloads[lane]);
}

template <class Body>
void for_each(uint32_t lanes, Body body) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    body(static_cast<uint32_t>(__builtin_ctz(rest)));
  }
}

struct Shuffled {
  uint64_t value;
  uint64_t result;
  uint32_t source;
};

// The lane that a lane reads, as the PTX of `shfl` defines it: its own where the segment ends.
uint32_t source_lane(Shuffle kind, uint32_t lane, int operand, int width) {
  const int own = static_cast<int>(lane);
  const int begin = own & ~(width - 1);
  const int last = begin + width - 1;
  int source = own;
  switch (kind) {
    case Shuffle::kIndex:
      source = begin | (operand & (width - 1));
      break;
    case Shuffle::kUp:
      source = own - operand < begin ? own : own - operand;
      break;
    case Shuffle::kDown:
      source = own + operand > last ? own : own + operand;
      break;
    case Shuffle::kXor:
      source = (own ^ operand) > last ? own : own ^ operand;
      break;
  }
  return static_cast<uint32_t>(source);
}

void complete_shuffle(uint32_t lanes, void* const* payloads, Site site) {
  for_each(lanes, [&](uint32_t lane) {
    auto& own = at<Shuffled>(payloads, lane);
    if (!(lanes >> own.source & 1u)) {
      fail_thread(
          running_block->lane_of(*running, lane),
          "a shuffle that reads lane " + std::to_string(own.source) + ", which takes no part in it",
          site);
    }
    own.result = at<Shuffled>(payloads, own.source).value;
  });
}

struct Voted {
  bool predicate;
  uint32_t result;
};

void complete_ballot(uint32_t lanes, void* const* payloads, Site) {
  uint32_t result = 0;
  for_each(lanes, [&](uint32_t lane) {
    result |= static_cast<uint32_t>(at<Voted>(payloads, lane).predicate) << lane;
  });
  for_each(lanes, [&](uint32_t lane) { at<Voted>(payloads, lane).result = result; });
}

struct Matched {
  uint64_t value;
  uint32_t result;
};

void complete_match(uint32_t lanes, void* const* payloads, Site) {
  for_each(lanes, [&](uint32_t lane) {
    auto& own = at<Matched>(payloads, lane);
    own.result = 0;
    for_each(lanes, [&](uint32_t other) {
      own.result |= static_cast<uint32_t>(at<Matched>(payloads, other).value == own.value) << other;
    });
  });
}

struct Reduced {
  Reduction kind;
  uint32_t value;
};

uint32_t combine(Reduction kind, uint32_t a, uint32_t b) {
  const auto signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (kind) {
    case Reduction::kAdd:
      return a + b;
    case Reduction::kMin:
      return a < b ? a : b;
    case Reduction::kMax:
      return a > b ? a : b;
    case Reduction::kSignedMin:
      return signed_a < signed_b ? a : b;
    case Reduction::kSignedMax:
      return signed_a > signed_b ? a : b;
    case Reduction::kAnd:
      return a & b;
    case Reduction::kOr:
      return a | b;
    case Reduction::kXor:
      return a ^ b;
  }
  return 0;
}

void complete_reduction(uint32_t lanes, void* const* payloads, Site) {
  const auto first = static_cast<uint32_t>(__builtin_ctz(lanes));
  uint32_t total = at<Reduced>(payloads, first).value;
  for_each(lanes & (lanes - 1), [&](uint32_t lane) {
    const auto& own = at<Reduced>(payloads, lane);
    total = combine(own.kind, total, own.value);
  });
  for_each(lanes, [&](uint32_t lane) { at<Reduced>(payloads, lane).value = total; });
}

void complete_barrier(uint32_t lanes, void* const*, Site) {
  static SyncClock clock{true, 0, {}};
  clock.epoch = 0;
  const auto thread = [](uint32_t lane) -> Thread& {
    return running_block->lane_of(*running, lane);
  };
  for_each(lanes, [&](uint32_t lane) { release(thread(lane), clock); });
  for_each(lanes, [&](uint32_t lane) { acquire(thread(lane), clock); });
}

const char* name_of(Shuffle kind) {
  constexpr const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                   "__shfl_xor_sync"};
  return names[static_cast<int>(kind)];
}

const char* name_of(Reduction kind) {
  constexpr const char* names[] = {"__reduce_add_sync",          "__reduce_min_sync",
                                   "__reduce_max_sync",          "__reduce_min_sync (signed)",
                                   "__reduce_max_sync (signed)", "__reduce_and_sync",
                                   "__reduce_or_sync",           "__reduce_xor_sync"};
  return names[static_cast<int>(kind)];
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width, Site site) {
  if (width < 1 || width > static_cast<int>(kWarpSize) || (width & (width - 1)) != 0) {
    fail(("a shuffle of width " + std::to_string(width) + ": expected a power of two up to 32")
             .c_str(),
         site);
  }
  Shuffled own{value, 0, source_lane(kind, running->lane, operand, width)};
  meet(mask, name_of(kind), complete_shuffle, &own, site);
  return own.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  Voted own{predicate, 0};
  meet(mask, "a vote", complete_ballot, &own, site);
  return own.result;
}

uint32_t match_any(uint32_t mask, uint64_t value, Site site) {
  Matched own{value, 0};
  meet(mask, "a match", complete_match, &own, site);
  return own.result;
}

uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, Site site) {
  Reduced own{kind, value};
  meet(mask, name_of(kind), complete_reduction, &own, site);
  return own.value;
}

void warp_barrier(uint32_t mask, Site site) {
  meet(mask, "__syncwarp", complete_barrier, nullptr, site);
}

uint32_t lane_bit() { return 1u << running->lane; }

}  // namespace m3i::emulator
