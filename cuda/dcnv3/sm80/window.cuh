// dcnv3, device code: the backward with the gradient by x summed in windows (tiling.h).
//
// A point costs a warp four reads and four writes of 128 bytes in shared memory for 32 channels,
// and global memory about four sectors a pixel and group, where adding each point there costs 72 (D
// = 16, K = 9).
#pragma once

#include "dcnv3/sm80/bwd.cuh"

namespace m3i::dcnv3 {

// A warp's place in an image.
struct Strip {
  int64_t image;
  int64_t first_column;  // of the output
  int64_t first_row;
  int first_group, groups;  // of the slice
  bool exists;

  __device__ Strip(const Dcnv3Shape& shape, const WindowTiling& window, int64_t image, int64_t job)
      : image(image) {
    const int64_t rest = quotient(job, window.slices), slice = job - rest * window.slices;
    const int64_t segment = quotient(rest, window.strips);
    first_column = (rest - segment * window.strips) * kStripColumns;
    first_row = segment * window.rows;
    first_group = static_cast<int>(slice) * window.groups;
    const int left = static_cast<int>(shape.groups) - first_group;
    groups = left < window.groups ? left : window.groups;
    exists = segment < window.segments;
  }
};

// A warp's units in a strip: neighbouring pixels of one row, in all groups of the slice.
struct StripUnits {
  int64_t image, first;  // unit of the image
  int count;             // of pixels that exist, as if all slices were full
  int groups, groups_of_all;
  int whole_groups;  // that the slice has
  int own, lane;
  bool exists;

  __device__ StripUnits(const Dcnv3Shape& shape, const Tiling& tiling, const WindowTiling& window,
                        const Strip& strip, int64_t row, int column)
      : image(strip.image), groups(window.groups), whole_groups(strip.groups) {
    groups_of_all = static_cast<int>(shape.groups);
    const int64_t in_row = strip.first_column + column;
    first = (row * shape.out_width + in_row) * shape.groups + strip.first_group;
    const int pixels = tiling.units / groups;
    int64_t left = shape.out_width - in_row;
    if (left > kStripColumns - column) left = kStripColumns - column;
    if (left > pixels) left = pixels;
    count =
        strip.exists && row < shape.out_height && left > 0 ? static_cast<int>(left) * groups : 0;
    const int in_warp = threadIdx.x % kWarpLanes;
    own = in_warp / tiling.lanes;
    lane = in_warp % tiling.lanes;
    exists = has(own);
  }

  __device__ int past_first(int unit) const {
    return unit / groups * groups_of_all + unit % groups;
  }
  __device__ int64_t index(int unit) const { return first + past_first(unit); }
  __device__ bool has(int unit) const { return unit < count && unit % groups < whole_groups; }
};

inline constexpr uint32_t kNoCells = 0xffffffffu;

M3I_HOST_DEVICE constexpr int window_bytes(const Tiling& tiling) {
  return round_up((kWindowFloats + tiling.units * tiling.pitch) * 4);
}

M3I_HOST_DEVICE constexpr int window_block_bytes(const Tiling& tiling, int warps) {
  return block_bytes<float>(tiling, warps, true) + warps * window_bytes(tiling);
}

// Sums in a window, which is where the strip's current output row samples from.
template <class T>
class WindowScatter {
 public:
  __device__ WindowScatter(const Dcnv3BwdParams& params, const Tiling& tiling,
                           const Workspace<float>& work, float* grad_x, unsigned char* memory)
      : params(params), tiling(tiling), work(work), grad_x(grad_x) {
    window = reinterpret_cast<float*>(memory);
    cells = reinterpret_cast<uint32_t*>(window + kWindowFloats);
  }

  // A window of zeros around the first row of a strip. All lanes come.
  __device__ void begin(const Strip& strip) {
    const Dcnv3Shape& shape = params.shape;
    left = static_cast<int>(strip.first_column - shape.pad_width +
                            centre(shape.kernel_width, shape.dilation_width)) -
           kHaloColumns;
    top = static_cast<int>(strip.first_row - shape.pad_height +
                           centre(shape.kernel_height, shape.dilation_height)) -
          kHaloRows;
    image = strip.image;
    first_channel = strip.first_group * static_cast<int>(shape.group_size);
    channels = strip.exists ? strip.groups * static_cast<int>(shape.group_size) : 0;
    for (int i = threadIdx.x % kWarpLanes; i < kWindowFloats; i += kWarpLanes) window[i] = 0;
    __syncwarp();
  }

  // Notes where a point's corners are in the window; both rows in one word.
  __device__ void keep(int slot, int x, int y, unsigned inside) const {
    const unsigned column = x - left, row = y - top;
    uint32_t at = kNoCells;
    if (inside != 0 && column < kWindowColumns - 1 && row < kWindowRows - 1) {
      at = cell(y, column) | cell(y + 1, column) << 16;
    }
    cells[slot] = at;
  }

  __device__ void add(const StripUnits& units, int count) const {
    const Dcnv3Shape& shape = params.shape;
    const int group_size = static_cast<int>(shape.group_size);
    const int lane = threadIdx.x % kWarpLanes;
    const int of_slice = lane / group_size, channel = lane - of_slice * group_size;
    for (int unit = of_slice; unit < units.count; unit += units.groups) {
      if (!units.has(unit)) continue;
      const int64_t from = out_begin(shape, image, units.index(unit)) + channel;
      const float grad[1] = {load_value(static_cast<const T*>(params.grad_out) + from)};
      const Point<float>* points = work.points + unit * tiling.pitch;
      const uint32_t* at = cells + unit * tiling.pitch;
      Point<float> next = points[0];
      uint32_t next_at = at[0];
      for (int k = 0; k < count; ++k) {
        const Point<float> point = next;
        const uint32_t corners_at = next_at;
        if (k + 1 < count) {  // on its way while this one is added, which no read may overtake
          next = points[k + 1];
          next_at = at[k + 1];
        }
        if (corners_at != kNoCells) {
          add_to_window(point, corners_at, lane, grad[0]);
        } else if (const unsigned inside = work.inside[unit * tiling.pitch + k]) {
          add_to_image(point, inside, lane, grad);
        }
      }
    }
  }

  // Adds the first row to global memory and goes on to the next one. All lanes come, after a
  // barrier of theirs: where four floats are added at once, other lanes summed them.
  __device__ void advance() {
    const Dcnv3Shape& shape = params.shape;
    const int width = static_cast<int>(shape.width);
    const int64_t step = pixel_step(shape, 1);
    constexpr int kLanes = kWarpLanes / kRedFloats;  // of a pixel
    const int lane = threadIdx.x % kWarpLanes, channel = lane % kLanes * kRedFloats;
    const bool in_image = 0 <= top && top < static_cast<int>(shape.height) && channel < channels;
    float* to =
        grad_x + (image * shape.height + top) * shape.width * step + first_channel + channel;
#pragma unroll 1
    for (int column = lane / kLanes; column < kWindowColumns; column += kRedFloats) {
      const int x = left + column;
      auto* from = reinterpret_cast<Vec<float, kRedFloats>*>(window + cell(top, column) + channel);
      if (in_image && 0 <= x && x < width) red_add(to + x * step, from->at);
      *from = {};
    }
    ++top;
    __syncwarp();
  }

  // Adds all rows.
  __device__ void end() {
    for (int i = 0; i < kWindowRows; ++i) advance();
  }

 private:
  // Of a pixel's first channel.
  __device__ static unsigned cell(int y, unsigned column) {
    return (y % static_cast<unsigned>(kWindowRows) * kWindowColumns + column) * kWarpLanes;
  }

  __device__ void add_to_window(const Point<float>& point, uint32_t at, int lane,
                                float grad) const {
    const CornerWeights<float> weights(point);
    float* upper = window + (at & 0xffff) + lane;
    float* lower = window + (at >> 16) + lane;
    const float sums[4] = {upper[0], upper[kWarpLanes], lower[0], lower[kWarpLanes]};
    upper[0] = sums[0] + weights.at[0] * grad;
    upper[kWarpLanes] = sums[1] + weights.at[1] * grad;
    lower[0] = sums[2] + weights.at[2] * grad;
    lower[kWarpLanes] = sums[3] + weights.at[3] * grad;
  }

  __device__ void add_to_image(const Point<float>& point, unsigned corners, int lane,
                               const float (&grad)[1]) const {
    const Dcnv3Shape& shape = params.shape;
    const int64_t step = pixel_step(shape, 1), row = shape.width * step;
    float* to = grad_x + image * shape.height * row + first_channel + lane;
    scatter_point(point, corners, to + point.pixel * step, step, row, grad);
  }

  const Dcnv3BwdParams& params;
  const Tiling& tiling;
  const Workspace<float>& work;
  float* grad_x;    // [N, H, W, G, D]
  float* window;    // [kWindowRows, kWindowColumns, 32]
  uint32_t* cells;  // [units, pitch]
  int64_t image;
  int first_channel, channels;  // of the slice
  int left, top;                // pixel of x
};

// Grid: x over the blocks of an image, y over the images; both strided where they are too many.
// `grad_x`, to which the kernel adds, is not null; the others may be.
template <class T, int kVector, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dcnv3_bwd_window_kernel(const Dcnv3BwdParams params, float* grad_x, const Tiling tiling,
                            const WindowTiling window) {
  const Dcnv3Shape& shape = params.shape;
  constexpr int kWarps = kThreads / kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  unsigned char* memory = dynamic_shared();
  const Workspace<float> work = make_workspace<float>(memory, tiling, warp, true);
  memory += block_bytes<float>(tiling, kWarps, true);
  PointMaker<T> maker(shape, tiling, params.offset, params.mask, work);
  WindowScatter<T> scatter(params, tiling, work, grad_x, memory + warp * window_bytes(tiling));
  const int pixels = tiling.units / window.groups;

  for (int64_t image = blockIdx.y; image < shape.batch; image += gridDim.y) {
    for (int64_t block = blockIdx.x; block < window.blocks; block += gridDim.x) {
      const Strip strip(shape, window, image, block * kWarps + warp);
      scatter.begin(strip);
      for (int i = 0; i < window.rows; ++i) {
        for (int column = 0; column < kStripColumns; column += pixels) {
          const StripUnits units(shape, tiling, window, strip, strip.first_row + i, column);
          differentiate_units<T, kVector>(params, tiling, work, maker, units, scatter);
        }
        scatter.advance();
      }
      scatter.end();
    }
  }
}

}  // namespace m3i::dcnv3
