// dcnv3's tiling and addresses, tested by the compiler: this file is right if it compiles.
#include "dcnv3/sm80/points.cuh"

namespace m3i::dcnv3 {

constexpr Dcnv3Shape make_shape(int64_t batch, int64_t height, int64_t width, int64_t groups,
                                int64_t group_size, int64_t points) {
  Dcnv3Shape shape{};
  shape.batch = batch;
  shape.height = shape.out_height = height;
  shape.width = shape.out_width = width;
  shape.groups = groups;
  shape.group_size = group_size;
  shape.points = points;
  return shape;
}

// ---- Accesses and lanes -------------------------------------------------------------------------

static_assert(vector_size(16, 8, 0) == 8, "16 bytes of a half type");
static_assert(vector_size(32, 4, 256) == 4, "16 bytes of float32");
static_assert(vector_size(15, 4, 0) == 1, "channels that no vector divides");
static_assert(vector_size(16, 8, 8) == 1, "an array at an odd multiple of 8 bytes");

constexpr Policy kTuned = kPolicies[0];

constexpr Tiling tiling_of(int64_t group_size, int64_t points, int vector) {
  return make_tiling(make_shape(1, 7, 7, 32, group_size, points), vector, kTuned);
}

// Every lane of the models' layers has channels: 16 and 32 of them, in half types and float32.
static_assert(tiling_of(16, 9, 8).lanes == 2 && tiling_of(16, 9, 8).units == 16, "fp16, D = 16");
static_assert(tiling_of(32, 9, 8).lanes == 4 && tiling_of(32, 9, 8).units == 8, "fp16, D = 32");
static_assert(tiling_of(16, 9, 4).lanes == 4, "float32, D = 16");
static_assert(tiling_of(32, 9, 4).lanes == 8, "float32, D = 32");
static_assert(tiling_of(15, 9, 1).lanes == 16, "one idle lane");
static_assert(tiling_of(1, 9, 1).lanes == 1 && tiling_of(1, 9, 1).units == 32, "one channel");
static_assert(tiling_of(1000, 9, 1).lanes == 32, "several passes");

constexpr bool tilings_hold() {
  for (int64_t group_size = 1; group_size <= 130; ++group_size) {
    for (int64_t points = 1; points <= 130; ++points) {
      const Tiling tiling = tiling_of(group_size, points, 1);
      if (tiling.lanes * tiling.units != kWarpLanes) return false;
      if (tiling.chunk < 1 || tiling.chunk > points || tiling.chunk > threads_of(kTuned))
        return false;
      if (tiling.pitch % 2 == 0 || tiling.pitch < tiling.chunk) return false;
      if (tiling.units * tiling.pitch > kTuned.slots) return false;
      // No chunk more than there have to be.
      if (points <= 9 && tiling.chunk != points) return false;
      const int64_t units = tiling.blocks * kTuned.warps * tiling.units;
      if (units < 7 * 7 * 32 || units - kTuned.warps * tiling.units >= 7 * 7 * 32) return false;
    }
  }
  return true;
}
static_assert(tilings_hold(), "slots, pitches, chunks and blocks of all sizes");

// The most that a block asks for is on every card of compute capability 8.0 and later (99 KB).
static_assert(block_bytes<double>(make_tiling(make_shape(1, 7, 7, 32, 1, 9), 1, kFloat64Policy),
                                  kFloat64Policy.warps, true) <= 99 * 1024,
              "float64 backward");
static_assert(block_bytes<float>(tiling_of(1, 9, 1), kTuned.warps, true) <= 48 * 1024,
              "float32 backward");
static_assert(block_bytes<float>(tiling_of(16, 9, 8), kTuned.warps, false) <= 20 * 1024,
              "fp16, D = 16");

// ---- Nine points --------------------------------------------------------------------------------

constexpr Dcnv3Shape make_nine(int64_t side, int64_t groups, int64_t group_size, double scale) {
  Dcnv3Shape shape = make_shape(2, side, side, groups, group_size, 9);
  shape.offset_scale = scale;
  shape.dilation_height = shape.dilation_width = 1;
  return shape;
}

static_assert(is_nine(make_nine(14, 2, 16, 1.0), 8, 0), "a model's layer in bf16");
static_assert(is_nine(make_nine(14, 7, 32, 2.0), 4, 32), "in float32, with a larger scale");
static_assert(!is_nine(make_nine(14, 2, 16, 1.0), 1, 0), "no access of 16 bytes");
static_assert(!is_nine(make_nine(14, 2, 16, 1.0), 8, 2), "an offset that is not aligned");
static_assert(!is_nine(make_nine(14, 2, 24, 1.0), 8, 0), "another group size");
static_assert(!is_nine(make_nine(14, 2, 16, 0.5), 8, 0), "places between pixels");
static_assert(!is_nine(make_nine(0, 2, 16, 1.0), 8, 0), "an image without pixels");
static_assert(is_nine(make_nine(1448, 32, 16, 1.0), 8, 0), "fewer than 2^30 channels of an output");
static_assert(!is_nine(make_nine(1449, 32, 16, 1.0), 8, 0), "more");
static_assert(!is_nine(make_nine(1 << 19, 1, 16, 1.0), 8, 0), "places that a float does not hold");

constexpr bool divides(uint32_t divisor) {
  const Divisor by = Divisor::of(divisor);
  constexpr uint32_t kLast = 0x7fffffffu;
  for (uint32_t i = 0; i < 100; ++i) {
    for (const uint32_t n :
         {i, i * divisor, i * divisor + divisor - 1, kLast - i, kLast / 3 * 2 - i}) {
      if (n > kLast) continue;
      const auto high = static_cast<uint32_t>(uint64_t{n} * by.multiplier >> 32);
      if ((high + n) >> by.shift != n / divisor) return false;
    }
  }
  return true;
}
static_assert(divides(1) && divides(2) && divides(3) && divides(7) && divides(56) && divides(641) &&
                  divides(65535) && divides(65536) && divides((1 << 28) + 1),
              "as the processor does");

// ---- Policies -----------------------------------------------------------------------------------

static_assert(policy_index(80, make_shape(1, 14, 14, 32, 16, 9)) == 0, "a100, small");
static_assert(policy_index(86, make_shape(64, 28, 28, 8, 16, 9)) == 1, "below 9.0, large");
static_assert(policy_index(90, make_shape(64, 19, 21, 8, 16, 9)) == 2, "h100, small");
static_assert(policy_index(100, make_shape(1, 20, 20, 8, 16, 9)) == 3, "9.0 and later, large");

static_assert(is_legal(kFloat64Policy), "what is not tuned");
static_assert(!is_legal({1, 6, 5, 288, 64}), "more steps of a chunk than threads");
static_assert(!is_legal({16, 6, 5, 288, 64}), "3072 threads on a multiprocessor");
static_assert(!is_legal({4, 6, 5, 16, 64}), "units without a slot");

// ---- Addresses past 2^31, without such an array -------------------------------------------------

constexpr Dcnv3Shape kLarge = make_shape(1 << 12, 1 << 10, 1 << 10, 32, 32, 9);
constexpr int64_t kPixels = int64_t{1} << 20, kChannels = 1 << 10;

static_assert(group_begin(kLarge, 0, 31) == 31 * 32, "a group's channels");
static_assert(group_begin(kLarge, 4095, 31) == 4095 * kPixels * kChannels + 31 * 32, "2^42");
static_assert(group_begin(kLarge, 3, 0) == 3 * kPixels * kChannels, "just above 2^31");
static_assert(pixel_step(kLarge, (1 << 20) - 1) == (kPixels - 1) * kChannels, "within an image");
static_assert(pixel_step(kLarge, -1025) == -1025 * kChannels, "the corner above the first row");
static_assert(out_begin(kLarge, 4095, 5) == (4095 * kPixels * 32 + 5) * 32, "an output");
static_assert(points_begin(kLarge, 4095, 5) == (4095 * kPixels * 32 + 5) * 9, "a mask");
static_assert(units_per_image(make_shape(1, 1 << 15, 1 << 15, 8, 1, 1)) == int64_t{1} << 33,
              "more units in an image than 32 bits count");
static_assert(make_tiling(make_shape(1, 1 << 15, 1 << 15, 8, 1, 1), 1, kFloat64Policy).blocks ==
                  1 << 26,
              "and the blocks for them");

}  // namespace m3i::dcnv3
