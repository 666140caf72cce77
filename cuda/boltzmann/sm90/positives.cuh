// boltzmann by warpgroups: the positive pairs and the ignored rows of a warp's part of a tile,
// apart from the negatives, which are nearly all. Device code only.
#pragma once

#include "boltzmann/sm80/tile.cuh"
#include "boltzmann/sm90/warpgroup.cuh"

namespace m3i::boltzmann {

inline constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpLanes;
inline constexpr int kGroupColumns = 8;  // of which each thread has two, in both of its rows
inline constexpr int kGroups = kHopperTile.columns / kGroupColumns;
static_assert(kGroups == kWarpLanes, "a bit of a word, and a lane, for each");

// Of a half's rows and columns, for their sums.
struct SumsVectors {
  using A = float;
  static constexpr int kRows = kHalfRows, kColumns = kHopperTile.columns;
  static constexpr int kThreads = kWarpgroupThreads;

  alignas(16) int32_t row_ids[kRows];
  int32_t column_ids[kColumns];
  float bias[kColumns];
  float offset[kColumns];
  float column_folds[kWarpgroupWarps][kColumns];
  // Sums of each warp's positives by column: of E, of Z, and their number
  float positives[2][kWarpgroupWarps][kColumns];
  uint8_t counts[kWarpgroupWarps][kColumns];
};

// What a warp finds in its 16 rows; the same in all lanes.
struct WarpRows {
  uint32_t positives;  // bit g: columns 8 g to 8 g + 7 have some
  bool ignored;        // some of the rows
};

// After the ids were staged. Where a column's id is its number, that is one comparison a row; else
// a lane compares the ids of eight columns to those of all rows.
template <class V>
__device__ inline WarpRows look_at_rows(const V& of, const BoltzmannInput& input,
                                        const TileOrigin& tile) {
  constexpr uint32_t kAll = 0xffffffffu;
  constexpr int kWarpRows = kHalfRows / kWarpgroupWarps;
  const HalfPlace place;
  const int32_t* rows = of.row_ids + place.warp * kWarpRows;
  const int32_t own = rows[place.lane % kWarpRows];
  WarpRows found{};
  found.ignored = __any_sync(kAll, own == kIgnored);
  if (!input.col_ids) {
    const int64_t column = own - tile.column;
    const bool here = own != kIgnored && column >= 0 && column < V::kColumns;
    found.positives = __reduce_or_sync(kAll, here ? 1u << (column / kGroupColumns) : 0u);
    return found;
  }
  using Four = Vec<int32_t, 4>;
  const auto* columns = reinterpret_cast<const Four*>(of.column_ids + place.lane * kGroupColumns);
  const Four low = columns[0], high = columns[1];
  bool seen = false;
#pragma unroll
  for (int i = 0; i < kWarpRows; i += 4) {
    const Four ids = *reinterpret_cast<const Four*>(rows + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) seen |= ids.at[k] == low.at[j] || ids.at[k] == high.at[j];
    }
  }
  found.positives = __ballot_sync(kAll, seen);
  return found;
}

// The dot product whose exponential is zero, whatever is added to its logit.
struct Muting {
  float scale;  // by which no dot product changes a logit noticeably if it was zero
  float dot;

  __device__ explicit Muting(float of_input)
      : scale(of_input == 0 ? 1e-30f : of_input), dot(of_input < 0 ? -minus() : minus()) {}

  __device__ static float minus() { return minus_infinity<float>(); }
};

template <class V>
__device__ inline void mute_ignored(Half& c, const Muting& muting, const V& of) {
  const HalfPlace place;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    if (of.row_ids[place.row(r)] != kIgnored) continue;
#pragma unroll
    for (int s = 0; s < HalfPlace::kColumns; ++s) c[HalfPlace::index(r, s)] = muting.dot;
  }
}

// Of a thread's two rows: the sums of E, of Z, and the number of their positives.
struct PositiveSums {
  float at[3][HalfPlace::kRows];
};

// Of a warp, in columns j and j + 1, of which j is even.
__device__ inline Vec<float, 2> positive_folds(const SumsVectors& of, int kind, int warp, int j) {
  if (kind != kCount) {
    const float* sums = of.positives[kind - kPositives][warp];
    return *reinterpret_cast<const Vec<float, 2>*>(sums + j);
  }
  const auto counts = *reinterpret_cast<const Vec<uint8_t, 2>*>(of.counts[warp] + j);
  return {{static_cast<float>(counts.at[0]), static_cast<float>(counts.at[1])}};
}

// The sums over the warp's 16 rows in a group of columns: by kind, then by the thread's two
// columns.
__device__ inline void fold_group(float (&sums)[8], int group, SumsVectors& shared) {
  const HalfPlace place;
  const int at = fold_lanes<Sum, 4, 32>(sums, place.lane), kind = at / 2;
  const int column = group * kGroupColumns + place.lane % 4 * 2 + at % 2;
  if (kind < 2) shared.positives[kind][place.warp][column] = sums[0];
  if (kind == 2) shared.counts[place.warp][column] = static_cast<uint8_t>(sums[0]);
}

template <class Words, class T>
__device__ inline void clear_row(T* row) {
  const HalfPlace place;
  reinterpret_cast<Words*>(row)[place.lane] = Words{};
}

__device__ inline void clear_folds(SumsVectors& shared) {
  const HalfPlace place;
#pragma unroll
  for (auto& of_kind : shared.positives) {
    clear_row<Vec<float, 4>>(of_kind[place.warp]);
    clear_row<Vec<float, 4>>(of_kind[place.warp] + 4 * kWarpLanes);
  }
  clear_row<Vec<uint32_t, 2>>(shared.counts[place.warp]);
  __syncwarp();
}

// Sums the positives in these groups of columns up and mutes them; over the columns if asked for.
__device__ inline void take_positives(Half& c, uint32_t groups, const Muting& muting,
                                      SumsVectors& shared, bool columns, PositiveSums& of_rows) {
  const HalfPlace place;
  const float scale2 = muting.scale * static_cast<float>(kLog2E);
  if (columns) clear_folds(shared);
  int32_t ids[HalfPlace::kRows];
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) ids[r] = shared.row_ids[place.row(r)];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (!(groups >> group & 1)) continue;
    float of_columns[8] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = 2 * group + i, j = place.column(s);
      const int32_t id = shared.column_ids[j];
#pragma unroll
      for (int r = 0; r < HalfPlace::kRows; ++r) {
        float& element = c[HalfPlace::index(r, s)];
        const bool positive = ids[r] == id && id != kIgnored;
        const float e = exponential(element, scale2, shared.offset[j]);
        const float z = logit(element, muting.scale, shared.bias[j]);
        if (!positive) continue;
        const float values[3] = {e, z, 1.0f};
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) {
          of_rows.at[kind][r] += values[kind];
          of_columns[2 * kind + i] += values[kind];
        }
        element = muting.dot;
      }
    }
    if (columns) fold_group(of_columns, group, shared);
  }
#pragma unroll
  for (auto& of_kind : of_rows.at) {
#pragma unroll
    for (float& sum : of_kind) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
  }
}

}  // namespace m3i::boltzmann
