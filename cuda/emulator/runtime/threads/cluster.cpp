#include "runtime/threads/cluster.h"

#include "emulator/instructions/cluster.h"
#include "runtime/launch/device.h"
#include "runtime/launch/report.h"
#include "runtime/memory/race.h"
#include "runtime/threads/scheduler.h"

#include <string>

namespace m3i::emulator {

namespace {

std::string name_of(const Block& block) { return "block " + to_string(block.index); }

ClusterBarrier& own_barrier() { return running_cluster->barrier_of(*running_block); }

void pass_if_all_arrived(ClusterBarrier& barrier) {
  if (barrier.arrived < barrier.alive || barrier.arrived == 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
  barrier.completed = barrier.arrivals;
  for (const uint32_t id : barrier.waiting) {
    Thread& thread = running_cluster->thread(id);
    thread.block->make_ready(thread);
  }
  barrier.waiting.clear();
}

// Arrived in the phase that is not complete yet.
bool is_counted(const ClusterBarrier& barrier, const Thread& thread) {
  return thread.arrived_at_cluster && thread.cluster_phase == barrier.phase;
}

}  // namespace

uintptr_t map_to_rank(uintptr_t address, uint32_t rank, Site site) {
  const Region* region = region_at(address);
  if (!region || region->kind != Region::Kind::kDynamicShared ||
      region->block != running_block->rank) {
    fail((hex(address) + " is not in the block's dynamic shared memory, and so in no other's")
             .c_str(),
         site);
  }
  if (rank >= cluster_size()) {
    fail(("rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_size()))
             .c_str(),
         site);
  }
  return dynamic_shared_begin(running_block->rank - cluster_rank() + rank) +
         (address - region->begin);
}

void check_reachable(const Region& region, uintptr_t address, Site site) {
  const Block& owner = running_cluster->blocks[region.block];
  const std::string what = "access of shared memory of " + name_of(owner) + ", byte " +
                           std::to_string(address - region.begin) + ", ";
  if (owner.alive == 0) fail((what + "which has returned").c_str(), site);
  if (!heard_of_block(*running, owner)) {
    fail((what + "which may not have begun: no cluster barrier was waited for").c_str(), site);
  }
}

void visit(const Region& region, uintptr_t address, Site site) {
  check_reachable(region, address, site);
  running_cluster->blocks[region.block].visitors[running->id] = running->clock;
}

void leave_cluster(Thread& thread) {
  ClusterBarrier& barrier = own_barrier();
  if (is_counted(barrier, thread)) --barrier.arrived;
  --barrier.alive;
  --running_cluster->alive;
  pass_if_all_arrived(barrier);
}

void check_visitors_are_done(const Block& block) {
  for (const auto& [id, clock] : block.visitors) {
    if (block_heard_of(block, id, clock)) continue;
    const Thread& visitor = running_cluster->thread(id);
    fail((name_of(block) + " returns, while thread " + to_string(visitor.index) + " of " +
          name_of(*visitor.block) + " may still use its shared memory: no barrier lies between")
             .c_str(),
         running->site);
  }
}

uint32_t cluster_rank() { return running_block->rank % running_cluster->size; }
uint32_t cluster_size() { return running_cluster->size; }

void cluster_arrive() {
  const Site site = at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  require_architecture(90, "cluster_arrive", site);
  Thread& thread = *running;
  ClusterBarrier& barrier = own_barrier();
  if (thread.arrived_at_cluster) fail("cluster_arrive without a cluster_wait since the last", site);
  thread.arrived_at_cluster = true;
  thread.cluster_phase = barrier.phase;
  thread.site = site;
  release(thread, barrier.arrivals);
  ++barrier.arrived;
  pass_if_all_arrived(barrier);
}

void cluster_wait() {
  const Site site = at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  Thread& thread = *running;
  ClusterBarrier& barrier = own_barrier();
  if (!thread.arrived_at_cluster) fail("cluster_wait without a cluster_arrive before", site);
  if (is_counted(barrier, thread)) {
    barrier.waiting.push_back(thread.id);
    wait(Thread::State::kAtCluster, site);
  }
  thread.arrived_at_cluster = false;
  acquire(thread, barrier.completed);
}

void* map_shared_rank(const void* pointer, uint32_t rank) {
  const Site site = at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  return reinterpret_cast<void*>(map_to_rank(reinterpret_cast<uintptr_t>(pointer), rank, site));
}

}  // namespace m3i::emulator
