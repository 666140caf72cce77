// Clusters: blocks that run at the same time and reach each other's shared memory (sm_90). Device
// code only. Launched by launch_cluster; in any other launch each block is a cluster of its own.
#pragma once

#include "m3i/gpu/mbarrier.cuh"

namespace m3i {

// The block's place in its cluster, and the blocks of it.
__device__ inline uint32_t cluster_rank() {
#ifdef M3I_EMULATOR
  return emulator::cluster_rank();
#else
  uint32_t rank = 0;
  M3I_ASM_90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}
__device__ inline uint32_t cluster_size() {
#ifdef M3I_EMULATOR
  return emulator::cluster_size();
#else
  uint32_t size = 0;
  M3I_ASM_90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// What all threads of the cluster that have not returned did before they arrived is seen by who has
// waited. Each arrives and waits in turn.
__device__ inline void cluster_arrive() {
#ifdef M3I_EMULATOR
  emulator::cluster_arrive();
#else
  M3I_ASM_90("barrier.cluster.arrive.release;" :: : "memory");
#endif
}
__device__ inline void cluster_wait() {
#ifdef M3I_EMULATOR
  emulator::cluster_wait();
#else
  M3I_ASM_90("barrier.cluster.wait.acquire;" :: : "memory");
#endif
}

// Also before a block returns whose shared memory others still use.
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where another block of the cluster has what is at `pointer`, in shared memory, in the own block.
template <class T>
__device__ inline T* map_shared_rank(T* pointer, uint32_t rank) {
#ifdef M3I_EMULATOR
  return static_cast<T*>(emulator::map_shared_rank(pointer, rank));
#else
  T* mapped = nullptr;
  M3I_ASM_90("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return mapped;
#endif
}

// Arrives at that mbarrier of another block. Its threads alone wait for it.
__device__ inline void mbarrier_arrive_remote(Mbarrier* barrier, uint32_t rank) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_arrive_remote(barrier, rank);
#else
  M3I_ASM_90(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank) : "memory");
#endif
}

// As above without the fence, for a thread that has only read what the others may now overwrite:
// what it wrote is not seen by who waits.
__device__ inline void mbarrier_arrive_remote_relaxed(Mbarrier* barrier, uint32_t rank) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_arrive_remote(barrier, rank);
#else
  M3I_ASM_90(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank) : "memory");
#endif
}

// As mbarrier_wait, of one's own mbarrier, for what another block's threads stored before they
// arrived.
__device__ inline void mbarrier_wait_cluster(Mbarrier* barrier, uint32_t parity) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_wait(barrier, parity);
#else
  uint32_t complete = 0;
  while (!complete) {
    M3I_ASM_90(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}" : "=r"(complete) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
  }
#endif
}

}  // namespace m3i
