// dcnv3 on the CPU: the table of kernels of one instruction set.
//
// A task is one image and one group, "pair" n * G + g. Its part of x is packed into a plane first:
// float32 (float64 for float64), one ring of zeros around the image, the channels padded to whole
// vectors. A bilinear corner is then a plain vector load, in any dtype, for any number of channels,
// inside and outside the image. The copy costs one load and one store where the samples cost four
// loads a point, and is dense where x is strided by the other groups. In the backward the gradient
// of x is summed in such a plane too, in a fixed order: a pair belongs to one thread, so that no
// two threads add to the same element.
#pragma once

#include "dcnv3/params.h"

namespace m3i {

// Planes and scratch are aligned to 64 bytes and zeroed before their first use.
struct Dcnv3CpuKernels {
  int64_t (*plane_bytes)(const Dcnv3Shape& shape, DType dtype);
  int64_t (*scratch_bytes)(const Dcnv3Shape& shape, DType dtype);
  // Fills the tables in scratch, once for all pairs.
  void (*prepare)(const Dcnv3Shape& shape, DType dtype, void* scratch);
  // Copies a pair's slice of x into a plane.
  void (*pack)(const Dcnv3Shape& shape, DType dtype, const void* x, int64_t pair, void* plane);
  // Writes rows [row_begin, row_end) of a pair's slice of the output.
  void (*forward)(const Dcnv3Params& params, int64_t pair, int64_t row_begin, int64_t row_end,
                  const void* plane, void* scratch);
  // Writes a pair's slice of the gradients that are not null. `plane` holds x where that of offset
  // or mask is not null; `grad_plane` is overwritten where that of x is not null.
  void (*backward)(const Dcnv3BwdParams& params, int64_t pair, const void* plane, void* grad_plane,
                   void* scratch);
};

extern const Dcnv3CpuKernels kDcnv3Baseline;
#if defined(__x86_64__)
extern const Dcnv3CpuKernels kDcnv3Avx2;
extern const Dcnv3CpuKernels kDcnv3Avx512;
#endif

}  // namespace m3i
