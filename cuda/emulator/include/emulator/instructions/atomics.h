// Atomic operations, for the types that CUDA has them for. One thread runs at a time, so that a
// plain update is atomic; it is marked as atomic for the race check.
#pragma once

#include "emulator/numbers/vector_types.h"
#include "emulator/runtime.h"

namespace m3i::emulator {

template <class T, class Update>
M3I_EMULATOR_ACCESS T update(T* at, Update change) {
  check_access(at, sizeof(T), Access::kUpdate, __builtin_return_address(0));
  const T before = *at;
  *at = change(before);
  return before;
}

}  // namespace m3i::emulator

#define M3I_EMULATOR_ATOMIC(name, type, expression)                            \
  __attribute__((always_inline)) inline type name(type* at, type value) {      \
    return m3i::emulator::update(                                              \
        at, [&]([[maybe_unused]] type before) -> type { return expression; }); \
  }
// Block and system scope, which do not differ here.
#define M3I_EMULATOR_ATOMICS(name, type, expression)  \
  M3I_EMULATOR_ATOMIC(name, type, expression)         \
  M3I_EMULATOR_ATOMIC(name##_block, type, expression) \
  M3I_EMULATOR_ATOMIC(name##_system, type, expression)

#define M3I_EMULATOR_INTEGER_ATOMICS(type)                               \
  M3I_EMULATOR_ATOMICS(atomicAdd, type, before + value)                  \
  M3I_EMULATOR_ATOMICS(atomicExch, type, value)                          \
  M3I_EMULATOR_ATOMICS(atomicMin, type, before < value ? before : value) \
  M3I_EMULATOR_ATOMICS(atomicMax, type, before > value ? before : value) \
  M3I_EMULATOR_ATOMICS(atomicAnd, type, before& value)                   \
  M3I_EMULATOR_ATOMICS(atomicOr, type, before | value)                   \
  M3I_EMULATOR_ATOMICS(atomicXor, type, before ^ value)

M3I_EMULATOR_INTEGER_ATOMICS(int)
M3I_EMULATOR_INTEGER_ATOMICS(unsigned)
M3I_EMULATOR_INTEGER_ATOMICS(unsigned long long)
M3I_EMULATOR_ATOMICS(atomicSub, int, before - value)
M3I_EMULATOR_ATOMICS(atomicSub, unsigned, before - value)
M3I_EMULATOR_ATOMICS(atomicInc, unsigned, before >= value ? 0 : before + 1)
M3I_EMULATOR_ATOMICS(atomicDec, unsigned, before == 0 || before > value ? value : before - 1)
M3I_EMULATOR_ATOMICS(atomicAdd, float, before + value)
M3I_EMULATOR_ATOMICS(atomicExch, float, value)
M3I_EMULATOR_ATOMICS(atomicAdd, double, before + value)
#undef M3I_EMULATOR_INTEGER_ATOMICS
#undef M3I_EMULATOR_ATOMICS
#undef M3I_EMULATOR_ATOMIC

#define M3I_EMULATOR_CAS(type)                                                                \
  __attribute__((always_inline)) inline type atomicCAS(type* at, type expected, type value) { \
    return m3i::emulator::update(                                                             \
        at, [&](type before) { return before == expected ? value : before; });                \
  }
M3I_EMULATOR_CAS(int)
M3I_EMULATOR_CAS(unsigned)
M3I_EMULATOR_CAS(unsigned short)
M3I_EMULATOR_CAS(unsigned long long)
#undef M3I_EMULATOR_CAS

// Compute capability 9.0: an addition to each component.
__attribute__((always_inline)) inline float2 atomicAdd(float2* at, float2 value) {
  return m3i::emulator::update(
      at, [&](float2 before) { return float2{before.x + value.x, before.y + value.y}; });
}
__attribute__((always_inline)) inline float4 atomicAdd(float4* at, float4 value) {
  return m3i::emulator::update(at, [&](float4 before) {
    return float4{before.x + value.x, before.y + value.y, before.z + value.z, before.w + value.w};
  });
}
