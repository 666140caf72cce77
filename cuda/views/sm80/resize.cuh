// views: crop and resize, by one block. Device code only.
//
// Rows of the crop pass through shared memory, up to eight at a time: loaded as they lie, resized
// across by a warp each, and kept as uint8 in a ring of as many rows as one row of the view needs.
// Whatever rows of the view are complete then are summed down. So a row is read once and resized
// once. Where weights and rows are too many (a large crop, a small view), columns of the view are
// done some at a time; only pixels that both sides need are then read twice.
//
// Work per output: a 32-bit multiply-add and a load from shared memory a tap, twice. At 1.8 source
// pixels a pixel of the view, bicubic, these are 9 taps across for each of 1.8 rows, and 9 down.
#pragma once

#include "m3i/gpu/shared.cuh"
#include "views/sm80/block.cuh"

namespace m3i::views {

struct Crop {
  const uint8_t* data;  // of its first pixel
  int64_t row_stride;   // bytes
  int32_t height, width;
};

// Where integer weights of neighbouring outputs are in the block's shared memory. Tap t of output i
// is at t * outputs + i: neighbouring lanes, neighbouring banks. Places, not pointers, which the
// compiler would no longer know to be of shared memory.
struct Weights {
  int32_t place, outputs;

  __device__ int32_t* first() const { return dynamic_shared<int32_t>() + place / 4; }
  __device__ int32_t* count() const { return first() + outputs; }
  __device__ int16_t* taps() const { return reinterpret_cast<int16_t*>(count() + outputs); }
};

struct SumAndLargest {
  double sum, largest;
};

__device__ inline SumAndLargest filter_values(const ResizeAxis& axis, const ResizeTaps& taps) {
  SumAndLargest of{0, 0};
#pragma unroll 1  // registers
  for (int j = 0; j < taps.count; ++j) {
    const double value = resize_value(axis, taps, j);
    of.sum = add_rn(of.sum, value);
    of.largest = value > of.largest ? value : of.largest;
  }
  return of;
}

// The precision of the weights of an axis. A quotient grows with its dividend, rounded too, so one
// division finds an output's largest weight. A call, as make_weights is: their float64 registers
// come on top of those of the loops around them, and inlined they do not fit.
__device__ inline __attribute__((noinline)) int precision_of(const ResizeAxis& axis) {
  double largest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < axis.output; i += kThreads) {
    const SumAndLargest values = filter_values(axis, resize_taps(axis, i));
    const double weight = div_rn(values.largest, values.sum);
    largest = weight > largest ? weight : largest;
  }
  return resize_precision(over_block(largest, [](double a, double b) { return a > b ? a : b; }));
}

// Writes the weights of outputs [begin, begin + count).
__device__ inline __attribute__((noinline)) void make_weights(const ResizeAxis& axis, int precision,
                                                              int begin, int count,
                                                              const Weights& to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const ResizeTaps taps = resize_taps(axis, begin + i);
    const double sum = filter_values(axis, taps).sum;
    to.first()[i] = taps.first;
    to.count()[i] = taps.count;
#pragma unroll 1
    for (int j = 0; j < taps.count; ++j) {
      const double weight = div_rn(resize_value(axis, taps, j), sum);
      to.taps()[j * to.outputs + i] = static_cast<int16_t>(resize_weight(weight, precision));
    }
  }
}

// Copies bytes [from, from + size) to shared memory, by one warp: the pieces of 16 at which `from`
// is cut by its address, whole where all of it is asked for. Byte 0 goes to
// to[address of from % 16].
__device__ inline void load_row(const uint8_t* from, int size, unsigned char* to) {
  const int before = static_cast<int>(reinterpret_cast<uint64_t>(from) % kAccessBytes);
  const uint8_t* aligned = from - before;
  for (int at = lane_index() * kAccessBytes; at < before + size; at += 32 * kAccessBytes) {
    if (at >= before && at + kAccessBytes <= before + size) {
      *reinterpret_cast<Vec<uint8_t, kAccessBytes>*>(to + at) = load<kAccessBytes>(aligned + at);
    } else {
      const int begin = at > before ? at : before;
      const int end = at + kAccessBytes < before + size ? at + kAccessBytes : before + size;
      for (int i = begin; i < end; ++i) to[i] = aligned[i];
    }
  }
}

// The weighted sums of pixels, a channel each; at(t) is where tap t's is.
template <class At>
__device__ inline void weigh(const Weights& weights, int i, int precision, int* sums,
                             const At& at) {
  const int start = (1 << precision) >> 1;
  sums[0] = sums[1] = sums[2] = start;
  const int count = weights.count()[i], outputs = weights.outputs;
  const int16_t* taps = weights.taps() + i;
#pragma unroll 2  // taps: registers
  for (int t = 0; t < count; ++t, taps += outputs) {
    const int weight = *taps;
    const unsigned char* pixel = at(t);
#pragma unroll
    for (int c = 0; c < kViewChannels; ++c) sums[c] += weight * pixel[c];
  }
#pragma unroll
  for (int c = 0; c < kViewChannels; ++c) sums[c] = resize_rounded(sums[c], precision);
}

// What the block resizes, in shared memory: it is the same for all threads, and registers are few.
struct Resize {
  Crop crop;
  ResizeAxis across, down;
  ResizeTiling tiling;
  int precision_across, precision_down;
  Weights columns, rows;
  int loaded_place, ring_place;

  __device__ unsigned char* loaded() const {  // [tiling.rows, tiling.segment]
    return dynamic_shared() + loaded_place;
  }
  __device__ unsigned char* ring() const {  // [tiling.ring, tiling.columns, 3]
    return dynamic_shared() + ring_place;
  }
};

// By one thread. The precisions are made by plan_precisions, by the whole block, after a barrier.
__device__ inline void start_resize(const Crop& crop, int height, int width, int cubic,
                                    Resize& to) {
  to.crop = crop;
  to.across = resize_axis(crop.width, width, cubic);
  to.down = resize_axis(crop.height, height, cubic);
  const int taps_across = to.across.max_taps, taps_down = to.down.max_taps;
  const ResizeTiling tiling = resize_tiling(height, width, crop.width, taps_across, taps_down);
  to.tiling = tiling;
  to.columns = {0, tiling.columns};
  to.rows = {static_cast<int32_t>(weight_bytes(tiling.columns, taps_across)), tiling.panel};
  to.loaded_place = to.rows.place + static_cast<int>(weight_bytes(tiling.panel, taps_down));
  to.ring_place = to.loaded_place + tiling.rows * tiling.segment;
}

__device__ inline void plan_precisions(Resize& to) {
  const int across = precision_of(to.across), down = precision_of(to.down);
  if (threadIdx.x == 0) {
    to.precision_across = across;
    to.precision_down = down;
  }
  __syncthreads();
}

// Loads rows [done, done + num_rows) of the crop and resizes them across, columns [x, x + count) of
// the view, a row a warp. Ends with a barrier.
__device__ inline void resize_across(const Resize& of, int done, int num_rows, int count) {
  const Weights& columns = of.columns;
  const int row = warp_index();
  const int first = columns.first()[0];
  const uint8_t* from = of.crop.data + (done + row) * of.crop.row_stride +
                        static_cast<int64_t>(first) * kViewChannels;
  unsigned char* to = of.loaded() + row * of.tiling.segment;
  if (row < num_rows) {
    const int last = columns.first()[count - 1] + columns.count()[count - 1];
    load_row(from, kViewChannels * (last - first), to);
  }
  __syncthreads();  // also: what the ring loses now has been summed down
  if (row < num_rows) {
    const unsigned char* pixels = to + reinterpret_cast<uint64_t>(from) % kAccessBytes;
    unsigned char* resized =
        of.ring() + (done + row) % of.tiling.ring * kViewChannels * of.tiling.columns;
    for (int i = lane_index(); i < count; i += 32) {
      int levels[kViewChannels];
      const unsigned char* pixel = pixels + (columns.first()[i] - first) * kViewChannels;
      weigh(columns, i, of.precision_across, levels,
            [&](int t) { return pixel + t * kViewChannels; });
#pragma unroll
      for (int c = 0; c < kViewChannels; ++c) {
        resized[kViewChannels * i + c] = static_cast<unsigned char>(levels[c]);
      }
    }
  }
  __syncthreads();
}

// put(row, column, levels of three channels) of every pixel of the view, once. What the block's
// shared memory holds is needed until the next barrier.
template <class Put>
__device__ inline void resize(const Resize& of, const Put& put) {
  const Weights& rows = of.rows;
  const ResizeTiling& tiling = of.tiling;
  for (int x = 0; x < of.across.output; x += tiling.columns) {
    const int count = min(tiling.columns, of.across.output - x);
    __syncthreads();  // the columns before have been written
    make_weights(of.across, of.precision_across, x, count, of.columns);
    int done = 0;  // rows of the crop that have been resized across
    for (int panel = 0; panel < of.down.output; panel += tiling.panel) {
      const int panel_rows = min(tiling.panel, of.down.output - panel);
      __syncthreads();  // the panel before has been summed down
      make_weights(of.down, of.precision_down, panel, panel_rows, rows);
      __syncthreads();
      int y = 0;  // rows of the panel that have been written
      while (true) {
        int end = y;
        while (end < panel_rows && rows.first()[end] + rows.count()[end] <= done) ++end;
        const Ring held(tiling.ring, max(done - tiling.ring, 0));
        for (int row = y + warp_index(); row < end; row += kWarps) {
          for (int i = lane_index(); i < count; i += 32) {
            int levels[kViewChannels];
            const int first = rows.first()[row];
            weigh(rows, row, of.precision_down, levels, [&](int t) {
              return of.ring() + (held.slot(first + t) * tiling.columns + i) * kViewChannels;
            });
            put(panel + row, x + i, levels);
          }
        }
        y = end;
        if (y == panel_rows) break;
        const int num_rows = min(tiling.rows, of.crop.height - done);
        resize_across(of, done, num_rows, count);
        done += num_rows;
      }
    }
  }
}

// One pixel of a row of the crop, resized across: its weights are made for it alone.
__device__ inline __attribute__((noinline)) void resize_pixel(const Resize& of, int row, int column,
                                                              int* levels) {
  const ResizeTaps taps = resize_taps(of.across, column);
  const double sum = filter_values(of.across, taps).sum;
  const uint8_t* from =
      of.crop.data + row * of.crop.row_stride + static_cast<int64_t>(taps.first) * kViewChannels;
  levels[0] = levels[1] = levels[2] = (1 << of.precision_across) >> 1;
#pragma unroll 1
  for (int t = 0; t < taps.count; ++t, from += kViewChannels) {
    const double weight = div_rn(resize_value(of.across, taps, t), sum);
    const int whole = resize_weight(weight, of.precision_across);
#pragma unroll
    for (int c = 0; c < kViewChannels; ++c) levels[c] += whole * from[c];
  }
#pragma unroll
  for (int c = 0; c < kViewChannels; ++c) {
    levels[c] = resize_rounded(levels[c], of.precision_across);
  }
}

// As resize(), where shared memory has not room for one column (tiling.columns is 0); thread 0
// puts. The block makes a pixel after the other, a thread some rows of the crop, and weights anew
// for each: slow, and right.
template <class Put>
__device__ inline void resize_by_pixels(const Resize& of, const Put& put) {
  const int width = of.across.output;
  for (int at = 0; at < of.down.output * width; ++at) {
    const ResizeTaps taps = resize_taps(of.down, at / width);
    const double sum = filter_values(of.down, taps).sum;
    int sums[kViewChannels] = {0, 0, 0};
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < taps.count; t += kThreads) {
      int levels[kViewChannels];
      resize_pixel(of, taps.first + t, at % width, levels);
      const double weight = div_rn(resize_value(of.down, taps, t), sum);
      const int whole = resize_weight(weight, of.precision_down);
#pragma unroll
      for (int c = 0; c < kViewChannels; ++c) sums[c] += whole * levels[c];
    }
#pragma unroll
    for (int c = 0; c < kViewChannels; ++c) {
      const int total = over_block(sums[c], [](int a, int b) { return a + b; });
      const int start = (1 << of.precision_down) >> 1;
      sums[c] = resize_rounded(start + total, of.precision_down);
    }
    if (threadIdx.x == 0) put(at / width, at % width, sums);
  }
}

}  // namespace m3i::views
