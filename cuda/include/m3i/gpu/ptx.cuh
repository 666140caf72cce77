// What the wrappers of PTX instructions share. Device code only.
#pragma once

#include "m3i/types.h"

// An instruction of compute capability 9.0: a kernel compiled for less traps where it comes to one.
// M3I_ASM_90A is for those that only sm_90a has.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define M3I_ASM_90(...) asm volatile(__VA_ARGS__)
#else
#define M3I_ASM_90(...) __trap()
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define M3I_ASM_90A(...) asm volatile(__VA_ARGS__)
#else
#define M3I_ASM_90A(...) __trap()
#endif

#ifndef M3I_EMULATOR
namespace m3i {

// The address inside the shared memory of the own block.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace m3i
#endif
