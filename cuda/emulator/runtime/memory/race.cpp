#include "runtime/memory/race.h"

#include "runtime/instructions/async.h"
#include "runtime/launch/report.h"
#include "runtime/memory/stamp.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <string>

namespace m3i::emulator {

namespace {

uint64_t epoch = 1;
uint64_t launch_epoch = 1;   // the first one of the launch
uint64_t cluster_epoch = 1;  // the first one of the cluster

// known[t * width + u]: the clock of thread u up to which everything is ordered before what thread
// t does now. A row counts in the epoch in which it was last written only. After the threads'
// columns come those of the agents.
std::vector<uint32_t> known;
std::vector<uint64_t> known_epoch;
size_t width = 0;
uint32_t num_threads = 0;  // of the cluster

// Of each agent: the phase that a thread has heard of, and that one had when the epoch began.
struct Agent {
  uint32_t heard = 0, settled = 0;
};
std::vector<Agent> agents;

uint32_t* row_of(uint32_t id) {
  uint32_t* row = known.data() + id * width;
  if (known_epoch[id] != epoch) {
    known_epoch[id] = epoch;
    std::fill(row, row + width, 0);
  }
  return row;
}

Stamp stamp_of(const Thread& thread) { return make_stamp(epoch, thread.id, thread.clock); }

bool heard_of(uint32_t id, uint32_t other, uint32_t clock) {
  return known_epoch[id] == epoch && known[id * width + other] >= clock;
}

bool by_agent(Stamp stamp) { return thread_of(stamp) >= num_threads; }

bool is_ordered(Stamp stamp, uint32_t id) {
  const uint64_t then = epoch_of(stamp);
  if (then < launch_epoch) return true;
  if (then < cluster_epoch) return running_block->fenced || running_block->acquired;
  const uint32_t other = thread_of(stamp);
  if (by_agent(stamp)) {
    return clock_of(stamp) <= agents[other - num_threads].settled ||
           heard_of(id, other, clock_of(stamp));
  }
  return then < epoch || other == id || heard_of(id, other, clock_of(stamp));
}

// As above for the flagged stamp of the last of several readers. Of the others nothing is known,
// but that nobody heard of them if nobody heard of anybody.
bool readers_ordered(Stamp stamp) {
  if (epoch_of(stamp) == epoch && (stamp & kFlag) && known_epoch[running->id] != epoch) {
    return false;
  }
  return is_ordered(stamp, running->id);
}

struct Accessed {
  const Region& region;
  uintptr_t address;
  size_t size;
  Access access;
  uintptr_t instruction;
};

[[noreturn]] void fail_race(const Accessed& a, const char* earlier, Stamp stamp) {
  fail_with(cudaErrorLaunchFailure,
            std::string("data race: ") + name_of(a.access) + " of " +
                describe_memory(a.region, a.address, a.size) + ", which " + who(stamp) + " " +
                earlier + " without a barrier between the two",
            at(a.instruction));
}

[[noreturn]] void fail_unwritten(const Accessed& a) {
  fail_with(cudaErrorLaunchFailure,
            std::string("read before written: ") + name_of(a.access) + " of " +
                describe_memory(a.region, a.address, a.size) + ", which nobody has written",
            at(a.instruction));
}

[[noreturn]] void fail_in_flight(const Accessed& a, Stamp write) {
  if (thread_of(write) == kOfMbarrier) {
    fail_with(cudaErrorLaunchFailure,
              std::string(name_of(a.access)) + " of " +
                  describe_memory(a.region, a.address, a.size) + ", which holds an mbarrier",
              at(a.instruction));
  }
  fail_with(cudaErrorLaunchFailure,
            std::string(name_of(a.access)) + " of " + describe_memory(a.region, a.address, a.size) +
                ", to which a copy of " + who(write) + " is under way: it was not waited for",
            at(a.instruction));
}

// Blocks of one cluster may order what they do to global memory by fences and atomic operations, as
// all blocks of a launch may: that is not known here.
bool fenced_between(const Region& region, Stamp stamp) {
  return !region.shared() && running_block->fenced && epoch_of(stamp) >= cluster_epoch &&
         !by_agent(stamp) && running_cluster->thread(thread_of(stamp)).block != running_block;
}

// Fails unless an access to the byte with these stamps may follow.
void check_byte(const Accessed& a, Stamp write, Stamp read) {
  if (a.region.shared()) {  // what earlier blocks did to it is gone
    write = of_this_cluster(write);
    read = of_this_cluster(read);
    if (reads(a.access) && write == 0) fail_unwritten(a);
    if (in_flight(write)) fail_in_flight(a, write);
  }
  const bool both_atomic = atomic(a.access) && (write & kFlag);
  if (!both_atomic && !is_ordered(write, running->id) && !fenced_between(a.region, write)) {
    fail_race(a, "wrote", write);
  }
  if (writes(a.access) && !readers_ordered(read) && !fenced_between(a.region, read)) {
    fail_race(a, "read", read);
  }
}

void check_not_being_read(const Accessed& a) {
  if (a.region.kind != Region::Kind::kDynamicShared) return;
  if (!is_being_read(a.region, a.address, a.size)) return;
  fail_with(cudaErrorLaunchFailure,
            std::string(name_of(a.access)) + " of " + describe_memory(a.region, a.address, a.size) +
                ", which an asynchronous operation is reading: it was not waited for",
            at(a.instruction));
}

// The stamp of a byte's readers once the owner of `own` is one of them.
Stamp add_reader(Stamp before, Stamp own) {
  if (epoch_of(before) != epoch) return own;
  const bool several = (before & kFlag) || thread_of(before) != thread_of(own);
  return several ? own | kFlag : own;
}

bool all_equal(const Stamp* stamps, size_t count) {
  Stamp difference = 0;
  for (size_t i = 1; i < count; ++i) difference |= stamps[i] ^ stamps[0];
  return difference == 0;
}

// kSize is the size, so that the compiler unrolls the loops; 0 where it is none of the usual ones.
template <size_t kSize>
void check_bytes(const Accessed& a) {
  const size_t size = kSize ? kSize : a.size;
  const size_t offset = a.address - a.region.begin;
  Stamp* written = a.region.shadow.writes + offset;
  Stamp* read = a.region.shadow.reads + offset;
  const Stamp own = stamp_of(*running);
  if (writes(a.access)) check_not_being_read(a);
  const bool uniform = all_equal(written, size) && all_equal(read, size);
  for (size_t i = 0; i < (uniform ? 1 : size); ++i) check_byte(a, written[i], read[i]);
  if (writes(a.access)) {
    std::fill(written, written + size, atomic(a.access) ? own | kFlag : own);
  } else if (atomic(a.access)) {
    return;
  } else if (uniform) {
    std::fill(read, read + size, add_reader(read[0], own));
  } else {
    for (size_t i = 0; i < size; ++i) read[i] = add_reader(read[i], own);
  }
}

// ---- Clocks -------------------------------------------------------------------------------------

// The last epoch in which a thread heard of another warp otherwise than by __syncthreads. Before
// that, a row has nothing but the own warp in it, and __syncwarp need not join the rest.
uint64_t across_warps_epoch = 0;

struct Columns {
  size_t begin, end;
};

Columns columns(const Thread& thread, const SyncClock& clock) {
  const size_t end = std::min(width, clock.row.size());
  if (!clock.within_warp || across_warps_epoch == epoch) return {0, end};
  const size_t begin = thread.id - thread.lane;
  return {begin, std::min(end, begin + kWarpSize)};
}

void join(uint32_t* into, const uint32_t* from, Columns columns) {
  for (size_t i = columns.begin; i < columns.end; ++i) into[i] = std::max(into[i], from[i]);
}

void begin_epoch() {
  ++epoch;
  for (Agent& agent : agents) agent.settled = agent.heard;
}

void begin(uint64_t& first_of) {
  begin_epoch();
  first_of = epoch;
}

}  // namespace

const char* name_of(Access access) {
  constexpr const char* names[] = {"read", "write", "atomic read", "atomic write",
                                   "atomic operation"};
  return names[static_cast<int>(access)];
}

void begin_launch_epoch() { begin(launch_epoch); }

void begin_cluster_epoch() {
  begin(cluster_epoch);
  agents.clear();
  num_threads = running_cluster->num_threads();
  const size_t count = num_threads;
  if (known_epoch.size() != count || width != count) {
    width = count;
    known_epoch.assign(count, 0);
    known.assign(count * count, 0);
  }
}

void order_threads(Block& block) {
  if (running_cluster->blocks.size() == 1) {
    begin_epoch();
    for (Thread& thread : block.threads) thread.clock = 1;
    return;
  }
  SyncClock clock;
  for (Thread& thread : block.threads) release(thread, clock);
  for (const Thread& thread : block.threads) acquire(thread, clock);
}

void release(Thread& thread, SyncClock& clock) {
  if ((thread.clock + 1) >> kClockBits) {
    fail_thread(thread, "more than a million synchronisations without __syncthreads", thread.site);
  }
  if (!clock.within_warp) across_warps_epoch = epoch;
  uint32_t* row = row_of(thread.id);
  row[thread.id] = thread.clock++;
  if (clock.epoch != epoch) {
    clock.epoch = epoch;
    clock.row.assign(width, 0);
  }
  if (clock.row.size() < width) clock.row.resize(width);
  join(clock.row.data(), row, columns(thread, clock));
}

void acquire(const Thread& thread, const SyncClock& clock) {
  if (clock.epoch != epoch) return;  // a barrier since then has ordered more
  join(row_of(thread.id), clock.row.data(), columns(thread, clock));
}

void check_race(Region& region, uintptr_t address, size_t size, Access access,
                uintptr_t instruction) {
  if (!region.shadow.writes) region.make_shadow();
  const Accessed accessed{region, address, size, access, instruction};
  switch (size) {
    case 1:
      return check_bytes<1>(accessed);
    case 2:
      return check_bytes<2>(accessed);
    case 4:
      return check_bytes<4>(accessed);
    case 8:
      return check_bytes<8>(accessed);
    case 16:
      return check_bytes<16>(accessed);
    default:
      return check_bytes<0>(accessed);
  }
}

Stamp own_stamp() { return stamp_of(*running); }

Stamp of_this_cluster(Stamp stamp) { return epoch_of(stamp) < cluster_epoch ? 0 : stamp; }

bool ordered(Stamp stamp) { return is_ordered(stamp, running->id); }
bool ordered(Stamp stamp, uint32_t id) { return is_ordered(stamp, id); }

bool heard_of_block(const Thread& thread, const Block& block) {
  for (const Thread& other : block.threads) {
    if (heard_of(thread.id, other.id, 1)) return true;
  }
  return false;
}

bool block_heard_of(const Block& block, uint32_t id, uint32_t clock) {
  for (const Thread& thread : block.threads) {
    if (heard_of(thread.id, id, clock)) return true;
  }
  return false;
}

std::string who(Stamp stamp) {
  if (epoch_of(stamp) < cluster_epoch) return "a thread of another block of this launch";
  if (by_agent(stamp)) return "an asynchronous operation";
  const Thread& thread = running_cluster->thread(thread_of(stamp));
  if (thread.id == running->id) return "other threads";
  const bool here = thread.block == running_block;
  return "thread " + to_string(thread.index) +
         (here ? "" : " of block " + to_string(thread.block->index));
}

// ---- Agents -------------------------------------------------------------------------------------

uint32_t add_agent() {
  const size_t count = num_threads;
  agents.emplace_back();
  if (const size_t needed = count + agents.size(); needed > width) {
    const size_t wider = needed + 15;
    std::vector<uint32_t> rows(count * wider, 0);
    for (size_t rank = 0; rank < count; ++rank) {
      std::copy_n(known.data() + rank * width, width, rows.data() + rank * wider);
    }
    known.swap(rows);
    width = wider;
  }
  return static_cast<uint32_t>(count + agents.size() - 1);
}

void mark_written_by_agent(Region& region, uintptr_t address, size_t size, uint32_t agent,
                           uint32_t phase) {
  Stamp* written = region.shadow.writes + (address - region.begin);
  std::fill(written, written + size, agent_stamp(agent, phase));
}

Stamp agent_stamp(uint32_t agent, uint64_t phase) {
  return make_stamp(epoch, agent, static_cast<uint32_t>(phase & kClockMask));
}

void note_read(Region& region, uintptr_t address, size_t size, Stamp stamp) {
  Stamp* read = region.shadow.reads + (address - region.begin);
  for (size_t i = 0; i < size; ++i) read[i] = add_reader(read[i], stamp);
}

void note_proxy_fence(Thread& thread) {
  thread.proxy_fences.push_back(stamp_of(thread));
  ++thread.clock;
}

void note_global_proxy_fence(Thread& thread) {
  const uint32_t* row = row_of(thread.id);
  thread.known_at_fence.assign(row, row + width);
  thread.global_proxy_fences.push_back(stamp_of(thread));
  ++thread.clock;
}

bool known_at_global_fence(const Thread& thread, Stamp stamp) {
  const uint32_t other = thread_of(stamp);
  if (other == thread.id || epoch_of(stamp) < epoch) return true;
  return other < thread.known_at_fence.size() && thread.known_at_fence[other] >= clock_of(stamp);
}

void hear_of_agent(const Thread& thread, uint32_t agent, uint32_t phase) {
  uint32_t& clock = row_of(thread.id)[agent];
  clock = std::max(clock, phase);
  uint32_t& heard = agents[agent - num_threads].heard;
  heard = std::max(heard, phase);
  across_warps_epoch = epoch;
}

void mark_mbarrier(Region& region, uintptr_t address) {
  Stamp* written = region.shadow.writes + (address - region.begin);
  std::fill(written, written + sizeof(uint64_t), make_stamp(epoch, kOfMbarrier, 0));
}

void mark_in_flight(Region& region, uintptr_t address, size_t size) {
  Stamp* written = region.shadow.writes + (address - region.begin);
  std::fill(written, written + size, stamp_of(*running) & ~kClockMask);
}

void mark_written(Region& region, uintptr_t address, size_t size) {
  Stamp* written = region.shadow.writes + (address - region.begin);
  std::fill(written, written + size, stamp_of(*running));
}

}  // namespace m3i::emulator
