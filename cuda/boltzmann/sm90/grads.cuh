// boltzmann: the kernel of boltzmann_grads on compute capability 9.0. Device code only.
//
// Of each block of C, phase 1 makes C again and puts G in the place of C, in the registers;
// rounded, it goes to 32 MB that stay in the second-level cache. Phase 2 multiplies it by the
// features on its right and, transposed, on its left: wgmma takes operands of which either index is
// contiguous, so that nothing is ever transposed in memory. A thread adds to its elements of the
// gradients in float32, one block of C after the other, in one launch for all (work.cuh).
#pragma once

#include "boltzmann/sm80/grads.cuh"
#include "boltzmann/sm90/sums.cuh"
#include "boltzmann/sm90/work.cuh"

namespace m3i::boltzmann {

// ---- The gradient by the logits -----------------------------------------------------------------

// Slots of columns that are told apart by what is in them: 32 columns of the warp.
inline constexpr int kPartColumns = 8;

using HalfVectors = Vectors<float, kHalfRows, kHopperTile.columns, kWarpgroupWarps, 1>;

struct HopperShared {
  Ring ring;
  Tickets tickets;
  HalfVectors halves[kConsumers];
};

// Puts G in C's place in the columns' slots from `first` on, and returns the thread's sum of G C.
template <class Gradient>
__device__ inline float replace_part(Half& c, int first, const Gradient& gradient) {
  const HalfPlace place;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPartColumns; ++i) {
    const int s = first + i;
#pragma unroll
    for (int r = 0; r < HalfPlace::kRows; ++r) {
      float& element = c[HalfPlace::index(r, s)];
      const float g = gradient(element, place.row(r), place.column(s));
      sum = fused(g, element, sum);
      element = g;
    }
  }
  return sum;
}

// G of any element, without a branch: weights and target of both kinds are read, and one is taken.
template <bool kSigmoid>
__device__ inline float mixed_gradient(const GradsTile<HalfVectors, kSigmoid>& values, float dot,
                                       int i, int j) {
  const HalfVectors& of = values.of;
  const bool positive = of.row_ids[i] == of.column_ids[j], ignored = of.row_ids[i] == kIgnored;
  float g = 0;
  if constexpr (kSigmoid) {
    g = softplus_gradient(logit(dot, values.scale, of.bias[j]), positive);
  } else {
    const float as_negative =
        of.row_weights[kNegativeWeight][i] + of.column_weights[kNegativeWeight][j];
    const float as_positive =
        of.row_weights[kPositiveWeight][i] + of.column_weights[kPositiveWeight][j];
    const float target = of.row_weights[kTarget][i] + of.column_weights[kTarget][j];
    const float e = exponential(dot, values.scale * static_cast<float>(kLog2E), of.offset[j]);
    g = e * (positive ? as_positive : as_negative) - (positive ? target : 0.0f);
  }
  return ignored ? 0.0f : g;
}

// Puts G in C's place and returns the thread's sum of G C. Parts without positives and ignored rows
// test nothing of their elements.
template <bool kSigmoid>
__device__ inline float replace_half(Half& c, const GradsTile<HalfVectors, kSigmoid>& values,
                                     const WarpRows& rows, bool exact) {
  constexpr uint32_t kGroupsOfPart = (1u << kPartColumns / 2) - 1;
  const uint32_t mixed = rows.ignored ? ~0u : rows.positives;
  float sum = 0;
#pragma unroll
  for (int first = 0; first < HalfPlace::kColumns; first += kPartColumns) {
    if (exact && !kSigmoid) {
      sum += replace_part(c, first, [&](float dot, int i, int j) {
        return values.template any<!kSigmoid>(dot, i, j);
      });
    } else if (mixed >> first / 2 & kGroupsOfPart) {
      sum += replace_part(
          c, first, [&](float dot, int i, int j) { return mixed_gradient(values, dot, i, j); });
    } else {
      sum += replace_part(c, first, [&](float dot, int i, int j) {
        return values.template negative<false>(dot, i, j);
      });
    }
  }
  return sum;
}

// The sum of the warpgroup's values to *to, in double, since blocks of C follow one another there.
__device__ inline void add_warpgroup(float value, HalfVectors& shared, double* to, bool first) {
  const HalfPlace place;
  float* folds = shared.row_folds[0];
#pragma unroll
  for (int bit = 1; bit < kWarpLanes; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  if (place.lane == 0) folds[place.warp] = value;
  sync_warpgroup();
  if (threadIdx.x % kWarpgroupThreads != 0) return;
  *to = (first ? 0.0 : __ldcg(to)) + ((folds[0] + folds[1]) + (folds[2] + folds[3]));
}

// Transposes 4 x 4 words of four neighbouring lanes: word i of lane q is afterwards word q of i.
__device__ inline void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t given = upper ? words[i] : words[i | bit];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, given, bit);
      words[i] = upper ? got : words[i];
      words[i | bit] = upper ? words[i | bit] : got;
    }
  }
}

// Rounds G to the inputs' type; zeros where no rows or columns are, since both products read them.
// Four lanes trade their pairs for eight neighbours each: 16 bytes a store, and whole sectors.
template <class T>
__device__ inline void write_half(const Half& g, T* corner, int64_t pitch) {
  const HalfPlace place;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    T* row = corner + place.row(r) * pitch + place.lane % 4 * 8;
#pragma unroll
    for (int s = 0; s < HalfPlace::kColumns; s += 8) {  // 32 columns of four lanes
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = HalfPlace::index(r, s + 2 * i);
        const float pair[2] = {g[at], g[at + 1]};
        const Vec<T, 2> rounded = round_to<T>(pair);
        memcpy(&words[i], rounded.at, sizeof(rounded));
      }
      transpose_quad(words, place.lane);
      Vec<uint32_t, 4> eight;
      memcpy(eight.at, words, sizeof(words));
      store(reinterpret_cast<uint32_t*>(row + s * 4), eight);
    }
  }
}

// What the halves of blocks of C leave behind, blocks one after the other in the same places.
struct HopperGradsMemory {
  void* logit_grads;    // G of a block: [blocks.rows, blocks.columns], in the inputs' type
  double* scale_grads;  // [halves of a block's rows, its column tiles]
  LineSums sums;        // rows: of values, a line for each column tile of a block; columns: of the
                        // gradient by the bias, a line for each half of its rows; or null
  uint64_t* counters;   // of Work
};

// The gradient by a half's logits, and its sums.
template <class T, bool kSigmoid>
__device__ inline void write_half_gradient(Half& c, const BoltzmannGradsParams& params,
                                           const HalfOrigin& half, const Blocks& blocks,
                                           const HopperGradsMemory& memory, const WarpRows& rows,
                                           HalfVectors& vectors) {
  const bool exact = !kSigmoid && *params.exact;
  const float scale = read_scalar<float>(params.input.scale);
  const bool first_row = half.block.row_begin == 0, first_column = half.block.column_begin == 0;
  if constexpr (kSigmoid) {
    const SumsTile<HalfVectors, SumsMode::kSigmoid> sums{vectors, scale};
    fold_half(
        c, [&](float dot, int i, int j) { return sums.any(0, kNegatives, dot, i, j); }, vectors,
        half.rows_of(memory.sums, half.column_tile, first_column), AddTo{});
  }
  const float sum = replace_half(c, GradsTile<HalfVectors, kSigmoid>{vectors, scale}, rows, exact);
  const int64_t tiles = blocks.columns / kHopperTile.columns;
  add_warpgroup(sum, vectors, memory.scale_grads + half.half * tiles + half.column_tile,
                first_row && first_column);
  if (memory.sums.columns) {
    fold_half(
        c, [](float g, int, int) { return Pair<float>{0, g}; }, vectors, AddTo{},
        half.columns_of(memory.sums, half.half, first_row));
  }
  T* corner = static_cast<T*>(memory.logit_grads) + half.half * kHalfRows * blocks.columns +
              half.column_tile * kHopperTile.columns;
  write_half(c, corner, blocks.columns);
}

template <class T, bool kSigmoid>
__device__ inline void add_logit_grads(const BoltzmannGradsParams& params, const Work& work,
                                       const HopperGradsMemory& memory, HopperShared& shared,
                                       RingPlace& place, int consumer, int steps) {
  const BoltzmannInput& input = params.input;
  HalfVectors& vectors = shared.halves[consumer];
  const Block block = work.block();
  const HalfOrigin half(block, work.down(), work.across(), consumer);
  const TileOrigin tile = half.in_c();
  stage_input<true>(vectors, input, tile);
  if constexpr (!kSigmoid) {
    stage_shift(vectors, input, params.shift, tile, *params.exact);
    stage_weights(vectors, input, params.row_weights, params.col_weights, tile);
  }
  sync_warpgroup();
  const WarpRows rows = look_at_rows(vectors, input, tile);
  Half c;
  multiply_half<T, Major::kK, Major::kK>(shared.ring, place, consumer, steps, c);
  wait_for_turn(work, memory.counters);  // G of the block before was multiplied
  write_half_gradient<T, kSigmoid>(c, params, half, work.blocks, memory, rows, vectors);
}

// ---- The gradients by the features --------------------------------------------------------------

// to (+)= sum, of the half at (row, column) of a matrix of rows x columns, an even number.
__device__ inline void add_half(const Half& sum, void* to, int64_t row, int64_t column,
                                int64_t rows, int64_t columns, bool first) {
  const HalfPlace place;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    const int64_t y = row + place.row(r);
    if (y >= rows) continue;
#pragma unroll
    for (int s = 0; s < HalfPlace::kColumns; s += 2) {
      const int64_t x = column + place.column(s);
      if (x >= columns) continue;
      const int at = HalfPlace::index(r, s);
      float2* pair = reinterpret_cast<float2*>(static_cast<float*>(to) + y * columns + x);
      const float2 before = first ? float2{0, 0} : __ldcg(pair);
      *pair = {before.x + sum[at], before.y + sum[at + 1]};
    }
  }
}

// A half tile of grad_z_hat (+)= G z of a block's rows, or of grad_z (+)= G^T z_hat of its columns.
// The turn is the copying thread's, which waited for it before it filled the ring: who has
// multiplied knows what was added to these elements for the block before.
template <class T>
__device__ inline void add_feature_grads(const BoltzmannGradsParams& params, const Work& work,
                                         Ring& ring, RingPlace& place, int consumer) {
  const BoltzmannInput& input = params.input;
  const Block block = work.block();
  const int64_t column = int64_t{work.across()} * kHopperTile.columns;
  const int row = work.first_row() + consumer * kHalfRows, steps = work.feature_steps();
  Half sum;
  if (work.is_of_rows()) {
    multiply_half<T, Major::kK, Major::kMN>(ring, place, consumer, steps, sum);
    add_half(sum, params.grad_z_hat, block.row_begin + row, column, input.rows, input.width,
             block.column_begin == 0);
  } else {
    multiply_half<T, Major::kMN, Major::kMN>(ring, place, consumer, steps, sum);
    add_half(sum, params.grad_z, block.column_begin + row, column, input.columns, input.width,
             block.row_begin == 0);
  }
}

// By the thread that copies: both operands of a feature tile, of which G is the first.
__device__ inline void copy_gradients(Ring& ring, RingPlace& place, const TensorMap& logit_grads,
                                      const TensorMap& z_hat, const TensorMap& z,
                                      const Work& work) {
  const int first = work.first_row(), column = work.across() * kHopperTile.columns;
  const int steps = work.feature_steps();
  if (work.is_of_rows()) {
    const int depth = static_cast<int>(work.block().column_begin);
    copy_operands<Major::kK, Major::kMN>(ring, place,
                                         {logit_grads, z, first, 0, column, depth, steps});
  } else {
    const int depth = static_cast<int>(work.block().row_begin);
    copy_operands<Major::kMN, Major::kMN>(ring, place,
                                          {logit_grads, z_hat, first, 0, column, depth, steps});
  }
}

// All blocks of C, one after the other: G by its logits, then the gradients by its features. One
// thread adds to an element for a block, and blocks follow one another: always the same bits.
template <class T, bool kSigmoid>
__global__ void __launch_bounds__(kHopperThreads, 1)
    boltzmann_grads_hopper_kernel(const BoltzmannGradsParams params, const Blocks blocks,
                                  const HopperGradsMemory memory,
                                  const __grid_constant__ TensorMap logit_grads,
                                  const __grid_constant__ TensorMap z_hat,
                                  const __grid_constant__ TensorMap z) {
  if (is_skipped(params.input)) return;
  HopperShared& shared = *dynamic_shared<HopperShared>();
  Ring& ring = shared.ring;
  const int steps = static_cast<int>(divide_up(params.input.width, kBoxSide));
  start_tickets(shared.tickets);
  run_warpgroups(
      ring,
      [&] {
        RingPlace place;
        TicketPlace ticket;
        Work work(params, blocks);
        while (work.seek(cluster_rank() == 0 ? draw_ticket(shared.tickets, ticket, memory.counters)
                                             : take_ticket(shared.tickets, ticket, false))) {
          if (work.is_logits) {
            copy_features(ring, place, z_hat, z, work.block(), work.down(), work.across(), steps);
          } else {
            counter_wait(memory.counters + kDone, work.first * kHalves);
            fence_proxy_async_global();
            copy_gradients(ring, place, logit_grads, z_hat, z, work);
          }
        }
      },
      [&](int consumer) {
        RingPlace place;
        TicketPlace ticket;
        Work work(params, blocks);
        while (work.seek(take_ticket(shared.tickets, ticket, true))) {
          if (work.is_logits) {
            add_logit_grads<T, kSigmoid>(params, work, memory, shared, place, consumer, steps);
          } else {
            add_feature_grads<T>(params, work, ring, place, consumer);
          }
          end_turn(memory.counters);
        }
      });
}

}  // namespace m3i::boltzmann
