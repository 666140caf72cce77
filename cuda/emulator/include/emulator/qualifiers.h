// CUDA's qualifiers of functions and variables, for g++.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

// One copy, used by one block after another; the runtime clears it between them. The module's
// thread-local variables are then exactly its shared variables, with known addresses, sizes and
// names. (`extern __shared__` does not compile; m3i/gpu/shared.cuh replaces it.)
#define __shared__ static thread_local

// The bound is kept as that many no-operation instructions before the kernel, and 2048 for each
// block that a multiprocessor is to hold: the one attribute of g++ that puts a constant expression
// where the runtime can find it. The sum makes it evaluate the expression.
#define M3I_EMULATOR_BOUND(threads, blocks, ...) \
  __attribute__((                                \
      patchable_function_entry((threads) + 2048 * (blocks), (threads) + 2048 * (blocks))))
#define __launch_bounds__(...) M3I_EMULATOR_BOUND(__VA_ARGS__, 0, 0)
