// Tensor copies, for the wrappers in m3i/gpu/tma.cuh, and their maps.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

struct MappedMatrix {
  void* base;
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns;
  int element_bytes;
  bool is_float;
  int swizzle_bytes;  // 16 without a swizzle
};

// A map has the size and the alignment of CUDA's.
M3I_EMULATOR_API void encode_tensor_map(void* map, const MappedMatrix& matrix);

M3I_EMULATOR_API void tma_prefetch(const void* map);
M3I_EMULATOR_API void tma_load_2d(void* shared, const void* map, int row, int column,
                                  void* barrier);
M3I_EMULATOR_API void tma_load_2d_multicast(void* shared, const void* map, int row, int column,
                                            void* barrier, uint16_t blocks);
// The matrix is written once the thread has waited, or returned.
M3I_EMULATOR_API void tma_store_2d(const void* map, int row, int column, const void* shared,
                                   bool add);
M3I_EMULATOR_API void tma_store_commit();
M3I_EMULATOR_API void tma_store_wait(int groups, bool read_only);

}  // namespace m3i::emulator
