// A call of each wrapper of PTX, by parameters of the kernel alone, for a reader of the PTX.
#include "m3i/gpu/barrier.cuh"
#include "m3i/gpu/cluster.cuh"
#include "m3i/gpu/copy_async.cuh"
#include "m3i/gpu/counter.cuh"
#include "m3i/gpu/mma.cuh"
#include "m3i/gpu/red.cuh"
#include "m3i/gpu/registers.cuh"
#include "m3i/gpu/tma.cuh"
#include "m3i/gpu/wgmma.cuh"
#include "m3i/numbers/bf16.h"
#include "m3i/numbers/f16.h"
#include "m3i/numbers/fast_math.cuh"

using namespace m3i;

#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)

// ---- Tensor copies ------------------------------------------------------------------------------

KERNEL(prefetch, const __grid_constant__ TensorMap map) { tma_prefetch(map); }
KERNEL(load_box, const __grid_constant__ TensorMap map, void* shared, int row, int column,
       Mbarrier* barrier) {
  tma_load_2d(shared, map, row, column, barrier);
}
KERNEL(multicast_box, const __grid_constant__ TensorMap map, void* shared, int row, int column,
       Mbarrier* barrier, uint16_t blocks) {
  tma_load_2d_multicast(shared, map, row, column, barrier, blocks);
}
KERNEL(store_box, const __grid_constant__ TensorMap map, void* shared, int row, int column) {
  tma_store_2d(map, row, column, shared);
}
KERNEL(add_box, const __grid_constant__ TensorMap map, void* shared, int row, int column) {
  tma_reduce_add_2d(map, row, column, shared);
}
KERNEL(commit_boxes) { tma_store_commit(); }
KERNEL(wait_boxes_read) { tma_store_wait_read<3>(); }
KERNEL(wait_boxes) { tma_store_wait<2>(); }

// ---- Copies of a thread, additions --------------------------------------------------------------

KERNEL(copy_4, void* to, const void* from) { copy_async<4>(to, from); }
KERNEL(copy_8, void* to, const void* from) { copy_async<8>(to, from); }
KERNEL(copy_16, void* to, const void* from) { copy_async<16>(to, from); }
KERNEL(zero_8, void* to, const void* from) { copy_async<8>(to, from, false); }
KERNEL(zero_16, void* to, const void* from) { copy_async<16>(to, from, false); }
KERNEL(commit_copies) { copy_async_commit(); }
KERNEL(wait_copies) { copy_async_wait<3>(); }

#define ADD(size)                                    \
  KERNEL(add_##size, float* d, const float* a) {     \
    float values[size];                              \
    for (int i = 0; i < size; ++i) values[i] = a[i]; \
    red_add(d, values);                              \
  }
ADD(1)
ADD(2)
ADD(4)

// ---- Barriers, counters, fences -----------------------------------------------------------------

KERNEL(init, Mbarrier* barrier, uint32_t count) { mbarrier_init(barrier, count); }
KERNEL(init_fence) { mbarrier_init_fence(); }
KERNEL(arrive, Mbarrier* barrier) { mbarrier_arrive(barrier); }
KERNEL(arrive_expect, Mbarrier* barrier, uint32_t bytes) {
  mbarrier_arrive_expect_tx(barrier, bytes);
}
KERNEL(expect, Mbarrier* barrier, uint32_t bytes) { mbarrier_expect_tx(barrier, bytes); }
KERNEL(complete, Mbarrier* barrier, uint32_t bytes) { mbarrier_complete_tx(barrier, bytes); }
KERNEL(try_wait, Mbarrier* barrier, uint32_t parity, bool* done) {
  *done = mbarrier_try_wait(barrier, parity);
}
KERNEL(wait_cluster, Mbarrier* barrier, uint32_t parity) { mbarrier_wait_cluster(barrier, parity); }
KERNEL(arrive_remote, Mbarrier* barrier, uint32_t rank) { mbarrier_arrive_remote(barrier, rank); }
KERNEL(arrive_relaxed, Mbarrier* barrier, uint32_t rank) {
  mbarrier_arrive_remote_relaxed(barrier, rank);
}
KERNEL(map_rank, int* shared, uint32_t rank) { *map_shared_rank(shared, rank) = 1; }
KERNEL(read_rank, uint32_t* to) { *to = cluster_rank(); }
KERNEL(read_size, uint32_t* to) { *to = cluster_size(); }
KERNEL(arrive_cluster) { cluster_arrive(); }
KERNEL(wait_for_cluster) { cluster_wait(); }
KERNEL(sync_named, int id, int threads) { named_barrier_sync(id, threads); }
KERNEL(arrive_named, int id, int threads) { named_barrier_arrive(id, threads); }
KERNEL(count, uint64_t* counter, uint64_t value) { counter_add_release(counter, value); }
KERNEL(read_count, uint64_t* counter, uint64_t* to) { *to = counter_load_acquire(counter); }
KERNEL(fence) { fence_proxy_async(); }
KERNEL(fence_global) { fence_proxy_async_global(); }
KERNEL(take_registers) { setmaxnreg_inc<232>(); }
KERNEL(give_registers) { setmaxnreg_dec<40>(); }

// ---- Products -----------------------------------------------------------------------------------

#define WGMMA(columns, T, a_major, b_major)                                               \
  KERNEL(wgmma_##columns##_##T##_##a_major##_##b_major, float* d, uint64_t a, uint64_t b, \
         bool accumulate) {                                                               \
    float sum[columns / 2];                                                               \
    for (int i = 0; i < columns / 2; ++i) sum[i] = d[i];                                  \
    wgmma<columns, T, Major::a_major, Major::b_major>(sum, a, b, accumulate);             \
    for (int i = 0; i < columns / 2; ++i) d[i] = sum[i];                                  \
  }
WGMMA(32, BFloat16, kK, kK)
WGMMA(64, BFloat16, kK, kK)
WGMMA(96, BFloat16, kK, kK)
WGMMA(128, BFloat16, kK, kK)
WGMMA(160, BFloat16, kK, kK)
WGMMA(192, BFloat16, kK, kK)
WGMMA(224, BFloat16, kK, kK)
WGMMA(256, BFloat16, kK, kK)
WGMMA(256, BFloat16, kK, kMN)
WGMMA(256, BFloat16, kMN, kK)
WGMMA(256, Float16, kMN, kMN)

// A in registers.
KERNEL(wgmma_words, float* d, const uint32_t* a, uint64_t b, bool accumulate) {
  float sum[16];
  const uint32_t words[4] = {a[0], a[1], a[2], a[3]};
  for (int i = 0; i < 16; ++i) sum[i] = d[i];
  wgmma<32, Float16, Major::kMN>(sum, words, b, accumulate);
  for (int i = 0; i < 16; ++i) d[i] = sum[i];
}
KERNEL(fence_products) { wgmma_fence(); }
KERNEL(commit) { wgmma_commit(); }
KERNEL(wait_products) { wgmma_wait<1>(); }

#define MMA(name)                                                \
  KERNEL(name, float* d, const uint32_t* a, const uint32_t* b) { \
    float sum[4] = {d[0], d[1], d[2], d[3]};                     \
    const uint32_t rows[4] = {a[0], a[1], a[2], a[3]};           \
    const uint32_t columns[2] = {b[0], b[1]};                    \
    m3i::name(sum, rows, columns);                               \
    for (int i = 0; i < 4; ++i) d[i] = sum[i];                   \
  }
MMA(mma_bf16)
MMA(mma_f16)
MMA(mma_tf32)

#define LOAD(name, count, transposed)                \
  KERNEL(name, uint32_t* d, const void* a) {         \
    uint32_t words[count];                           \
    load_matrices<count, transposed>(words, a);      \
    for (int i = 0; i < count; ++i) d[i] = words[i]; \
  }
LOAD(load_1, 1, false)
LOAD(load_2, 2, false)
LOAD(load_4, 4, false)
LOAD(load_transposed_1, 1, true)
LOAD(load_transposed_2, 2, true)
LOAD(load_transposed_4, 4, true)

// ---- Numbers ------------------------------------------------------------------------------------

KERNEL(tf32, uint32_t* to, float value) { *to = round_to_tf32(value); }
KERNEL(pack_bf16, uint32_t* to, float low, float high) { *to = pack_bf16x2(low, high); }
KERNEL(pack_f16, uint32_t* to, float low, float high) { *to = pack_f16x2(low, high); }
KERNEL(unpack_f16, float* to, uint32_t packed) { m3i::unpack_f16x2(packed, to[0], to[1]); }
KERNEL(exp2_fast, float* to, float value) { *to = fast_exp2(value); }
KERNEL(reciprocal, float* to, float value) { *to = fast_reciprocal(value); }
