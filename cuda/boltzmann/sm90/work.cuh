// boltzmann by warpgroups: the order of a backward's work, which one launch shares out. Device code
// only.
//
// A block of C is two phases: G by the logits of its tiles, then its products by the features. What
// a phase leaves in memory the next one reads and overwrites, so none begins to do so before the
// last one is done. Clusters draw tickets for the tiles, in their order: who waits has a later
// ticket than those it waits for, which run already, however few clusters the card runs at once.
#pragma once

#include "boltzmann/sm90/warpgroup.cuh"
#include "m3i/gpu/counter.cuh"
#include "m3i/gpu/proxy.cuh"

namespace m3i::boltzmann {

// Counters of a launch, zero before it: the next ticket, and halves of tiles that are done.
enum Counter { kNext, kDone, kNumCounters };

// A tile, and the phase that it is of.
struct Work {
  Blocks blocks;
  int64_t rows, columns;  // of C
  int features;           // tiles across the features
  bool wants_rows, wants_columns;

  int number = 0;      // of the block
  uint64_t first = 0;  // ticket of the phase, and how many it has
  uint32_t size = 0;
  bool is_logits = false;
  int tile = 0;  // in the phase

  __device__ Work(const BoltzmannGradsParams& params, const Blocks& blocks)
      : blocks(blocks),
        rows(params.input.rows),
        columns(params.input.columns),
        features(static_cast<int>(divide_up(params.input.width, kHopperTile.columns))),
        wants_rows(params.grad_z_hat),
        wants_columns(params.grad_z) {
    begin_block();
  }

  // Goes on to the phase of this ticket; false if there is none.
  __device__ bool seek(uint64_t ticket) {
    while (ticket - first >= size) {
      if (number == num_blocks()) return false;
      first += size;
      if (is_logits) {
        is_logits = false;
        size = static_cast<uint32_t>((of_rows() + of_columns()) * features);
      } else {
        ++number;
        begin_block();
      }
    }
    tile = static_cast<int>(ticket - first);
    return number < num_blocks();
  }

  // Made where it is needed: registers are few.
  __device__ Block block() const {
    const int across = static_cast<int>(blocks.across);
    return make_hopper_block(blocks, rows, columns, number / across, number % across);
  }

  // The tile's place in C, or in the gradient by the features.
  __device__ int down() const { return tile / width(); }
  __device__ int across() const { return tile % width(); }

  // Of a feature tile: tiles of grad_z_hat come first.
  __device__ bool is_of_rows() const { return down() < of_rows(); }
  // The first row (or column) of C that the thread block adds to, in the block of C.
  __device__ int first_row() const {
    const int below = is_of_rows() ? down() : down() - of_rows();
    return below * kHopperTile.rows + static_cast<int>(cluster_rank()) * kBlockRows;
  }
  __device__ int feature_steps() const {
    const int64_t tiles = is_of_rows() ? block().column_tiles : block().row_tiles;
    return static_cast<int>(tiles) * (kHopperTile.rows / kBoxSide);
  }

 private:
  static_assert(kHopperTile.rows == kHopperTile.columns, "tiles of both gradients");

  __device__ int of_rows() const { return wants_rows ? static_cast<int>(block().row_tiles) : 0; }
  __device__ int of_columns() const {
    return wants_columns ? static_cast<int>(block().column_tiles) : 0;
  }
  __device__ int width() const {
    return is_logits ? static_cast<int>(block().column_tiles) : features;
  }
  __device__ int num_blocks() const { return static_cast<int>(blocks.down * blocks.across); }
  __device__ void begin_block() {
    is_logits = number < num_blocks();
    const Block begun = block();
    size = is_logits ? static_cast<uint32_t>(begun.row_tiles * begun.column_tiles) : 0;
  }
};

// By each warp that multiplies: until the phase before is done, by all clusters.
__device__ inline void wait_for_turn(const Work& work, uint64_t* counters) {
  if (threadIdx.x % kWarpLanes == 0) counter_wait(counters + kDone, work.first * kHalves);
  __syncwarp();
}

// By a warpgroup that is done with its half of a tile, which tensor copies may read.
__device__ inline void end_turn(uint64_t* counters) {
  fence_proxy_async_global();
  sync_warpgroup();
  if (threadIdx.x % kWarpgroupThreads == 0) counter_add_release(counters + kDone, 1);
}

// ---- Tickets ------------------------------------------------------------------------------------

// Of a cluster, in both blocks' shared memory: its first block's copying thread draws them.
struct Tickets {
  static constexpr int kSlots = 2;
  static constexpr int kReaders = kHalves * kWarpgroupThreads / kWarpLanes + kClusterBlocks - 1;

  uint64_t numbers[kSlots];
  Mbarrier full[kSlots];
  Mbarrier empty[kSlots];  // of the first block
};

struct TicketPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    slot = slot + 1 == Tickets::kSlots ? 0 : slot + 1;
    parity ^= slot == 0;
  }
};

// Before run_warpgroups, whose barrier follows.
__device__ inline void start_tickets(Tickets& tickets) {
  if (threadIdx.x != 0) return;
  for (int slot = 0; slot < Tickets::kSlots; ++slot) {
    mbarrier_init(&tickets.full[slot], 1);
    mbarrier_init(&tickets.empty[slot], Tickets::kReaders);
  }
  mbarrier_init_fence();
}

__device__ inline uint64_t draw_ticket(Tickets& tickets, TicketPlace& place, uint64_t* counters) {
  mbarrier_wait_cluster(&tickets.empty[place.slot], place.parity ^ 1);
  const uint64_t ticket = atomicAdd(reinterpret_cast<unsigned long long*>(counters + kNext), 1ull);
#pragma unroll
  for (uint32_t rank = 0; rank < kClusterBlocks; ++rank) {
    *map_shared_rank(&tickets.numbers[place.slot], rank) = ticket;
    mbarrier_arrive_remote(&tickets.full[place.slot], rank);
  }
  place.advance();
  return ticket;
}

// By the other block's copying thread, or by whole warps.
__device__ inline uint64_t take_ticket(Tickets& tickets, TicketPlace& place, bool by_warp) {
  mbarrier_wait_cluster(&tickets.full[place.slot], place.parity);
  const uint64_t ticket = tickets.numbers[place.slot];
  if (by_warp) __syncwarp();
  if (!by_warp || threadIdx.x % kWarpLanes == 0) {
    mbarrier_arrive_remote_relaxed(&tickets.empty[place.slot], 0);
  }
  place.advance();
  return ticket;
}

}  // namespace m3i::boltzmann
