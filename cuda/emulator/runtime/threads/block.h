// The state of a running block and its threads.
#pragma once

#include "emulator/numbers/vector_types.h"
#include "emulator/runtime.h"
#include "runtime/instructions/tensor_copy.h"
#include "runtime/memory/memory.h"
#include "runtime/threads/fiber.h"
#include "runtime/threads/warpgroup.h"

#include <map>
#include <vector>

namespace m3i::emulator {

inline constexpr unsigned kNamedBarriers = 16;

// A cp.async in flight.
struct AsyncCopy {
  uintptr_t to, from;
  size_t bytes;
  bool inside;  // else zeros
};

struct Block;

struct Thread {
  uint3 index;
  Block* block;
  uint32_t rank;  // in the block
  uint32_t id;    // in the cluster
  uint32_t warp;
  uint32_t lane;
  void* saved = nullptr;  // where its fiber is; null before it began
  Stack stack;

  enum class State {
    kReady,
    kAtCollective,
    kAtWarpgroup,
    kAtBarrier,
    kAtNamedBarrier,
    kAtMbarrier,
    kAtCluster,
    kAtRegisters,
    kYielded,
    kDone
  };
  State state = State::kReady;
  Site site{};  // of what it waits for
  // Of the collective that it waits at
  uint32_t mask = 0;
  const char* operation = nullptr;
  Complete complete = nullptr;
  void* payload = nullptr;
  // Of the mbarrier that it waits at
  uintptr_t mbarrier = 0;
  uint32_t parity = 0;
  // It has come to the cluster's barrier, in this phase, and not waited yet
  bool arrived_at_cluster = false;
  uint32_t cluster_phase = 0;
  // Its copies that have not landed; of each group, how many of them end before it
  std::vector<AsyncCopy> copies;
  std::vector<size_t> copy_groups;
  // Its stores of boxes that have not been written, and how many end before each group
  std::vector<BoxStore> box_stores;
  std::vector<size_t> box_groups;
  // Of its warpgroup's products, how many end before each group that it has not waited for, and
  // before the last one; whether it has called wgmma_fence since it last waited
  std::vector<uint64_t> product_groups;
  uint64_t products_committed = 0;
  bool products_fenced = false;
  // Of the race check: counts the thread's synchronisations since the block's last barrier
  uint32_t clock = 1;
  std::vector<uint64_t> proxy_fences;         // stamps of its calls of fence_proxy_async
  std::vector<uint64_t> global_proxy_fences;  // and of fence_proxy_async_global
  std::vector<uint32_t> known_at_fence;       // clocks that it knew at the last of those
};

struct Warp {
  uint32_t ready = 0;          // lanes that can go on
  uint32_t alive = 0;          // lanes that have not returned
  uint32_t at_collective = 0;  // lanes that wait for others of the warp
  uint32_t yielded = 0;        // lanes that go on once the others had their turn
  // Registers of each of its threads, as setmaxnreg changes them
  uint32_t registers = 0;
  uint32_t wanted_registers = 0;
  std::vector<uint32_t> register_changes;
};

// The vector clocks of the threads that arrived at a barrier, see race.h.
struct SyncClock {
  bool within_warp = false;  // all of them are of one warp
  uint64_t epoch = 0;
  std::vector<uint32_t> row;
};

struct NamedBarrier {
  int expected = 0;  // threads; 0 while nobody has come
  int arrived = 0;
  SyncClock clock;
  std::vector<uint32_t> waiting;  // ranks
};

// An object that mbarrier_init has made in shared memory.
struct Mbarrier {
  Stamp made = 0;       // who made it, and when
  uint32_t maker = 0;   // the thread's id
  bool fenced = false;  // its maker has called mbarrier_init_fence
  uint32_t count = 0;   // arrivals of a phase
  uint32_t pending = 0;
  int64_t bytes = 0;   // expected ones that have not landed; negative where they landed before
  uint32_t phase = 0;  // complete phases
  // What those knew who arrived, and who had when the last phase completed
  SyncClock arrived, completed;
  uint32_t agent = 0;             // of the copies that land through it; 0 while there was none
  std::vector<uint32_t> waiting;  // ids
};

struct Block {
  uint3 index{};
  uint32_t rank = 0;  // among the blocks that run at once
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t alive = 0;

  uint32_t at_barrier = 0;  // threads that wait at __syncthreads
  Site barrier_site{};      // of the one who came last
  int votes = 0;            // threads at the barrier whose predicate holds
  int vote_total = 0;       // of the barrier that was passed last
  NamedBarrier named[kNamedBarriers];

  uint32_t launch_registers =
      0;                        // of a thread; 0 where the kernel's launch bound does not fix them
  uint32_t free_registers = 0;  // of a lane: a warp takes 32 times as many
  bool fenced = false;          // a thread of it has called a memory fence
  bool acquired = false;        // or read a counter that others add to
  // Of other blocks' threads that used its shared memory: the clock when they did it last
  std::map<uint32_t, uint32_t> visitors;

  std::vector<Warpgroup> warpgroups;  // once one of them multiplies
  // Of each 16 bytes of dynamic shared memory, by how many asynchronous operations they are being
  // read; empty before the first one
  std::vector<uint16_t> being_read;
  std::vector<BoxLoad> box_loads;  // that land once nobody can go on

  Warp& warp_of(const Thread& thread) { return warps[thread.warp]; }
  Thread& lane_of(const Thread& thread, uint32_t lane) {
    return threads[thread.warp * kWarpSize + lane];
  }
  void make_ready(Thread& thread) {
    thread.state = Thread::State::kReady;
    warps[thread.warp].ready |= 1u << thread.lane;
  }
};

// The barrier of a cluster: threads that have not returned, and of them those that have arrived.
struct ClusterBarrier {
  uint32_t alive = 0;
  uint32_t arrived = 0;
  uint32_t phase = 0;
  SyncClock arrivals, completed;
  std::vector<uint32_t> waiting;  // ids
};

// The blocks that run at the same time: a cluster, of a single block by default, or several
// clusters that take turns.
struct Cluster {
  std::vector<Block> blocks;
  uint32_t size = 1;                        // blocks of one cluster
  std::vector<ClusterBarrier> barriers;     // of each cluster
  std::map<uintptr_t, Mbarrier> mbarriers;  // by their address
  std::map<uintptr_t, SyncClock> counters;  // in global memory: what those knew who added to them
  uint32_t alive = 0;                       // threads that have not returned

  ClusterBarrier& barrier_of(const Block& block) { return barriers[block.rank / size]; }
  uint32_t threads_of_block() const { return static_cast<uint32_t>(blocks[0].threads.size()); }
  uint32_t num_threads() const { return threads_of_block() * static_cast<uint32_t>(blocks.size()); }
  Thread& thread(uint32_t id) {
    return blocks[id / threads_of_block()].threads[id % threads_of_block()];
  }
};

}  // namespace m3i::emulator
