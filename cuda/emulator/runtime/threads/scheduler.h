// Runs the threads of a block in turn, each until it has to wait.
#pragma once

#include "runtime/threads/block.h"

namespace m3i::emulator {

// The running thread, or null in host code.
extern Thread* running;
extern Block* running_block;
extern Cluster* running_cluster;

// The function that a kernel's thread calls: kernel(parameters...), unpacked from the closure.
struct Call {
  void (*invoke)(void* closure);
  void* closure;
};

// Starts the threads of a cluster's blocks and returns when all have returned or one has failed;
// then the launch's report is set.
void run_cluster(Cluster& cluster, dim3 block_size, const Call& call);

// Suspends the running thread until another one makes it ready; `state` tells what it waits for.
void wait(Thread::State state, Site site);

// As yield, after a change that other threads may wait for.
void give_way(Site site);

// Ends the running thread and the block.
[[noreturn]] void abandon_block();

// Completes a collective of this warp if it can be, after a lane has arrived or returned.
void complete_collectives(Warp& warp, Thread& any_lane);

// Resets the scheduler after a jump out of a fiber.
void forget_running();

// Lands the copies that the thread did not wait for.
void finish_copies(Thread& thread);
// Writes the boxes that the thread did not wait for; fails if it is the last one of its block and a
// box is still to land.
void finish_boxes(Thread& thread);
// Lands the box whose copy began last, if there is one.
bool land_box(Cluster& cluster);
// Fails if a product of its warpgroup has not been waited for.
void finish_products(const Thread& thread);

}  // namespace m3i::emulator
