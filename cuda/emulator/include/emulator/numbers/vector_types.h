// CUDA's vector types, with CUDA's alignment.
#pragma once

#include <cstdint>

#define M3I_EMULATOR_VECTORS(type, name, align1, align2, align3, align4)         \
  struct alignas(align1) name##1 { type x; };                                    \
  struct alignas(align2) name##2 { type x, y; };                                 \
  struct alignas(align3) name##3 { type x, y, z; };                              \
  struct alignas(align4) name##4 { type x, y, z, w; };                           \
  constexpr name##1 make_##name##1(type x) { return {x}; }                       \
  constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

M3I_EMULATOR_VECTORS(signed char, char, 1, 2, 1, 4)
M3I_EMULATOR_VECTORS(unsigned char, uchar, 1, 2, 1, 4)
M3I_EMULATOR_VECTORS(short, short, 2, 4, 2, 8)
M3I_EMULATOR_VECTORS(unsigned short, ushort, 2, 4, 2, 8)
M3I_EMULATOR_VECTORS(int, int, 4, 8, 4, 16)
M3I_EMULATOR_VECTORS(unsigned int, uint, 4, 8, 4, 16)
M3I_EMULATOR_VECTORS(long, long, 8, 16, 8, 16)
M3I_EMULATOR_VECTORS(unsigned long, ulong, 8, 16, 8, 16)
M3I_EMULATOR_VECTORS(long long, longlong, 8, 16, 8, 16)
M3I_EMULATOR_VECTORS(unsigned long long, ulonglong, 8, 16, 8, 16)
M3I_EMULATOR_VECTORS(float, float, 4, 8, 4, 16)
M3I_EMULATOR_VECTORS(double, double, 8, 16, 8, 16)

#undef M3I_EMULATOR_VECTORS

// The extents of a grid or a block, 1 by default.
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
