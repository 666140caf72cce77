// mask_mix: device code.
//
//   out[p, c, y, x] = fma(views[v, c, y, x], scale[c], shift[c])
//   v = members[p, choice[p, y / cell_height, x / cell_width]]
//
// Bytes: a pixel is read once (1 byte) and written once (4 or 2 bytes), 2 flops: bound by memory.
// Tiling: a thread owns a group of kPixels neighbours of one row and one cell, in all three
// channels, so the cell is looked up once and three loads are in flight; a block owns 256
// neighbouring groups of one picture. No shared memory; registers in budget.json.
//
// A choice of no column of members and a member outside views stop the kernel by a trap: the launch
// cannot check them without waiting for the device. The next synchronisation reports it, and the
// CUDA context is lost, as after a failed device assertion.
#pragma once

#include "m3i/numbers/vec.cuh"
#include "mask_mix/params.h"

namespace m3i::mask_mix {

// ---- Policy -------------------------------------------------------------------------------------

inline constexpr int kThreads = 256;

// Lanes 2i and 2i + 1 exchange pixels when a thread owns this many (see exchange_chunks).
inline constexpr int kWideGroup = 16;

// Pixels of a thread: the widest group that divides a cell's rows, starts at an aligned address
// and, when it is wide, leaves no lane without its neighbour. 14-pixel cells (ViT-H) take 2.
M3I_HOST_DEVICE constexpr int pixels_per_thread(int64_t cell_width, int64_t plane,
                                                uint64_t address) {
  const auto fits = [&](int size) { return cell_width % size == 0 && address % size == 0; };
  if (fits(kWideGroup) && plane % (2 * kWideGroup) == 0) return kWideGroup;
  return fits(4) ? 4 : fits(2) ? 2 : 1;
}

M3I_HOST_DEVICE constexpr int64_t blocks_per_plane(int64_t plane, int pixels) {
  return (plane / pixels + kThreads - 1) / kThreads;
}

// Elements of Out in one store.
template <class Out>
inline constexpr int kChunk = kAccessBytes / static_cast<int>(sizeof(Out));

// First pixel, counted from the even lane's group, of the lane's store number `step`. The two lanes
// take turns, so that every store instruction of a warp fills whole 32-byte sectors.
template <class Out>
M3I_HOST_DEVICE constexpr int chunk_begin(bool odd_lane, int step) {
  return (2 * step + odd_lane) * kChunk<Out>;
}

// ---- Device helpers -----------------------------------------------------------------------------

// A wide group is 64 bytes of float or 32 of bfloat16. Were each lane to store its own in 16-byte
// steps, every step would half-fill its sectors. So neighbours swap half of their pixels first: of
// the pair's 16-byte chunks the even lane gets the even ones, the odd lane the odd ones, in order.
// `active`: the lanes of the warp that are here, both of a pair or none.
template <class Out>
__device__ inline Vec<uint8_t, kWideGroup> exchange_chunks(const Vec<uint8_t, kWideGroup>& own,
                                                           unsigned active) {
  constexpr int kWords = kChunk<Out> / 4;  // of four pixels, in a chunk
  const bool odd_lane = threadIdx.x % 2;
  uint32_t before[4], after[4];
  memcpy(before, own.at, sizeof(before));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int even = i / kWords * 2 * kWords + i % kWords;  // the word's place in an even chunk
    const int odd = even + kWords;
    const uint32_t sent = odd_lane ? before[even] : before[odd];
    const uint32_t received = __shfl_xor_sync(active, sent, 1);
    after[i] = odd_lane ? received : before[even];     // of the even lane's group
    after[2 + i] = odd_lane ? before[odd] : received;  // of the odd lane's group
  }
  Vec<uint8_t, kWideGroup> result;
  memcpy(result.at, after, sizeof(after));
  return result;
}

template <class Out, int kSize>
__device__ inline void normalise_and_store(const uint8_t* pixels, float scale, float shift,
                                           Out* out) {
  float values[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = fmaf(static_cast<float>(pixels[i]), scale, shift);
  store(out, round_to<Out>(values));
}

// `out` is where the thread's own group goes.
template <class Out, int kPixels>
__device__ inline void store_group(const Vec<uint8_t, kPixels>& own, unsigned active, float scale,
                                   float shift, Out* out) {
  if constexpr (kPixels == kWideGroup) {
    const bool odd_lane = threadIdx.x % 2;
    const Vec<uint8_t, kPixels> pixels = exchange_chunks<Out>(own, active);
    Out* pair_out = out - (odd_lane ? kWideGroup : 0);
#pragma unroll
    for (int step = 0; step < kWideGroup / kChunk<Out>; ++step) {
      normalise_and_store<Out, kChunk<Out>>(pixels.at + step * kChunk<Out>, scale, shift,
                                            pair_out + chunk_begin<Out>(odd_lane, step));
    }
  } else {
    normalise_and_store<Out, kPixels>(own.at, scale, shift, out);
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

// Grid: x over the groups of a plane, y over the pictures, strided where they outnumber kMaxGridY.
template <class Out, int kPixels>
__global__ void __launch_bounds__(kThreads) mask_mix_kernel(const MaskMixParams params) {
  const int64_t plane = params.height * params.width;
  const uint32_t group = blockIdx.x * kThreads + threadIdx.x;
  const bool inside = group < plane / kPixels;
  const unsigned active = __ballot_sync(0xffffffffu, inside);
  if (!inside) return;

  // 32 bits do inside a plane: it is smaller than 2^31.
  const uint32_t width = static_cast<uint32_t>(params.width);
  const uint32_t cell_height = static_cast<uint32_t>(params.height / params.grid_height);
  const uint32_t cell_width = static_cast<uint32_t>(params.width / params.grid_width);
  const uint32_t pixel = group * kPixels;
  const uint32_t y = pixel / width;
  const uint32_t x = pixel % width;
  const int64_t cell = y / cell_height * params.grid_width + x / cell_width;
  const int64_t num_cells = params.grid_height * params.grid_width;

  for (int64_t p = blockIdx.y; p < params.num_pictures; p += gridDim.y) {
    const uint8_t column = params.choice[p * num_cells + cell];
    if (column >= params.num_members) __trap();
    const int64_t view = params.members[p * params.num_members + column];
    if (view < 0 || view >= params.num_views) __trap();
    const uint8_t* in = params.views + view * kMaskMixChannels * plane + pixel;
    Out* out = static_cast<Out*>(params.out) + p * kMaskMixChannels * plane + pixel;

    Vec<uint8_t, kPixels> pixels[kMaskMixChannels];
#pragma unroll
    for (int c = 0; c < kMaskMixChannels; ++c) pixels[c] = load<kPixels>(in + c * plane);
#pragma unroll
    for (int c = 0; c < kMaskMixChannels; ++c) {
      store_group<Out>(pixels[c], active, params.scale[c], params.shift[c], out + c * plane);
    }
  }
}

}  // namespace m3i::mask_mix
