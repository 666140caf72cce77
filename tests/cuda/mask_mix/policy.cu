// mask_mix's policy, tested by the compiler: this file is right if it compiles.
#include "mask_mix/sm80/kernels.cuh"

namespace m3i::mask_mix {

constexpr int64_t kPlane224 = 224 * 224;

static_assert(pixels_per_thread(16, kPlane224, 0) == 16, "patch 16");
static_assert(pixels_per_thread(32, kPlane224, 4096) == 16, "wide cells");
static_assert(pixels_per_thread(14, kPlane224, 0) == 2, "patch 14");
static_assert(pixels_per_thread(8, 64 * 64, 0) == 4, "patch 8");
static_assert(pixels_per_thread(7, 7 * 7, 0) == 1, "odd cells");
static_assert(pixels_per_thread(16, 16 * 3, 0) == 4, "an odd number of groups: one has no partner");
static_assert(pixels_per_thread(16, kPlane224, 8) == 4, "views at an odd multiple of 8 bytes");
static_assert(pixels_per_thread(16, kPlane224, 2) == 2, "views at an odd multiple of 2 bytes");
static_assert(pixels_per_thread(16, kPlane224, 1) == 1, "views at an odd address");

static_assert(blocks_per_plane(kPlane224, 16) * kThreads * 16 >= kPlane224, "the grid covers");
static_assert((blocks_per_plane(kPlane224, 16) - 1) * kThreads * 16 < kPlane224, "and is tight");
static_assert(blocks_per_plane(1, 1) == 1, "one pixel");

// The stores of a pair of lanes cover its 32 pixels, each once, and a step's two are neighbours.
template <class Out>
constexpr bool chunks_tile_the_pair() {
  int written[2 * kWideGroup] = {};
  for (int step = 0; step < kWideGroup / kChunk<Out>; ++step) {
    if (chunk_begin<Out>(true, step) != chunk_begin<Out>(false, step) + kChunk<Out>) return false;
    for (const bool odd_lane : {false, true}) {
      for (int i = 0; i < kChunk<Out>; ++i) ++written[chunk_begin<Out>(odd_lane, step) + i];
    }
  }
  for (const int times : written) {
    if (times != 1) return false;
  }
  return true;
}
static_assert(chunks_tile_the_pair<float>(), "float");
static_assert(chunks_tile_the_pair<BFloat16>(), "bfloat16");

}  // namespace m3i::mask_mix
