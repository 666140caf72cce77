// dcnv3: device code.
//
//   out[n, oy, ox, g, :] = sum over k of m_k sample(x[n, :, :, g, :], place_k); see dcnv3_params.h
//
// Work: a point (one k of one output pixel and group) has a place, four bilinear weights and a mask
// that all D channels of its group share, and then 8 flops a channel. Lanes of a warp that work on
// one pixel and group (a unit, dcnv3_tiling.h) therefore make the points together, each point in
// one lane, with neighbouring lanes reading neighbouring offsets, and pass them on through shared
// memory; the softmax is a reduction over the unit's lanes. Each lane then gathers 16 bytes of
// every corner. Warps do not wait for each other, except where a kernel has more points than the
// warp's part of shared memory (288), which then go through it in chunks.
//
// Bytes, forward: x, offset, mask and out once, s N H W C (2 + 3 K / D) for elements of s bytes and
// stride 1. For N = 64, 56 x 56 x 128, D = 16, K = 9, fp16: 189.5 MB, 57 us at 3.35 TB/s. Flops:
// 8 K N H W C = 1.8 G, 31 us on the 60 TFLOP/s of an H100's FMA units counted as one FMA each. From
// the first-level cache: 4 K s N H W C = 1.85 GB, 62 us at 128 bytes a clock and multiprocessor.
// So memory, cache and issue slots lie close together: what is worth saving are instructions and
// cache accesses a point. A point is one shared-memory access of 16 bytes (place and mask; the four
// products of weights are recomputed: 6 flops are cheaper than 16 bytes more) and a byte that says
// which corners lie in the image; where all do, nearly everywhere, the loads have no condition.
//
// Bytes, backward: x, offset, mask, grad_out read, their gradients written, and grad_x summed in
// float32: 327 MB and 98 us for the same call if that sum stayed in cache, 533 MB and 159 us if
// not. Gradients by offset and mask are dot products over channels: shuffles over the unit's lanes,
// no atomics, stored in the tensors' own type. The gradient by x is added by red instructions, one
// of 16 bytes on compute capability 9.0, four before, to a float32 array; one pass rounds it where
// x is a half type.
//
// Tiles: 4 warps a block, so that 7 x 7 pixels of 32 groups fill the last of their 25 blocks by
// half. Rejected, by counting, not by measurement:
//   one thread a channel (as the operator's first kernels): every point is computed D times;
//   8 warps a block: the same code, but twice the idle tail on small images;
//   points passed by shuffles: 4 a point against one access, and units of other than a warp's lanes
//     need more registers than lanes have;
//   a tile of x with a halo in shared memory: 14 x 14 pixels and D = 32 in float32 are 25 KB for a
//     halo of 3, which offsets of a trained layer leave, so that every corner tests both paths;
//   a shared-memory tile for the gradient by x, the same, and its flush is an atomic again.
#pragma once

#include "dcnv3/dcnv3_bwd.cuh"
#include "dcnv3/dcnv3_fixed.cuh"
#include "dcnv3/dcnv3_fwd.cuh"
