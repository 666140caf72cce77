// dcnv3: device code.
//
//   out[n, oy, ox, g, :] = sum over k of m_k sample(x[n, :, :, g, :], place_k); see params.h
//
// Work: a point (one k of one output pixel and group) has a place, four bilinear weights and a mask
// that all D channels of its group share, and then 8 flops a channel. Lanes of a warp that work on
// one pixel and group (a unit, tiling.h) therefore make the points together, each point in
// one lane, with neighbouring lanes reading neighbouring offsets, and pass them on through shared
// memory; the softmax is a reduction over the unit's lanes. Each lane then gathers 16 bytes of
// every corner. Warps do not wait for each other, except where a kernel has more points than the
// warp's part of shared memory (288), which then go through it in chunks.
//
// Forward: x, offset, mask and out cross memory once, s N H W C (2 + 3 K / D) bytes for elements of
// s bytes and stride 1. For N = 64, 56 x 56 x 128, D = 16, K = 9, fp16: 189.5 MB, 57 us at 3.35
// TB/s; 8 K N H W C = 1.85 Gflop, 31 us at 60 TFLOP/s; 4 K s N H W C = 1.85 GB from the first-level
// cache, 62 us at 128 bytes a clock and multiprocessor of an H100. Memory, cache and issue slots
// lie close together, so what counts are instructions and cache accesses a point. A point is one
// access of 16 bytes of shared memory (place and mask; the products of weights are computed again:
// 6 flops are cheaper than 16 bytes more), and a byte that says which corners lie in the image;
// where all do, as nearly everywhere, the loads have no condition.
//
// Nine points and groups of 16 or 32 channels, which all models' layers have, are computed by a
// kernel of their own (nine.cuh). A warp's 16 units of 16 channels in a half type take it 878
// instructions on sm_80 and 890 on sm_90a, with the softmax 909 and 921, where the general kernel
// issues about 1,980: 9 x 64 of them widen and add what is read, in float32.
//
// Backward: grad_out, x, offset and mask are read, their gradients written, and that of x is summed
// in float32: for the same call 327 MB and 98 us if the sum stays in cache, 533 MB and 159 us if
// not. Gradients by offset and mask are dot products over channels: shuffles over the unit's lanes,
// no atomics, stored in the tensors' own type. The gradient by x is summed in float32; one pass
// rounds it where x is a half type. What that costs are requests: added point by point it is 72
// sectors of reductions a pixel and group (D = 16), 116 million of the call above, where lanes hold
// neighbouring channels, and up to 8 times as many where they do not. So where groups fill 32
// lanes and the stride is 1 a warp sums in a window of pixels in shared memory (window.cuh), with
// a lane a channel, and adds each of its pixels once: 4 sectors a pixel and group in strips of 8 x
// 14 outputs, and two more for each corner outside of the window. Elsewhere scatter.cuh adds point
// by point, by lanes of neighbouring channels.
//
// Tiles (tiles.json): 4 warps a block, so that 7 x 7 pixels of 32 groups leave half of the last of
// 25 blocks idle. Rejected, by counting, not by measurement:
//   one thread a channel: every point is computed D times;
//   8 warps a block: the same code, but twice the idle tail on small images;
//   blends in packed halves with sums in float32: half of those 9 x 64, but, computed so in torch,
//     twice the error (root mean square), and more than plain torch's;
//   points passed on by shuffles: four a point against one access, each as wide as that access;
//   a tile of x with a halo in shared memory: offsets of a trained layer leave any halo that fits,
//     so that every corner would test for both paths;
//   a window of a whole block's: its warps would need shared atomics, which are loops in float32;
//   a window of 14 x 14 pixels for 8 x 8 outputs instead of rows that follow the warp: twice the
//     shared memory, and 3.1 pixels added for each output instead of 2.3.
#pragma once

#include "dcnv3/sm80/bwd.cuh"
#include "dcnv3/sm80/fixed.cuh"
#include "dcnv3/sm80/fwd.cuh"
#include "dcnv3/sm80/nine.cuh"
#include "dcnv3/sm80/window.cuh"
