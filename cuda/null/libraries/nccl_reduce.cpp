#include "libraries/nccl_reduce.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace m3i::null {

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static BFloat16 of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (value != value) return {0x7fc0};
    return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

template <typename T, typename Sum>
T rounded(Sum value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16::of(value);
  } else {
    return static_cast<T>(value);
  }
}

template <typename T, typename Sum>
bool reduce_as(const std::vector<const char*>& parts, size_t bytes, ncclRedOp_t operation,
               double scale, char* result) {
  for (size_t i = 0; i < bytes / sizeof(T); ++i) {
    Sum total{};
    for (size_t part = 0; part < parts.size(); ++part) {
      Sum value = static_cast<Sum>(reinterpret_cast<const T*>(parts[part])[i]);
      if (scale != 1) value = static_cast<Sum>(value * scale);
      if (part == 0) {
        total = value;
      } else if (operation == ncclProd) {
        total = static_cast<Sum>(total * value);
      } else if (operation == ncclMax) {
        total = std::max(total, value);
      } else if (operation == ncclMin) {
        total = std::min(total, value);
      } else {
        total = static_cast<Sum>(total + value);
      }
    }
    if (operation == ncclAvg) total = static_cast<Sum>(total / static_cast<Sum>(parts.size()));
    reinterpret_cast<T*>(result)[i] = rounded<T, Sum>(total);
  }
  return true;
}

}  // namespace

size_t bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    default:
      return 1;
  }
}

double number_at(const void* number, ncclDataType_t type) {
  switch (type) {
    case ncclFloat16:
      return static_cast<float>(*static_cast<const _Float16*>(number));
    case ncclBfloat16:
      return static_cast<float>(*static_cast<const BFloat16*>(number));
    case ncclFloat32:
      return *static_cast<const float*>(number);
    case ncclFloat64:
      return *static_cast<const double*>(number);
    default:
      return 1;
  }
}

bool reduce_parts(const std::vector<const char*>& parts, size_t bytes, ncclDataType_t type,
                  ncclRedOp_t operation, double scale, char* result) {
  switch (type) {
    case ncclInt8:
      return reduce_as<int8_t, int8_t>(parts, bytes, operation, scale, result);
    case ncclUint8:
      return reduce_as<uint8_t, uint8_t>(parts, bytes, operation, scale, result);
    case ncclInt32:
      return reduce_as<int32_t, int32_t>(parts, bytes, operation, scale, result);
    case ncclUint32:
      return reduce_as<uint32_t, uint32_t>(parts, bytes, operation, scale, result);
    case ncclInt64:
      return reduce_as<int64_t, int64_t>(parts, bytes, operation, scale, result);
    case ncclUint64:
      return reduce_as<uint64_t, uint64_t>(parts, bytes, operation, scale, result);
    case ncclFloat16:
      return reduce_as<_Float16, float>(parts, bytes, operation, scale, result);
    case ncclBfloat16:
      return reduce_as<BFloat16, float>(parts, bytes, operation, scale, result);
    case ncclFloat32:
      return reduce_as<float, float>(parts, bytes, operation, scale, result);
    case ncclFloat64:
      return reduce_as<double, double>(parts, bytes, operation, scale, result);
    default:
      return false;
  }
}

}  // namespace m3i::null
