// Copies of boxes of a matrix between global and shared memory, which one thread starts and which
// go on by themselves (sm_90). Device code only.
//
// A box lies in shared memory row by row, swizzled as its map says, and begins at a multiple of 128
// bytes; of eight rows, if it is swizzled. (row, column) is its first element in the matrix, and
// may be outside.
//
//   mbarrier_arrive_expect_tx(barrier, bytes);    bytes of whole boxes, also where they stick out
//   tma_load_2d(shared, map, row, column, barrier);
//   mbarrier_wait(barrier, parity);               by those who read it
//
//   ... = value; fence_proxy_async(); barrier     by those who write it
//   tma_store_2d(map, row, column, shared);       by one thread
//   tma_store_commit();
//   tma_store_wait_read<0>();                     before `shared` is written again
#pragma once

#include "m3i/gpu/mbarrier.cuh"
#include "m3i/gpu/proxy.cuh"
#include "m3i/gpu/tensor_map.h"

namespace m3i {

// Fetches the map itself, ahead of its first copy.
__device__ inline void tma_prefetch(const TensorMap& map) {
#ifdef M3I_EMULATOR
  emulator::tma_prefetch(&map);
#else
  M3I_ASM_90("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

__device__ inline void tma_load_2d(void* shared, const TensorMap& map, int row, int column,
                                   Mbarrier* barrier) {
#ifdef M3I_EMULATOR
  emulator::tma_load_2d(shared, &map, row, column, barrier);
#else
  M3I_ASM_90(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
#endif
}

// To the same place in each block of the cluster whose bit is set in `blocks`, each through its own
// mbarrier there.
__device__ inline void tma_load_2d_multicast(void* shared, const TensorMap& map, int row,
                                             int column, Mbarrier* barrier, uint16_t blocks) {
#ifdef M3I_EMULATOR
  emulator::tma_load_2d_multicast(shared, &map, row, column, barrier, blocks);
#else
  M3I_ASM_90A(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks) : "memory");
#endif
}

__device__ inline void tma_store_2d(const TensorMap& map, int row, int column, const void* shared) {
#ifdef M3I_EMULATOR
  emulator::tma_store_2d(&map, row, column, shared, false);
#else
  M3I_ASM_90(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
          &map),
      "r"(column), "r"(row), "r"(shared_address(shared)) : "memory");
#endif
}

// Adds the box to the matrix, of floats.
__device__ inline void tma_reduce_add_2d(const TensorMap& map, int row, int column,
                                         const void* shared) {
#ifdef M3I_EMULATOR
  emulator::tma_store_2d(&map, row, column, shared, true);
#else
  M3I_ASM_90(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(shared_address(shared)) : "memory");
#endif
}

// Makes the thread's stores and additions a group.
__device__ inline void tma_store_commit() {
#ifdef M3I_EMULATOR
  emulator::tma_store_commit();
#else
  M3I_ASM_90("cp.async.bulk.commit_group;" :: : "memory");
#endif
}

// Until at most kGroups groups of the thread still read shared memory.
template <int kGroups>
__device__ inline void tma_store_wait_read() {
#ifdef M3I_EMULATOR
  emulator::tma_store_wait(kGroups, true);
#else
  M3I_ASM_90("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
#endif
}

// Until at most kGroups groups of the thread are not complete: others can read what they wrote.
template <int kGroups>
__device__ inline void tma_store_wait() {
#ifdef M3I_EMULATOR
  emulator::tma_store_wait(kGroups, false);
#else
  M3I_ASM_90("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace m3i
