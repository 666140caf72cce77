// dcnv3 on the CPU: the table of kernels of one instruction set.
//
// An image and a group are a "pair", n * G + g. Its part of x is packed into a plane first: float32
// (float64 for float64), one ring of zeros around the image, the channels padded to whole vectors.
// A bilinear corner is then a plain vector load, in any dtype, for any number of channels, inside
// and outside the image. The copy costs one load and one store where the samples cost four loads a
// point, and is dense where x is strided by the other groups. In the backward the gradient of x is
// summed in such a plane too, in a fixed order: a pair belongs to one thread, so that no two
// threads add to the same element.
//
// A task is a "run" of pairs of one image. They take turns band by band of the output, since a
// cache line of offsets or masks has those of several groups.
#pragma once

#include "dcnv3/params.h"

namespace m3i {

// A run: planes follow each other.
struct Dcnv3Run {
  int64_t first, num_pairs;
};

// Planes and scratch are aligned to 64 bytes; scratch is zeroed before its first use.
struct Dcnv3CpuKernels {
  int64_t (*plane_bytes)(const Dcnv3Shape& shape, DType dtype);
  int64_t (*scratch_bytes)(const Dcnv3Shape& shape, DType dtype);
  // Fills the tables in scratch, once for all pairs.
  void (*prepare)(const Dcnv3Shape& shape, DType dtype, void* scratch);
  // Copies the slices of x of a run's pairs into planes.
  void (*pack)(const Dcnv3Shape& shape, DType dtype, const void* x, Dcnv3Run run, void* planes);
  // Writes rows [row_begin, row_end) of the run's slices of the output.
  void (*forward)(const Dcnv3Params& params, Dcnv3Run run, int64_t row_begin, int64_t row_end,
                  const void* planes, void* scratch);
  // Writes the run's slices of the gradients that are not null. `planes` hold x where that of
  // offset or mask is not null; `grad_planes` are overwritten where that of x is not null.
  void (*backward)(const Dcnv3BwdParams& params, Dcnv3Run run, const void* planes,
                   void* grad_planes, void* scratch);
};

extern const Dcnv3CpuKernels kDcnv3Baseline;
#if defined(__x86_64__)
extern const Dcnv3CpuKernels kDcnv3Avx2;
extern const Dcnv3CpuKernels kDcnv3Avx512;
#endif

}  // namespace m3i
