// dcnv3, device code: the units that a warp works through, chunk by chunk of their points.
#pragma once

#include "dcnv3/sm80/points.cuh"
#include "m3i/gpu/shared.cuh"

namespace m3i::dcnv3 {

// A warp's units of one image, and this lane's part in them.
struct Units {
  int64_t image, first;  // of the warp's units
  int count;             // those that exist; 0 in a warp past the end of the image
  int own;               // this lane's unit, counted from the first
  int lane;              // within the unit
  bool exists;

  // `warps`: of the block, known to the compiler.
  __device__ Units(const Dcnv3Shape& shape, const Tiling& tiling, int warps, int64_t image,
                   int64_t block)
      : image(image) {
    const int in_warp = threadIdx.x % kWarpLanes;
    first = (block * warps + threadIdx.x / kWarpLanes) * tiling.units;
    const int64_t left = units_per_image(shape) - first;
    count = left <= 0 ? 0 : left < tiling.units ? static_cast<int>(left) : tiling.units;
    own = in_warp / tiling.lanes;
    lane = in_warp % tiling.lanes;
    exists = own < count;
  }

  // The number of the warp's unit in its image, and what it is past that of the first.
  __device__ int64_t index(int unit) const { return first + unit; }
  __device__ int past_first(int unit) const { return unit; }
  __device__ bool has(int unit) const { return unit < count; }
};

// Makes points of units, in shared memory.
template <class T>
class PointMaker {
 public:
  using A = Accumulator<T>;

  __device__ PointMaker(const Dcnv3Shape& shape, const Tiling& tiling, const void* offset,
                        const void* mask, const Workspace<A>& work)
      : shape(shape),
        tiling(tiling),
        offset(static_cast<const T*>(offset)),
        mask(static_cast<const T*>(mask)),
        work(work) {}

  // Bases and softmax of the warp's units. All lanes come, also those without a unit.
  template <class Units>
  __device__ void begin(const Units& units) {
    Origin<A> origin{};
    if (units.exists) origin = make_origin<A>(shape, units.index(units.own));
    if (shape.softmax) {
      normalise(mask + points_begin(shape, units.image, units.index(units.own)), shape.points,
                units.exists, units.lane, tiling.lanes, origin);
    }
    if (units.exists && units.lane == 0) work.origins[units.own] = origin;
    __syncwarp();
  }

  // Points [first, first + count) of the units, to be read after it. All threads of the block come.
  // keep(slot, x, y, inside) is called with each point's upper left corner.
  template <class Units, class Keep>
  __device__ void make(const Units& units, int64_t first, int count, const Keep& keep) {
    if (first != filled) {
      __syncthreads();
      if (threadIdx.x < static_cast<unsigned>(count)) {
        work.steps[threadIdx.x] = make_step<A>(shape, first + threadIdx.x);
      }
      __syncthreads();
      filled = first;
    }
    __syncwarp();
    const int64_t begin = points_begin(shape, units.image, units.index(0));
    make_points(shape, tiling, offset + 2 * begin, mask + begin, first, count, units, work, keep);
    __syncwarp();
  }
  template <class Units>
  __device__ void make(const Units& units, int64_t first, int count) {
    make(units, first, count, [](int, int, int, unsigned) {});
  }

 private:
  const Dcnv3Shape& shape;
  const Tiling& tiling;
  const T* offset;
  const T* mask;
  const Workspace<A>& work;
  int64_t filled = -1;  // the first of the steps in shared memory
};

// body(units) for all that this block works through; the same number of times in all its threads.
template <int kThreads, class Body>
__device__ inline void for_each_units(const Dcnv3Shape& shape, const Tiling& tiling,
                                      const Body& body) {
  for (int64_t image = blockIdx.y; image < shape.batch; image += gridDim.y) {
    for (int64_t block = blockIdx.x; block < tiling.blocks; block += gridDim.x) {
      body(Units(shape, tiling, kThreads / kWarpLanes, image, block));
    }
  }
}

// body(first, count) for all chunks of a unit's points.
template <class Body>
__device__ inline void for_each_chunk(const Dcnv3Shape& shape, const Tiling& tiling,
                                      const Body& body) {
  for (int64_t first = 0; first < shape.points; first += tiling.chunk) {
    const int64_t left = shape.points - first;
    body(first, left < tiling.chunk ? static_cast<int>(left) : tiling.chunk);
  }
}

}  // namespace m3i::dcnv3
