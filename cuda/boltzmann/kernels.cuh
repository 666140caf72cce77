// boltzmann: device code; what is computed stands in params.h.
//
// C = z_hat z^T is made in tiles of 128 x 128 (64 x 64 in float64) by the tensor cores, and used up
// while it lies in the registers: its maxima, its exponentials' sums, or the gradient G by its
// logits. Sums of patches of tiles (tiling.h), and what blocks of G leave behind, are reduced in a
// fixed order, so results repeat bit for bit. The memory beside inputs and outputs is a block of G,
// 34 MB at most (67 in float64) whatever N and M are, and in the forward the patches' sums: 2 to 3
// KiB a row, 84 MB at N = M = 32,768.
//
// For N = M = 32,768 and D = 512 in bfloat16, on an A100 (312 TFLOP/s, 1,555 GB/s, 1.41 GHz):
//   sums   2 N M D = 1.10 Tflop                                                 3.52 ms
//          N M exponentials, 16 a clock and multiprocessor, beside other warps' products  0.44 ms
//          N M D / 32 = 17.2 GB of tiles from the second-level cache, 5,120 bytes a clock  2.4 ms
//          shared memory: 384 clocks for the 512 that the products of 32 terms take
//   grads  6 N M D = 3.30 Tflop: C again, then G z and G^T z_hat                10.6 ms
//          G, 2 bytes an element, is written once and read once by each product, a block of
//          25 MB (34 on compute capability 9.0) at a time, so that most of it comes from the
//          second-level cache: 6.4 GB that memory would take 4.1 ms for
// Both are bound by the tensor cores. In float32 each product is three in tf32, of a half of that
// rate: 6 times as long. float64 runs on the ordinary units, for tests and small problems.
//
// Precision: logits, exponentials, sums and G are float32, and G is rounded to the features' type
// once, after the target is taken off: rounded before, the gradient of a pair that is nearly
// certain would be all error. The sums of G and of G C are taken of what is not rounded.
//
// Rejected, by counting, not by measurement:
//   gradients in registers, as in fused attention: 128 x 512 sums in float32 are the whole register
//     file; a pass for each of them instead makes C twice, five products for four;
//   G for all rows and columns at once: 2 N M bytes of memory, and none of it cached;
//   sums in the order that blocks end in, by atomic operations: other bits at every run;
//   eight warps of 64 x 32: shared memory would take as long as the products;
//   a persistent grid: on sm_80 the other block of the multiprocessor computes while this one
//     waits, and the grids' last waves, partly idle, are 6 % of the gradients' time.
#pragma once

#include "boltzmann/sm80/grads.cuh"
#include "boltzmann/sm80/rows.cuh"
#include "boltzmann/sm80/sums.cuh"
#include "boltzmann/sm80/vectors.cuh"
#include "boltzmann/sm90/grads.cuh"
#include "boltzmann/sm90/sums.cuh"
