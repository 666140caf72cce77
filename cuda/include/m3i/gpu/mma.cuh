// Products of small matrices by the tensor cores, a warp at a time (sm_80). Device code only.
//
// Lane l holds, with g = l / 4 and q = 2 (l % 4), of the 16-bit product D[16, 8] += A[16, 16] B[16,
// 8]
//   A: {g, q..q+1}, {g+8, q..q+1}, {g, q+8..q+9}, {g+8, q+8..q+9}   row, columns; two in a word,
//   the B: {q..q+1, g}, {q+8..q+9, g}                                    first one in its low half
//   D: (g, q), (g, q+1), (g+8, q), (g+8, q+1)                        float
// and of the tf32 product D[16, 8] += A[16, 8] B[8, 8], with t = l % 4
//   A: (g, t), (g+8, t), (g, t+4), (g+8, t+4)    B: (t, g), (t+4, g)    D: as above
#pragma once

#include "m3i/types.h"

namespace m3i {

// Loads kCount (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory: lane 8i + r gives
// the address of row r of matrix i, 16 bytes, aligned. Word i of lane l is elements 2 (l % 4) and
// the next of row l / 4 of matrix i; of its column, if kTransposed.
template <int kCount, bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&words)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the counts that the hardware loads");
#ifdef M3I_EMULATOR
  emulator::load_matrices(words, kCount, kTransposed, row);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define M3I_LDMATRIX(trans)                                                                  \
  if constexpr (kCount == 1) {                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"             \
                 : "=r"(words[0])                                                            \
                 : "r"(at)                                                                   \
                 : "memory");                                                                \
  } else if constexpr (kCount == 2) {                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(words[0]), "=r"(words[1])                                            \
                 : "r"(at)                                                                   \
                 : "memory");                                                                \
  } else {                                                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])            \
                 : "r"(at)                                                                   \
                 : "memory");                                                                \
  }
  if constexpr (kTransposed) {
    M3I_LDMATRIX(".trans")
  } else {
    M3I_LDMATRIX("")
  }
#undef M3I_LDMATRIX
#endif
}

// D += A B, bfloat16.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef M3I_EMULATOR
  emulator::mma(emulator::Product::kBFloat16, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// D += A B, half.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef M3I_EMULATOR
  emulator::mma(emulator::Product::kHalf, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// D += A B, tf32: floats of which the hardware reads 10 bits of mantissa. Round them first.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef M3I_EMULATOR
  emulator::mma(emulator::Product::kTf32, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// float -> tf32, to nearest, ties away from zero.
__device__ inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
#ifdef M3I_EMULATOR
  memcpy(&bits, &value, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

}  // namespace m3i
