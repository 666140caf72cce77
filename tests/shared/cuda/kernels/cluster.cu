// Kernels of clusters, for the tests of the emulator.
#include "m3i/gpu/cluster.cuh"
#include "m3i/gpu/shared.cuh"
#include "m3i/host/launch.h"

namespace {

constexpr int kThreads = 64;

// Each block takes the values of the one after it in its cluster, out of that one's shared memory.
// out[i] = values of the next block + its rank
__global__ void __launch_bounds__(kThreads) exchange_kernel(const int* values, int* out) {
  int* own = m3i::dynamic_shared<int>();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t size = m3i::cluster_size(), next = (m3i::cluster_rank() + 1) % size;
  own[threadIdx.x] = values[i];
  m3i::cluster_sync();
  const int* remote = m3i::map_shared_rank(own, next);
  const int taken = remote[kThreads - 1 - threadIdx.x];
  m3i::cluster_arrive();
  out[i] = taken + static_cast<int>(next);
  m3i::cluster_wait();
}

// Each block puts its values into the shared memory of the one after it.
__global__ void __launch_bounds__(kThreads) put_kernel(const int* values, int* out) {
  int* own = m3i::dynamic_shared<int>();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t size = m3i::cluster_size(), next = (m3i::cluster_rank() + 1) % size;
  m3i::cluster_sync();
  m3i::map_shared_rank(own, next)[threadIdx.x] = values[i];
  m3i::cluster_sync();
  __syncthreads();
  out[i] = own[kThreads - 1 - threadIdx.x];
}

// takers[ticket] = the cluster that drew it, of as many tickets as there are.
__global__ void __launch_bounds__(kThreads)
    tickets_kernel(unsigned* next, int* takers, unsigned num_tickets) {
  if (threadIdx.x > 0 || m3i::cluster_rank() > 0) return;
  for (;;) {
    const unsigned ticket = atomicAdd(next, 1u);
    if (ticket >= num_tickets) return;
    takers[ticket] = static_cast<int>(blockIdx.x / m3i::cluster_size());
  }
}

struct Slot {
  m3i::Mbarrier full, empty;
  int values[kThreads];
};

// The first block of a cluster fills a slot of each other block, round by round: the owner arrives
// at the first block's `empty`, which counts all of them, and the first block at the owner's
// `full`. out[step, i] = what block i / kThreads took
__global__ void __launch_bounds__(kThreads)
    broadcast_kernel(const int* values, int* out, int num_steps) {
  Slot& slot = *m3i::dynamic_shared<Slot>();
  const int thread = threadIdx.x;
  const uint32_t rank = m3i::cluster_rank(), size = m3i::cluster_size();
  if (thread == 0) {
    m3i::mbarrier_init(&slot.full, kThreads);
    m3i::mbarrier_init(&slot.empty, kThreads * (size - 1));
    m3i::mbarrier_init_fence();
  }
  m3i::cluster_sync();
  for (int step = 0; step < num_steps; ++step) {
    if (rank == 0) {
      m3i::mbarrier_wait(&slot.empty, 1 - step % 2);
      for (uint32_t to = 1; to < size; ++to) {
        m3i::map_shared_rank(slot.values, to)[thread] = values[step * kThreads + thread];
        m3i::mbarrier_arrive_remote(&slot.full, to);
      }
    } else {
      m3i::mbarrier_wait(&slot.full, step % 2);
      out[(step * gridDim.x + blockIdx.x) * kThreads + thread] = slot.values[kThreads - 1 - thread];
      m3i::mbarrier_arrive_remote_relaxed(&slot.empty, 0);
    }
  }
  m3i::cluster_sync();
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t exchange(const int* values, int* out, int blocks, int cluster) {
  return m3i::launch_cluster(exchange_kernel, blocks, cluster, kThreads, kThreads * sizeof(int),
                             nullptr, values, out);
}

M3I_TEST_API cudaError_t put(const int* values, int* out, int blocks, int cluster) {
  return m3i::launch_cluster(put_kernel, blocks, cluster, kThreads, kThreads * sizeof(int), nullptr,
                             values, out);
}

M3I_TEST_API cudaError_t broadcast(const int* values, int* out, int blocks, int cluster,
                                   int num_steps) {
  return m3i::launch_cluster(broadcast_kernel, blocks, cluster, kThreads, sizeof(Slot), nullptr,
                             values, out, num_steps);
}

M3I_TEST_API cudaError_t tickets(unsigned* next, int* takers, int blocks, int cluster,
                                 unsigned num_tickets) {
  return m3i::launch_cluster(tickets_kernel, blocks, cluster, kThreads, 0, nullptr, next, takers,
                             num_tickets);
}
