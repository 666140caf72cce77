#include "runtime/threads/scheduler.h"

#include "runtime/launch/report.h"
#include "runtime/memory/race.h"
#include "runtime/threads/cluster.h"
#include "runtime/threads/registers.h"

extern "C" {
// A kernel reads them as constants: what one of its threads sees never changes. They are set at
// every switch.
M3I_EMULATOR_API uint3 threadIdx;
M3I_EMULATOR_API uint3 blockIdx;
M3I_EMULATOR_API uint3 blockDim;
M3I_EMULATOR_API uint3 gridDim;
}

namespace m3i::emulator {

Thread* running = nullptr;
Block* running_block = nullptr;
Cluster* running_cluster = nullptr;

namespace {

StackPool stacks;
void* scheduler = nullptr;  // where run_cluster waits for the running thread
const Call* call = nullptr;
bool abandoned = false;
bool moved = false;  // a thread has done more than to yield

void finish_thread() {
  Block& block = *running_block;
  Warp& warp = block.warp_of(*running);
  finish_copies(*running);
  finish_products(*running);
  finish_boxes(*running);
  running->state = Thread::State::kDone;
  warp.alive &= ~(1u << running->lane);
  warp.ready &= ~(1u << running->lane);
  if (--block.alive == 0) {
    check_warpgroups_changed_together(block);
    check_visitors_are_done(block);
  }
  leave_cluster(*running);
  // The other lanes may have waited for this one only.
  complete_collectives(warp, *running);
}

// Entry of every fiber.
void run_thread() {
  call->invoke(call->closure);
  finish_thread();
  switch_fiber(&running->saved, scheduler);
  __builtin_unreachable();
}

void resume(Thread& thread) {
  if (!thread.saved) {
    thread.stack = stacks.take();
    thread.saved = make_fiber(thread.stack, thread.rank, run_thread);
  }
  threadIdx = thread.index;
  running = &thread;
  switch_fiber(&scheduler, thread.saved);
  running = nullptr;
  moved |= thread.state != Thread::State::kYielded;
  if (thread.state == Thread::State::kDone || abandoned) {
    stacks.give(thread.stack);
    thread.stack = {};
  }
}

// Every ready lane of the warp until it has to wait; true if there was one.
bool run_warp(Block& block, unsigned w) {
  Warp& warp = block.warps[w];
  bool progress = false;
  while (warp.ready && !abandoned) {
    resume(block.threads[w * kWarpSize + static_cast<unsigned>(__builtin_ctz(warp.ready))]);
    progress = true;
  }
  warp.ready |= warp.yielded;
  warp.yielded = 0;
  return progress;
}

// Every thread of the block until it has to wait; true if one could go on.
bool run_block(Block& block) {
  running_block = &block;
  blockIdx = block.index;
  bool progress = false;
  for (unsigned w = 0; w < block.warps.size() && !abandoned; ++w) progress |= run_warp(block, w);
  return progress;
}

void give_stacks_back(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    for (Thread& thread : block.threads) {
      if (thread.stack.low) stacks.give(thread.stack);
    }
  }
}

void prepare(Block& block, dim3 size) {
  const unsigned num_threads = size.x * size.y * size.z;
  block.threads.resize(num_threads);
  block.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, {});
  block.alive = num_threads;
  for (unsigned rank = 0; rank < num_threads; ++rank) {
    Thread& thread = block.threads[rank];
    thread.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    thread.block = &block;
    thread.rank = rank;
    thread.id = block.rank * num_threads + rank;
    thread.warp = rank / kWarpSize;
    thread.lane = rank % kWarpSize;
    block.warp_of(thread).alive |= 1u << thread.lane;
    block.make_ready(thread);
  }
  for (Warp& warp : block.warps) warp.registers = warp.wanted_registers = block.launch_registers;
}

}  // namespace

void forget_running() {
  running = nullptr;
  running_block = nullptr;
  running_cluster = nullptr;
}

void wait(Thread::State state, Site site) {
  Thread& thread = *running;
  thread.state = state;
  thread.site = site;
  running_block->warp_of(thread).ready &= ~(1u << thread.lane);
  switch_fiber(&thread.saved, scheduler);
}

void yield(Site site) {
  Thread& thread = *running;
  running_block->warp_of(thread).yielded |= 1u << thread.lane;
  wait(Thread::State::kYielded, site);
  thread.state = Thread::State::kReady;
}

void give_way(Site site) {
  moved = true;
  yield(site);
}

void abandon_block() {
  abandoned = true;
  switch_fiber(&running->saved, scheduler);
  __builtin_unreachable();
}

void run_cluster(Cluster& cluster, dim3 block_size, const Call& kernel_call) {
  cluster.barriers.resize(cluster.blocks.size() / cluster.size);
  for (Block& block : cluster.blocks) {
    prepare(block, block_size);
    cluster.barrier_of(block).alive += block.alive;
  }
  cluster.alive = cluster.num_threads();
  call = &kernel_call;
  running_cluster = &cluster;
  blockDim = block_size;
  abandoned = false;
  begin_cluster_epoch();
  constexpr int kMostIdlePasses = 1'000'000;
  for (int idle_passes = 0; cluster.alive && !abandoned; ++idle_passes) {
    bool progress = false;
    moved = false;
    for (Block& block : cluster.blocks) progress |= run_block(block);
    if (moved) idle_passes = 0;
    if (abandoned || !cluster.alive) break;
    if (!moved && land_box(cluster)) continue;
    if (!progress) report_deadlock(cluster);
    if (idle_passes == kMostIdlePasses) report_standstill(cluster);
    abandoned = launch_error() != cudaSuccess;
  }
  give_stacks_back(cluster);
  running_block = nullptr;
  running_cluster = nullptr;
}

}  // namespace m3i::emulator
