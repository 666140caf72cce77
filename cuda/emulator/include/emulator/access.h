// Loads and stores with a cache hint: one access of the type's size and alignment.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

template <class T>
M3I_EMULATOR_ACCESS T load(const T* from) {
  check_access(from, sizeof(T), Access::kRead, __builtin_return_address(0));
  return *from;
}

template <class T>
M3I_EMULATOR_ACCESS void store(T* to, T value) {
  check_access(to, sizeof(T), Access::kWrite, __builtin_return_address(0));
  *to = value;
}

}  // namespace m3i::emulator

#define M3I_EMULATOR_LOAD(name)                                 \
  template <class T>                                            \
  __attribute__((always_inline)) inline T name(const T* from) { \
    return m3i::emulator::load(from);                           \
  }
#define M3I_EMULATOR_STORE(name)                                    \
  template <class T>                                                \
  __attribute__((always_inline)) inline void name(T* to, T value) { \
    m3i::emulator::store(to, value);                                \
  }

M3I_EMULATOR_LOAD(__ldg)
M3I_EMULATOR_LOAD(__ldca)
M3I_EMULATOR_LOAD(__ldcg)
M3I_EMULATOR_LOAD(__ldcs)
M3I_EMULATOR_LOAD(__ldcv)
M3I_EMULATOR_LOAD(__ldlu)
M3I_EMULATOR_STORE(__stwb)
M3I_EMULATOR_STORE(__stcg)
M3I_EMULATOR_STORE(__stcs)
M3I_EMULATOR_STORE(__stwt)
#undef M3I_EMULATOR_LOAD
#undef M3I_EMULATOR_STORE
