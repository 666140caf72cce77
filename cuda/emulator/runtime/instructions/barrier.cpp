// Barriers of a block: __syncthreads and its voting forms, and the sixteen named ones.
#include "runtime/launch/report.h"
#include "runtime/memory/race.h"
#include "runtime/memory/requests.h"
#include "runtime/threads/scheduler.h"

#include <string>

namespace m3i::emulator {

namespace {

// CUDA allows __syncthreads only where all threads of the block come to the same one.
void check_same_barrier(Site site) {
  for (const Thread& other : running_block->threads) {
    if (other.state == Thread::State::kDone) {
      fail(("__syncthreads, which thread " + to_string(other.index) + " returned without reaching")
               .c_str(),
           site);
    }
    if (other.state == Thread::State::kAtBarrier && !same(other.site, site)) {
      fail(("__syncthreads, while thread " + to_string(other.index) + " waits at another one, " +
            to_string(other.site))
               .c_str(),
           site);
    }
  }
}

void pass_block_barrier(Block& block) {
  block.vote_total = block.votes;
  block.votes = 0;
  block.at_barrier = 0;
  order_threads(block);
  for (Thread& thread : block.threads) {
    if (thread.state == Thread::State::kAtBarrier) block.make_ready(thread);
  }
}

void pass_named_barrier(Block& block, NamedBarrier& barrier) {
  for (const uint32_t rank : barrier.waiting) {
    acquire(block.threads[rank], barrier.clock);
    if (rank != running->rank) block.make_ready(block.threads[rank]);
  }
  barrier = {};
}

}  // namespace

int block_barrier(Vote vote, bool predicate, Site site) {
  Block& block = *running_block;
  const bool first = block.at_barrier == 0;
  count_barrier(site);
  if (block.alive < block.threads.size()) check_same_barrier(site);
  if (!first && !same(block.barrier_site, site)) check_same_barrier(site);
  block.barrier_site = site;
  block.votes += predicate;
  ++block.at_barrier;
  if (block.at_barrier == block.alive) {
    pass_block_barrier(block);
  } else {
    wait(Thread::State::kAtBarrier, site);
  }
  const int total = block.vote_total;
  switch (vote) {
    case Vote::kAnd:
      return total == static_cast<int>(block.threads.size());
    case Vote::kOr:
      return total > 0;
    default:
      return total;
  }
}

void named_barrier(int id, int num_threads, bool waits) {
  const Site site = at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  const std::string name = "named barrier " + std::to_string(id);
  if (id < 0 || id >= static_cast<int>(kNamedBarriers)) {
    fail((name + ": expected 0 to 15").c_str(), site);
  }
  if (num_threads <= 0 || num_threads % static_cast<int>(kWarpSize) != 0) {
    const std::string count = std::to_string(num_threads);
    fail((name + " for " + count + " threads: expected a multiple of 32").c_str(), site);
  }
  NamedBarrier& barrier = running_block->named[id];
  if (barrier.arrived > 0 && barrier.expected != num_threads) {
    fail((name + " for " + std::to_string(num_threads) + " threads, where others came for " +
          std::to_string(barrier.expected))
             .c_str(),
         site);
  }
  count_barrier(site);
  barrier.expected = num_threads;
  release(*running, barrier.clock);
  if (waits) barrier.waiting.push_back(running->rank);
  if (++barrier.arrived == num_threads) {
    pass_named_barrier(*running_block, barrier);
  } else if (waits) {
    wait(Thread::State::kAtNamedBarrier, site);
  }
}

}  // namespace m3i::emulator
