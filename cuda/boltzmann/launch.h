// boltzmann: shared by the launchers of sm80/launch.cu and sm90/launch.cu. No torch.
//
// A `tile` has one entry in the partial sums, and a `block` counts its rows and columns in tiles.
#pragma once

#include "boltzmann/op.h"
#include "boltzmann/sm80/grads.cuh"
#include "m3i/dispatch.h"
#include "m3i/host/device.h"
#include "m3i/host/launch.h"

#include <algorithm>

namespace m3i::boltzmann {

// Arrays in the scratch memory, one after the other, each aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* begin) : begin_(static_cast<unsigned char*>(begin)) {}

  void* take(int64_t bytes) {
    void* piece = begin_ ? begin_ + used_ : nullptr;
    used_ += divide_up(bytes, 128) * 128;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* begin_;
  int64_t used_ = 0;
};

struct GradsMemory {
  GradsScratch tiles;
  void* total;  // float64: the gradient by the scale so far
};

inline GradsMemory take_grads_memory(Scratch& scratch, const BoltzmannGradsParams& params,
                                     const Blocks& blocks, const Tile& tile) {
  const DType dtype = params.input.dtype;
  const int64_t elements = blocks.rows * blocks.columns;
  GradsMemory memory;
  memory.total = scratch.take(sizeof(double));
  memory.tiles.logit_grads = scratch.take(elements * bytes_of(dtype));
  memory.tiles.scale_grads =
      scratch.take(elements / (tile.rows * tile.columns) * wide_bytes(dtype));
  const int64_t bytes = elements * wide_bytes(dtype);
  memory.tiles.partials = {params.values ? scratch.take(bytes / tile.columns) : nullptr,
                           params.grad_bias ? scratch.take(bytes / tile.rows) : nullptr};
  return memory;
}

// Calls body(block) for each block in turn, or for one without tiles if there is none.
template <class Body>
cudaError_t for_blocks(const BoltzmannInput& input, const Blocks& blocks, const Tile& tile,
                       const Body& body) {
  for (int64_t down = 0; down < std::max<int64_t>(blocks.down, 1); ++down) {
    for (int64_t across = 0; across < std::max<int64_t>(blocks.across, 1); ++across) {
      const cudaError_t error =
          body(make_block(blocks, tile, input.rows, input.columns, down, across));
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

// Reduces sums over rows and over columns, of `kinds` each.
cudaError_t launch_reduction(const BoltzmannInput& input, const Reduction& rows,
                             const Reduction& columns, int kinds, cudaStream_t stream);

// *to = sum of from[0..count).
cudaError_t launch_total(const double* from, int64_t count, double* total, float* to,
                         const bool* run, cudaStream_t stream);

// ---- By warpgroups (sm90/launch.cu) --------------------------------------------------------

bool takes_warpgroups(const BoltzmannSumsParams& params);
bool takes_warpgroups(const BoltzmannGradsParams& params);
int64_t hopper_scratch_bytes(const BoltzmannSumsParams& params);
int64_t hopper_scratch_bytes(const BoltzmannGradsParams& params);
cudaError_t launch_hopper(const BoltzmannSumsParams& params, void* scratch, cudaStream_t stream);
cudaError_t launch_hopper(const BoltzmannGradsParams& params, void* scratch, cudaStream_t stream);

}  // namespace m3i::boltzmann
