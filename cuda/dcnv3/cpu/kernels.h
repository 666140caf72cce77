// dcnv3 on the CPU: the kernels, compiled by each source that includes this for its instruction
// set. Such a source defines M3I_VECTOR_BYTES and may raise the target before.
#pragma once

#include "dcnv3/cpu/channels.h"
#include "dcnv3/cpu/kernel_table.h"
#include "dcnv3/cpu/points.h"
#include "dcnv3/cpu/softmax.h"
#include "m3i/dispatch.h"

namespace m3i {
namespace {

// ---- Strided pixels of any dtype to dense ones, and back ----------------------------------------

// Moves `count` elements in vectors, the last of which may overlap the one before it:
// move(size, first element).
template <class A, class Move>
inline void in_vectors(int64_t count, const Move& move) {
  constexpr int kMost = kLanes<A>;
  const auto cover = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    int64_t i = 0;
    for (; i + kSize < count; i += kSize) move(size, i);
    move(size, count - kSize);
  };
  if (count >= kMost) return cover(std::integral_constant<int, kMost>{});
  if constexpr (kMost >= 16) {
    if (count >= 8) return cover(std::integral_constant<int, 8>{});
  }
  if constexpr (kMost >= 8) {
    if (count >= 4) return cover(std::integral_constant<int, 4>{});
  }
  for (int64_t i = 0; i < count; ++i) move(std::integral_constant<int, 1>{}, i);
}

// Pitches from pixel to pixel are in elements.
template <class T>
void read_pixels(const T* from, int64_t from_pitch, int64_t count, int64_t num_pixels,
                 Accumulator<T>* to, int64_t to_pitch) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel, from += from_pitch, to += to_pitch) {
    in_vectors<Accumulator<T>>(count, [&](auto size, int64_t i) {
      store(to + i, load_wide<decltype(size)::value>(from + i));
    });
  }
}

template <class T>
void write_pixels(const Accumulator<T>* from, int64_t from_pitch, int64_t count, int64_t num_pixels,
                  T* to, int64_t to_pitch) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel, from += from_pitch, to += to_pitch) {
    in_vectors<Accumulator<T>>(count, [&](auto size, int64_t i) {
      constexpr int kSize = decltype(size)::value;
      store_rounded<kSize>(to + i, load<kSize>(from + i));
    });
  }
}

// ---- Tensors of a pair --------------------------------------------------------------------------

// A block of output pixels in the pair's group, one after the other in memory.
struct Block {
  int64_t row, column;  // of the first pixel
  int64_t num_pixels;
  int64_t first;  // the first pixel, counted through [N, Ho, Wo], and group: pixel * G + g
};

template <class Body>
void for_each_block(const Dcnv3Shape& shape, int64_t pair, int64_t row_begin, int64_t row_end,
                    const Body& body) {
  const int64_t most = block_pixels(shape), width = shape.out_width;
  const int64_t image = pair / shape.groups * shape.out_height * width;
  int64_t pixel = row_begin * width;
  while (pixel < row_end * width) {
    // A block of less than a row ends with it.
    const int64_t left = most < width ? width - pixel % width : row_end * width - pixel;
    const int64_t count = left < most ? left : most;
    body(Block{pixel / width, pixel % width, count,
               (image + pixel) * shape.groups + pair % shape.groups});
    pixel += count;
  }
}

// An array that a call goes through once; a unit is an output pixel's part of one group.
struct Stream {
  const void* begin;  // null: none
  int64_t unit_bytes;
};

// Asks for the `part`-th of `parts` of units [begin, end): a stream is read in pieces of a pair,
// which no hardware foresees.
inline void prefetch(const Stream& stream, int64_t begin, int64_t end, int64_t part,
                     int64_t parts) {
  if (!stream.begin) return;
  const int64_t size = (end - begin) * stream.unit_bytes;
  const char* from = static_cast<const char*>(stream.begin) + begin * stream.unit_bytes;
  const char* last = from + size * (part + 1) / parts;
  for (const char* at = from + size * part / parts; at < last; at += kAlignment) {
    __builtin_prefetch(at, 0, 2);
  }
}

// body(pair's number in the run, block): every block of rows [row_begin, row_end), in bands of
// about kBandBytes of offsets and masks. The next band of the streams is fetched meanwhile, if the
// run has most of the groups that lie in it.
template <class T, int kStreams, class Body>
void for_each_band(const Dcnv3Shape& shape, Dcnv3Run run, int64_t row_begin, int64_t row_end,
                   const Stream (&streams)[kStreams], const Body& body) {
  const int64_t row_units = shape.out_width * shape.groups;
  const int64_t first = run.first / shape.groups * shape.out_height;  // row of the image
  const int64_t row_bytes = shape.out_width * run.num_pairs * shape.points * 3 * sizeof(T);
  const int64_t rows = row_bytes < kBandBytes ? kBandBytes / row_bytes : 1;
  const int64_t block_rows = block_pixels(shape) / shape.out_width;
  const int64_t band = block_rows ? round_up(rows, block_rows) : rows;
  const bool ahead = 2 * run.num_pairs >= shape.groups;
  for (int64_t row = row_begin; row < row_end; row += band) {
    const int64_t end = row_end - row < band ? row_end : row + band;
    const int64_t next_end = row_end - end < band ? row_end : end + band;
    for (int64_t i = 0; i < run.num_pairs; ++i) {
      for (int s = 0; ahead && s < kStreams; ++s) {
        prefetch(streams[s], (first + end) * row_units, (first + next_end) * row_units, i,
                 run.num_pairs);
      }
      for_each_block(shape, run.first + i, row, end, [&](const Block& block) { body(i, block); });
    }
  }
}

// Reads offsets and masks of a block; after this points.corners and points.pixel are right.
template <class T>
void read_points(const Dcnv3Shape& shape, const Block& block, const void* offset, const void* mask,
                 const Points<Accumulator<T>>& points) {
  const int64_t size = shape.points, count = block.num_pixels * size;
  read_pixels(static_cast<const T*>(offset) + block.first * 2 * size, shape.groups * 2 * size,
              2 * size, block.num_pixels, points.offset, 2 * size);
  read_pixels(static_cast<const T*>(mask) + block.first * size, shape.groups * size, size,
              block.num_pixels, points.mask, size);
  if (shape.softmax) softmax(block.num_pixels, size, points.mask);
  locate(shape, block.row, block.column, count, points);
}

template <class A, int kSize>
struct Scratch {
  Points<A> points;
  A* pixels;  // [block, pitch] of the output or its gradient

  Scratch(const Dcnv3Shape& shape, Arena& arena)
      : points(take_points<A>(shape, arena)),
        pixels(arena.take<A>(block_pixels(shape) * PlaneLayout<kSize>(shape).pitch)) {}
};

template <class T, int kSize>
void pack_as(const Dcnv3Shape& shape, const T* x, int64_t pair, Accumulator<T>* plane) {
  using A = Accumulator<T>;
  const PlaneLayout<kSize> layout(shape);
  const int64_t channels = shape.groups * shape.group_size;
  const int64_t image = shape.height * shape.width * channels;
  const auto clear = [](A* from, int64_t count) { std::memset(from, 0, count * sizeof(A)); };
  if (layout.pitch != shape.group_size) clear(plane, layout.size);
  // The ring: a row, with the next one's first pixel, then the ends of rows, then what follows.
  clear(plane, layout.row + layout.pitch);
  x += pair / shape.groups * image + pair % shape.groups * shape.group_size;
  for (int64_t row = 0; row < shape.height; ++row) {
    A* to = plane + (row + 1) * layout.row + layout.pitch;
    read_pixels(x + row * shape.width * channels, channels, shape.group_size, shape.width, to,
                layout.pitch);
    clear(to + shape.width * layout.pitch, 2 * layout.pitch);
  }
  const int64_t image_end = (shape.height + 1) * layout.row + layout.pitch;
  clear(plane + image_end, layout.size - image_end);
}

template <class T, int kSize>
void unpack_as(const Dcnv3Shape& shape, const Accumulator<T>* plane, int64_t pair, T* x) {
  const PlaneLayout<kSize> layout(shape);
  const int64_t channels = shape.groups * shape.group_size;
  const int64_t image = shape.height * shape.width * channels;
  x += pair / shape.groups * image + pair % shape.groups * shape.group_size;
  for (int64_t row = 0; row < shape.height; ++row) {
    write_pixels(plane + (row + 1) * layout.row + layout.pitch, layout.pitch, shape.group_size,
                 shape.width, x + row * shape.width * channels, channels);
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

template <class T, int kSize>
void forward_as(const Dcnv3Params& params, Dcnv3Run run, int64_t row_begin, int64_t row_end,
                const Accumulator<T>* planes, void* memory) {
  using A = Accumulator<T>;
  const Dcnv3Shape& shape = params.shape;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<A, kSize> scratch(shape, arena);
  const PlaneLayout<kSize> layout(shape);
  const int64_t points_bytes = shape.points * sizeof(T), pixel_bytes = shape.group_size * sizeof(T);
  const Stream streams[] = {
      {params.offset, 2 * points_bytes}, {params.mask, points_bytes}, {params.out, pixel_bytes}};
  for_each_band<T>(shape, run, row_begin, row_end, streams, [&](int64_t i, const Block& block) {
    read_points<T>(shape, block, params.offset, params.mask, scratch.points);
    sample<A, kSize>(layout, scratch.points, block.num_pixels, shape.points,
                     planes + i * layout.size, scratch.pixels);
    write_pixels(scratch.pixels, layout.pitch, shape.group_size, block.num_pixels,
                 static_cast<T*>(params.out) + block.first * shape.group_size,
                 shape.groups * shape.group_size);
  });
}

// Writes the gradients of a block's offsets and masks, from points.dots.
template <class T>
void write_points(const Dcnv3BwdParams& params, const Block& block,
                  const Points<Accumulator<T>>& points) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t size = shape.points;
  differentiate_points(shape, block.num_pixels * size, points);
  if (params.grad_offset) {
    write_pixels(points.offset, 2 * size, 2 * size, block.num_pixels,
                 static_cast<T*>(params.grad_offset) + block.first * 2 * size,
                 shape.groups * 2 * size);
  }
  if (params.grad_mask) {
    if (shape.softmax) softmax_bwd(block.num_pixels, size, points.mask, points.grad_mask);
    write_pixels(points.grad_mask, size, size, block.num_pixels,
                 static_cast<T*>(params.grad_mask) + block.first * size, shape.groups * size);
  }
}

template <class T, int kSize>
void backward_as(const Dcnv3BwdParams& params, Dcnv3Run run, const Accumulator<T>* planes,
                 Accumulator<T>* grad_planes, void* memory) {
  using A = Accumulator<T>;
  const Dcnv3Shape& shape = params.shape;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<A, kSize> scratch(shape, arena);
  const Points<A>& points = scratch.points;
  const PlaneLayout<kSize> layout(shape);
  if (params.grad_x) std::memset(grad_planes, 0, run.num_pairs * layout.size * sizeof(A));
  const int64_t points_bytes = shape.points * sizeof(T), pixel_bytes = shape.group_size * sizeof(T);
  const Stream streams[] = {{params.offset, 2 * points_bytes},
                            {params.mask, points_bytes},
                            {params.grad_out, pixel_bytes},
                            {params.grad_offset, 2 * points_bytes},
                            {params.grad_mask, points_bytes}};
  for_each_band<T>(shape, run, 0, shape.out_height, streams, [&](int64_t i, const Block& block) {
    read_points<T>(shape, block, params.offset, params.mask, points);
    read_pixels(static_cast<const T*>(params.grad_out) + block.first * shape.group_size,
                shape.groups * shape.group_size, shape.group_size, block.num_pixels, scratch.pixels,
                layout.pitch);
    dispatch_vectors(layout.vectors, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      if (params.grad_offset || params.grad_mask) {
        multiply_corners<A, kSize, kVectors>(layout, points.pixel, block.num_pixels, shape.points,
                                             planes + i * layout.size, scratch.pixels, points.dots);
        write_points<T>(params, block, points);
      }
      if (params.grad_x) {
        scatter<A, kSize, kVectors>(layout, points.pixel, points.corners, block.num_pixels,
                                    shape.points, scratch.pixels, grad_planes + i * layout.size);
      }
    });
  });
  for (int64_t i = 0; params.grad_x && i < run.num_pairs; ++i) {
    unpack_as<T, kSize>(shape, grad_planes + i * layout.size, run.first + i,
                        static_cast<T*>(params.grad_x));
  }
}

// ---- From run-time types and sizes --------------------------------------------------------------

// Calls body(Type<T>{}, std::integral_constant<int, size>{}) for the widest vectors, of at least
// four elements, that a group fills by more than half.
template <class Body>
auto dispatch(const Dcnv3Shape& shape, DType dtype, const Body& body) {
  return dispatch_dtype<float, BFloat16, Float16, double>(dtype, [&](auto type) {
    constexpr int kMost = kLanes<Accumulator<typename decltype(type)::type>>;
    if constexpr (kMost >= 16) {
      if (shape.group_size > 8) return body(type, std::integral_constant<int, 16>{});
    }
    if constexpr (kMost >= 8) {
      if (shape.group_size > 4) return body(type, std::integral_constant<int, 8>{});
    }
    return body(type, std::integral_constant<int, 4>{});
  });
}

inline int64_t plane_bytes(const Dcnv3Shape& shape, DType dtype) {
  return dispatch(shape, dtype, [&](auto type, auto size) {
    using A = Accumulator<typename decltype(type)::type>;
    return PlaneLayout<decltype(size)::value>(shape).size * static_cast<int64_t>(sizeof(A));
  });
}

inline int64_t scratch_bytes(const Dcnv3Shape& shape, DType dtype) {
  return dispatch(shape, dtype, [&](auto type, auto size) {
    Arena arena{nullptr};
    Scratch<Accumulator<typename decltype(type)::type>, decltype(size)::value>(shape, arena);
    return arena.used;
  });
}

inline void prepare(const Dcnv3Shape& shape, DType dtype, void* scratch) {
  dispatch(shape, dtype, [&](auto type, auto) {
    using A = Accumulator<typename decltype(type)::type>;
    Arena arena{static_cast<char*>(scratch)};
    fill_tables(shape, take_points<A>(shape, arena));
  });
}

inline void pack(const Dcnv3Shape& shape, DType dtype, const void* x, Dcnv3Run run, void* planes) {
  dispatch(shape, dtype, [&](auto type, auto size) {
    using T = typename decltype(type)::type;
    constexpr int kSize = decltype(size)::value;
    for (int64_t i = 0; i < run.num_pairs; ++i) {
      pack_as<T, kSize>(shape, static_cast<const T*>(x), run.first + i,
                        static_cast<Accumulator<T>*>(planes) + i * PlaneLayout<kSize>(shape).size);
    }
  });
}

inline void forward(const Dcnv3Params& params, Dcnv3Run run, int64_t row_begin, int64_t row_end,
                    const void* planes, void* scratch) {
  dispatch(params.shape, params.dtype, [&](auto type, auto size) {
    using T = typename decltype(type)::type;
    forward_as<T, decltype(size)::value>(params, run, row_begin, row_end,
                                         static_cast<const Accumulator<T>*>(planes), scratch);
  });
}

inline void backward(const Dcnv3BwdParams& params, Dcnv3Run run, const void* planes,
                     void* grad_planes, void* scratch) {
  dispatch(params.shape, params.dtype, [&](auto type, auto size) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    backward_as<T, decltype(size)::value>(params, run, static_cast<const A*>(planes),
                                          static_cast<A*>(grad_planes), scratch);
  });
}

constexpr Dcnv3CpuKernels kDcnv3Kernels = {&plane_bytes, &scratch_bytes, &prepare,
                                           &pack,        &forward,       &backward};

}  // namespace
}  // namespace m3i
