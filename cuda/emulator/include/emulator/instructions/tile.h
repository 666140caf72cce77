// Asynchronous copies and tensor-core products, for the wrappers in m3i/. Reports name the
// wrapper's caller by its address.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

// The copy lands when the thread waits for its group: until then the destination has its old bytes,
// and an access to it is reported.
M3I_EMULATOR_API void copy_async(void* to, const void* from, int bytes, bool inside);
M3I_EMULATOR_API void copy_async_commit();
M3I_EMULATOR_API void copy_async_wait(int groups);

M3I_EMULATOR_API void load_matrices(uint32_t* words, int count, bool transposed, const void* row);

// m16n8k16 of 16-bit types, m16n8k8 of tf32; summed in float, in the order of k.
enum class Product { kBFloat16, kHalf, kTf32 };
M3I_EMULATOR_API void mma(Product kind, float* d, const uint32_t* a, const uint32_t* b);

M3I_EMULATOR_API void red_add(float* to, const float* values, int size);

}  // namespace m3i::emulator
