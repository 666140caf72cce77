// Products of matrices in shared memory by a warpgroup: 128 threads, four warps from a multiple of
// four on (sm_90a). Device code only; on other architectures a call traps.
//
//   wgmma_fence(d);                   after d was written, and before the first product
//   for each 16 of k: wgmma<256, BFloat16>(d, a, b);
//   wgmma_commit();                   make them a group
//   wgmma_wait<0>(d);                 until at most 0 groups are under way; d can be read
//
// Between the first and the last of these no thread touches d, and nothing but wgmma names it: in a
// loop that waits for the group before the last, it is wgmma_fence() and wgmma_wait<1>(), without
// d, else ptxas waits after every product. What threads stored in shared memory is visible to a
// product after their fence_proxy_async() and then a barrier.
//
// Thread t, with w = t / 32 and l = t % 32, holds two neighbours of a row of D and the two that lie
// eight rows below in each four registers:
//   d[4j], d[4j+1], d[4j+2], d[4j+3]: row 16w + l/4 (+ 8), columns 8j + 2 (l%4) and the next
// and of A[64, 16], in the same row and the one eight below, two neighbours in k in each word:
//   a[0], a[1] (+ 8 rows): k = 2 (l%4) and the next     a[2], a[3] (+ 8 rows): k + 8
#pragma once

#include "m3i/gpu/proxy.cuh"
#include "m3i/gpu/swizzle.h"

namespace m3i {

// Which index is contiguous in shared memory: K, or that of A's rows (M) or B's columns (N).
enum class Major { kK = 0, kMN = 1 };

// Describes an operand: its first byte, aligned to 16 (the pattern of a swizzle starts at a
// multiple of its eight rows), and two strides in bytes.
//                     leading                                stride
//   K, no swizzle     to the next 8 of k                     to the next 8 rows
//   K, swizzle        not used                               to the next 8 rows
//   MN, no swizzle    to the next 8 of k                     to the next 8 rows
//   MN, swizzle       to the next swizzle_bytes / 2 rows     to the next 8 of k
__device__ inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                            uint32_t stride_bytes, Swizzle swizzle) {
#ifdef M3I_EMULATOR
  const uint32_t start = emulator::shared_offset(shared);
#else
  const uint32_t start = shared_address(shared);
#endif
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return field(start) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// The operand that begins so many bytes, a multiple of 16, further on.
__device__ inline uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Holds the compiler to the order of accesses of registers around a product.
template <int kCount>
__device__ inline void wgmma_hold([[maybe_unused]] float (&registers)[kCount]) {
#ifndef M3I_EMULATOR
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
#endif
}

// Before a product, if its accumulators, or A's registers, were written or read since the last one.
template <int... kCounts>
__device__ inline void wgmma_fence(float (&... accumulators)[kCounts]) {
  (wgmma_hold(accumulators), ...);
#ifdef M3I_EMULATOR
  emulator::wgmma_fence();
#else
  M3I_ASM_90A("wgmma.fence.sync.aligned;" :: : "memory");
#endif
}

__device__ inline void wgmma_commit() {
#ifdef M3I_EMULATOR
  emulator::wgmma_commit();
#else
  M3I_ASM_90A("wgmma.commit_group.sync.aligned;" :: : "memory");
#endif
}

// Until at most kGroups groups are under way; the accumulators of the others can be read then.
template <int kGroups, int... kCounts>
__device__ inline void wgmma_wait(float (&... accumulators)[kCounts]) {
  static_assert(0 <= kGroups && kGroups <= 7, "the counts that the instruction takes");
#ifdef M3I_EMULATOR
  emulator::wgmma_wait(kGroups);
#else
  M3I_ASM_90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
  (wgmma_hold(accumulators), ...);
}

#ifdef M3I_EMULATOR

template <int kColumns, class T, Major kA = Major::kK, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                             bool accumulate = true) {
  constexpr auto kKind =
      kDType<T> == DType::kFloat16 ? emulator::Product::kHalf : emulator::Product::kBFloat16;
  emulator::wgmma(d,
                  {kKind, kColumns, accumulate, kA == Major::kMN, kB == Major::kMN, a, b, nullptr});
}

template <int kColumns, class T, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                             bool accumulate = true) {
  constexpr auto kKind =
      kDType<T> == DType::kFloat16 ? emulator::Product::kHalf : emulator::Product::kBFloat16;
  emulator::wgmma(d, {kKind, kColumns, accumulate, false, kB == Major::kMN, 0, b, a});
}

#else

// The registers of an accumulator of 32, 64, .. columns: as the text of an instruction names them,
// the numbers of the seven operands after them, and as operands.
#define M3I_TEXT_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define M3I_TEXT_64 M3I_TEXT_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define M3I_TEXT_96 M3I_TEXT_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define M3I_TEXT_128 M3I_TEXT_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define M3I_TEXT_160 M3I_TEXT_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define M3I_TEXT_192 M3I_TEXT_160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define M3I_TEXT_224 \
  M3I_TEXT_192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define M3I_TEXT_256                         \
  M3I_TEXT_224                               \
  ",%112,%113,%114,%115,%116,%117,%118,%119" \
  ",%120,%121,%122,%123,%124,%125,%126,%127"

#define M3I_AFTER_32 "%16", "%17", "%18", "%19", "%20", "%21", "%22"
#define M3I_AFTER_64 "%32", "%33", "%34", "%35", "%36", "%37", "%38"
#define M3I_AFTER_96 "%48", "%49", "%50", "%51", "%52", "%53", "%54"
#define M3I_AFTER_128 "%64", "%65", "%66", "%67", "%68", "%69", "%70"
#define M3I_AFTER_160 "%80", "%81", "%82", "%83", "%84", "%85", "%86"
#define M3I_AFTER_192 "%96", "%97", "%98", "%99", "%100", "%101", "%102"
#define M3I_AFTER_224 "%112", "%113", "%114", "%115", "%116", "%117", "%118"
#define M3I_AFTER_256 "%128", "%129", "%130", "%131", "%132", "%133", "%134"

#define M3I_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define M3I_D16(i) M3I_D4(i), M3I_D4(i + 4), M3I_D4(i + 8), M3I_D4(i + 12)
#define M3I_D_32 M3I_D16(0)
#define M3I_D_64 M3I_D_32, M3I_D16(16)
#define M3I_D_96 M3I_D_64, M3I_D16(32)
#define M3I_D_128 M3I_D_96, M3I_D16(48)
#define M3I_D_160 M3I_D_128, M3I_D16(64)
#define M3I_D_192 M3I_D_160, M3I_D16(80)
#define M3I_D_224 M3I_D_192, M3I_D16(96)
#define M3I_D_256 M3I_D_224, M3I_D16(112)

// The instruction: d, a, b, whether to accumulate, the signs of a and b, which of them are
// MN-major.
#define M3I_WGMMA_TEXT(columns, type, a, b, p, ...)                                        \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
  "k16.f32." type "." type " {" M3I_TEXT_##columns "}, " a ", " b ", p, 1, 1, " __VA_ARGS__ ";\n}"
#define M3I_UNPACK(macro, ...) macro(__VA_ARGS__)
#define M3I_SHARED_TEXT(columns, type, a, b, p, trans_a, trans_b, ...) \
  M3I_WGMMA_TEXT(columns, type, a, b, p, trans_a ", " trans_b)
#define M3I_REGISTERS_TEXT(columns, type, a0, a1, a2, a3, b, p, trans_b) \
  M3I_WGMMA_TEXT(columns, type, "{" a0 ", " a1 ", " a2 ", " a3 "}", b, p, trans_b)

#define M3I_SHARED(columns, type)                                                                 \
  M3I_ASM_90A(                                                                                    \
      M3I_UNPACK(M3I_SHARED_TEXT, columns, type, M3I_AFTER_##columns) : M3I_D_##columns : "l"(a), \
      "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),                       \
      "n"(static_cast<int>(kB)))
#define M3I_REGISTERS(columns, type)                                                      \
  M3I_ASM_90A(M3I_UNPACK(M3I_REGISTERS_TEXT, columns, type,                               \
                         M3I_AFTER_##columns) : M3I_D_##columns : "r"(a[0]),              \
              "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
              "n"(static_cast<int>(kB)))

#define M3I_CASE(product, columns)                \
  if constexpr (kColumns == columns) {            \
    if constexpr (kDType<T> == DType::kFloat16) { \
      product(columns, "f16");                    \
    } else {                                      \
      product(columns, "bf16");                   \
    }                                             \
  }
#define M3I_CASES(product)                                                                    \
  static_assert(kColumns % 32 == 0 && 32 <= kColumns && kColumns <= 256, "not written down"); \
  static_assert(kDType<T> == DType::kFloat16 || kDType<T> == DType::kBFloat16, "16 bits");    \
  M3I_CASE(product, 32)                                                                       \
  M3I_CASE(product, 64)                                                                       \
  M3I_CASE(product, 96)                                                                       \
  M3I_CASE(product, 128)                                                                      \
  M3I_CASE(product, 160)                                                                      \
  M3I_CASE(product, 192)                                                                      \
  M3I_CASE(product, 224)                                                                      \
  M3I_CASE(product, 256)

// D[64, kColumns] += A[64, 16] B[16, kColumns], or D = A B; T is BFloat16 or Float16. Every thread
// of the warpgroup gives the same descriptors.
template <int kColumns, class T, Major kA = Major::kK, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                             bool accumulate = true) {
  M3I_CASES(M3I_SHARED)
}

// As above, A in the threads' registers. They are not written until wgmma_wait.
template <int kColumns, class T, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                             bool accumulate = true) {
  M3I_CASES(M3I_REGISTERS)
}

#endif  // M3I_EMULATOR

}  // namespace m3i
