// boltzmann on compute capability 9.0: a tile of a product by warpgroups. Device code only.
//
// Two blocks, a cluster, keep to two multiprocessors and take tiles of 256 x 256 one after the
// other, 128 rows each. One thread of a block's last warpgroup has tensor copies fill a ring of
// four stages, 64 terms of both operands each: the block's own rows of A, and half of B, which goes
// to both blocks. The two other warpgroups multiply by wgmma, 64 rows each with 128 sums a thread.
// Nothing joins the two but the ring: while one is done with its tile and works on its sums, the
// other one multiplies, and the ring already takes in what comes next.
//
//   shared memory   4 x (16 + 32) KiB, and 25 KiB of what is known of rows and columns
//   registers       40 for each thread that copies, 232 for those that multiply
//   per 64 terms    4.2 Mflop a block: 1024 clocks of the tensor cores, in which
//                   wgmma reads 80 KiB of shared memory, and copies write 48: 128 bytes a clock,
//                   as many as there are
//                   32 KiB come from the second-level cache: 7.7 TB/s for 132 multiprocessors at
//                   the 1.83 GHz of 989 Tflop/s
//   64 x 256 sums   1024 clocks of the units that make exponentials
//
// Rejected, by counting, with what they ask of the second-level cache in TB/s:
//   blocks that share nothing                          11.6
//   a tile of 64 x 256 for each warpgroup, in turns    19.3, and 11.6 where two blocks share B
//   128 x 128, two blocks a multiprocessor             15.5
//   256 x 128 a block, 128 rows a warpgroup            11.6, 7.7 in a cluster; but 144 KiB of
//                                                      shared memory in 1024 clocks
//   A kept for all of a row of tiles                   7.7, 3.9 in a cluster; but 128 KiB at
//                                                      D = 512 leave room for two stages of B
#pragma once

#include "boltzmann/sm90/tiling.h"
#include "m3i/gpu/barrier.cuh"
#include "m3i/gpu/cluster.cuh"
#include "m3i/gpu/registers.cuh"
#include "m3i/gpu/tma.cuh"
#include "m3i/gpu/wgmma.cuh"

namespace m3i::boltzmann {

// A box of 64 rows of 128 bytes: of 64 rows (or columns) of the product and 64 terms of its sums.
struct alignas(1024) Box {
  unsigned char bytes[kBoxSide * kBoxSide * 2];
};

struct RingStage {
  Box a[kBlockRows / kBoxSide];
  Box b[kHopperTile.columns / kBoxSide];
};

struct Ring {
  RingStage stages[kHopperTile.stages];
  Mbarrier full[kHopperTile.stages], empty[kHopperTile.stages];
};

// Where in the ring a thread is.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    stage = stage + 1 == kHopperTile.stages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// A tile of a product: where its operands begin, in rows (or columns) of the product and in terms.
struct TileProduct {
  const TensorMap& a;
  const TensorMap& b;
  int a_side, a_depth, b_side, b_depth;
  int steps;  // of 64 terms
};

// ---- Warpgroups ---------------------------------------------------------------------------------

// Of one warpgroup that multiplies.
__device__ inline void sync_warpgroup() {
  named_barrier_sync(1 + static_cast<int>(threadIdx.x) / kWarpgroupThreads, kWarpgroupThreads);
}

__device__ inline void start_ring(Ring& ring) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kHopperTile.stages; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], kHalves * kWarpgroupThreads / kWarpLanes);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
}

// produce() by one thread, consume(0) and consume(1) by a warpgroup each.
template <class Produce, class Consume>
__device__ inline void run_warpgroups(Ring& ring, const Produce& produce, const Consume& consume) {
  start_ring(ring);
  // Of one lane for all: ptxas knows then that warps do not part below, and spills nothing.
  const int own = threadIdx.x / kWarpgroupThreads, warpgroup = __shfl_sync(0xffffffffu, own, 0);
  if (warpgroup == kConsumers) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kWarpgroupThreads == 0) produce();
    __syncwarp();
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    consume(warpgroup);
  }
  cluster_sync();  // the other block may still arrive at barriers here
}

// ---- Copies -------------------------------------------------------------------------------------

// kK: rows of the matrix are rows (or columns) of the product; kMN: they are its terms. kShared:
// to all blocks of the cluster.
template <Major kMajor, bool kShared>
__device__ inline void copy_box(Box* to, const TensorMap& map, int side, int depth,
                                Mbarrier* full) {
  constexpr uint16_t kAll = (1u << kClusterBlocks) - 1;
  const int row = kMajor == Major::kK ? side : depth, column = kMajor == Major::kK ? depth : side;
  if constexpr (kShared) {
    tma_load_2d_multicast(to, map, row, column, full, kAll);
  } else {
    tma_load_2d(to, map, row, column, full);
  }
}

// The block's own part of A, and every other box of B.
template <Major kA, Major kB>
__device__ inline void copy_operands(Ring& ring, RingPlace& place, const TileProduct& product) {
  for (int step = 0; step < product.steps; ++step, place.advance()) {
    RingStage& stage = ring.stages[place.stage];
    Mbarrier* full = &ring.full[place.stage];
    mbarrier_wait(&ring.empty[place.stage], place.parity ^ 1);
    mbarrier_arrive_expect_tx(full, sizeof(RingStage));
    const int depth = step * kBoxSide;
#pragma unroll
    for (int i = 0; i < kBlockRows / kBoxSide; ++i) {
      copy_box<kA, false>(&stage.a[i], product.a, product.a_side + i * kBoxSide,
                          product.a_depth + depth, full);
    }
#pragma unroll
    for (int i = 0; i < kHopperTile.columns / kBoxSide; i += kClusterBlocks) {
      const int own = i + static_cast<int>(cluster_rank());
      copy_box<kB, true>(&stage.b[own], product.b, product.b_side + own * kBoxSide,
                         product.b_depth + depth, full);
    }
  }
}

// ---- Products -----------------------------------------------------------------------------------

template <Major kMajor>
__device__ inline uint64_t describe(const Box* boxes) {
  constexpr int kEightRows = 8 * kBoxSide * 2;
  return wgmma_descriptor(boxes, kMajor == Major::kK ? 16 : sizeof(Box), kEightRows, Swizzle::k128);
}

// Bytes from 16 terms to the next.
template <Major kMajor>
inline constexpr int kTermsBytes = kMajor == Major::kK ? 16 * 2 : 16 * kBoxSide * 2;

// A warpgroup's half of a tile in the registers of its threads.
using Half = float[kHopperTile.columns / 2];

// Lets the ring's stage be filled again: each warp tells both blocks, which both write there.
__device__ inline void release(Ring& ring, int stage) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  if (lane < kClusterBlocks) mbarrier_arrive_remote_relaxed(&ring.empty[stage], lane);
}

// The sums begin with zeros in registers: whether the first product adds to them is not known to
// ptxas, which would otherwise keep room for what they held before.
template <class T, Major kA, Major kB>
__device__ inline void multiply_half(Ring& ring, RingPlace& place, int consumer, int steps,
                                     Half& sum) {
  int last = 0;
#pragma unroll
  for (float& element : sum) element = 0;
  for (int step = 0; step < steps; ++step, place.advance()) {
    mbarrier_wait(&ring.full[place.stage], place.parity);
    const RingStage& stage = ring.stages[place.stage];
    const uint64_t a = describe<kA>(&stage.a[consumer]), b = describe<kB>(stage.b);
    wgmma_fence(sum);
#pragma unroll
    for (int k = 0; k < kBoxSide / 16; ++k) {
      wgmma<kHopperTile.columns, T, kA, kB>(sum, wgmma_advance(a, k * kTermsBytes<kA>),
                                            wgmma_advance(b, k * kTermsBytes<kB>));
    }
    wgmma_commit();
    wgmma_wait<1>();  // the step before
    if (step > 0) release(ring, last);
    last = place.stage;
  }
  wgmma_wait<0>(sum);
  release(ring, last);
}

// Where in its half the calling thread's elements are. Two rows, and 64 columns.
struct HalfPlace {
  static constexpr int kRows = 2, kColumns = kHopperTile.columns / 4;

  int lane = threadIdx.x % kWarpLanes;
  int warp = threadIdx.x % kWarpgroupThreads / kWarpLanes;

  __device__ int row(int slot) const { return warp * 16 + slot * 8 + lane / 4; }
  __device__ int column(int slot) const { return slot / 2 * 8 + lane % 4 * 2 + slot % 2; }
  // In Half.
  M3I_HOST_DEVICE static constexpr int index(int row_slot, int column_slot) {
    return column_slot / 2 * 4 + row_slot * 2 + column_slot % 2;
  }
};

}  // namespace m3i::boltzmann
