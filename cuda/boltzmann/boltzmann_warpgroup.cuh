// boltzmann on compute capability 9.0: a tile of a product by warpgroups. Device code only.
//
// A block keeps to one multiprocessor and takes tiles of 128 x 256 one after the other. One thread
// of its last warpgroup has tensor copies fill a ring of four stages, 64 terms of both operands
// each; the two other warpgroups multiply, 64 rows of the tile each, by wgmma with 128 sums a
// thread. Nothing joins the two but the ring: while one is done with its tile and works on its
// sums, the other one multiplies, and the ring already takes in what comes next.
//
//   shared memory   4 x (16 + 32) KiB, and 25 KiB of what is known of rows and columns: 222 KiB
//   registers       40 for each thread that copies, 232 for those that multiply
//   per 64 terms    4.2 Mflop, 1024 cycles of the tensor cores, 48 KiB from the second-level cache
//                   and as much out of shared memory a second time for the second warpgroup's B
//
// At 989 Tflop/s all multiprocessors would ask the second-level cache for 11.3 TB/s, more than it
// has: the two blocks of a cluster that share B (7.5 TB/s) are the next step. Rejected:
//   two warpgroups with a tile of 64 x 256 each, in turns  40 KiB per 2.1 Mflop: 18.9 TB/s
//   128 x 128, two blocks a multiprocessor                 32 KiB per 2.1 Mflop: 15.1 TB/s
//   256 x 128, 128 rows of sums a warpgroup                no fewer bytes, and twice the shuffles
//                                                          for the sums over rows
//   128 rows of A kept for all of a row of tiles           7.5 TB/s, but 128 KiB at D = 512: leaves
//                                                          room for no more than two stages of B
#pragma once

#include "boltzmann/boltzmann_hopper.h"
#include "m3i/barrier.cuh"
#include "m3i/mbarrier.cuh"
#include "m3i/registers.cuh"
#include "m3i/tma.cuh"
#include "m3i/wgmma.cuh"

namespace m3i::boltzmann {

// A box of 64 rows of 128 bytes: of 64 rows (or columns) of the product and 64 terms of its sums.
struct alignas(1024) Box {
  unsigned char bytes[kBoxSide * kBoxSide * 2];
};

struct RingStage {
  Box a[kHopperTile.rows / kBoxSide];
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
      mbarrier_init(&ring.empty[stage], kConsumers * kWarpgroupThreads / kWarpLanes);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
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
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    consume(warpgroup);
  }
}

// ---- Copies -------------------------------------------------------------------------------------

// kK: rows of the matrix are rows (or columns) of the product; kMN: they are its terms.
template <Major kMajor, int kBoxes>
__device__ inline void copy_boxes(Box (&to)[kBoxes], const TensorMap& map, int side, int depth,
                                  Mbarrier* full) {
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    const int at = side + i * kBoxSide;
    const int row = kMajor == Major::kK ? at : depth, column = kMajor == Major::kK ? depth : at;
    tma_load_2d(&to[i], map, row, column, full);
  }
}

template <Major kA, Major kB>
__device__ inline void copy_operands(Ring& ring, RingPlace& place, const TileProduct& product) {
  for (int step = 0; step < product.steps; ++step, place.advance()) {
    RingStage& stage = ring.stages[place.stage];
    Mbarrier* full = &ring.full[place.stage];
    mbarrier_wait(&ring.empty[place.stage], place.parity ^ 1);
    mbarrier_arrive_expect_tx(full, sizeof(RingStage));
    const int depth = step * kBoxSide;
    copy_boxes<kA>(stage.a, product.a, product.a_side, product.a_depth + depth, full);
    copy_boxes<kB>(stage.b, product.b, product.b_side, product.b_depth + depth, full);
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

// Lets the ring's stage be filled again; each warp says so.
__device__ inline void release(Ring& ring, int stage) {
  if (threadIdx.x % kWarpLanes == 0) mbarrier_arrive(&ring.empty[stage]);
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
