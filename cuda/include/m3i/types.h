// Types for host, device and NVRTC code: fixed-width integers and the element types of tensors.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no <cstdint>
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define M3I_HOST_DEVICE __host__ __device__
#else
#define M3I_HOST_DEVICE
#endif

namespace m3i {

// The bits of a bfloat16, for storage only; bf16.h converts them.
struct alignas(2) BFloat16 {
  uint16_t bits;
};

// The bits of an IEEE half, for storage only.
struct alignas(2) Float16 {
  uint16_t bits;
};

// The element types of a launch, known at run time.
enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The DType of an element type.
template <class T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<Float16> = DType::kFloat16;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;

// A value that carries a type, to pass it to a generic lambda.
template <class T>
struct Type {
  using type = T;
};

}  // namespace m3i
