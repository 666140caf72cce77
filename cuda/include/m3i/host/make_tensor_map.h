// Makes tensor maps on the host, without linking to the driver.
#pragma once

#include "m3i/gpu/tensor_map.h"

#include <cuda_runtime.h>

#ifndef M3I_EMULATOR
#include <cuda.h>
#endif

namespace m3i {

// A matrix of rows x columns, and the box that a copy moves.
struct TiledMatrix {
  DType dtype;  // of two or four bytes
  const void* base;
  int64_t rows, columns;
  int64_t row_bytes;  // from a row to the next one
  int box_rows, box_columns;
  Swizzle swizzle;
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Returns why no map can be made of it, or null. The rules are the driver's, except that a swizzled
// box has to be as wide as the swizzle.
inline const char* tensor_map_fault(const TiledMatrix& matrix) {
  const int64_t element = bytes_of(matrix.dtype), box_bytes = matrix.box_columns * element;
  if (reinterpret_cast<uintptr_t>(matrix.base) % 16 != 0) return "base: not a multiple of 16";
  if (matrix.rows < 1 || matrix.rows > int64_t{1} << 32) return "rows: not in 1 to 2^32";
  if (matrix.columns < 1 || matrix.columns > int64_t{1} << 32) return "columns: not in 1 to 2^32";
  if (matrix.row_bytes % 16 != 0) return "row_bytes: not a multiple of 16";
  if (matrix.row_bytes < matrix.columns * element) return "row_bytes: less than a row has";
  if (matrix.row_bytes >= int64_t{1} << 40) return "row_bytes: 2^40 or more";
  if (matrix.box_rows < 1 || matrix.box_rows > 256) return "box_rows: not in 1 to 256";
  if (matrix.box_columns < 1 || matrix.box_columns > 256) return "box_columns: not in 1 to 256";
  if (box_bytes % 16 != 0) return "box_columns: their bytes are not a multiple of 16";
  if (matrix.swizzle != Swizzle::kNone && box_bytes != swizzle_bytes(matrix.swizzle)) {
    return "box_columns: not as wide as the swizzle";
  }
  return nullptr;
}

#ifndef M3I_EMULATOR

// CUDA 12's is aligned to 64 bytes, CUDA 13's to 128.
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                  alignof(TensorMap) % alignof(CUtensorMap) == 0,
              "TensorMap: expected the size and at least the alignment of cuda.h's CUtensorMap");

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kFloat64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

inline CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

// The driver's cuTensorMapEncodeTiled.
inline cudaError_t find_encoder(void** encode) {
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", encode,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", encode, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  return found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
}

#endif  // M3I_EMULATOR

// Makes a map, by which elements of a box outside the matrix are read as zeros and not written.
// Returns cudaErrorInvalidValue where tensor_map_fault returns a fault, cudaErrorNotSupported where
// the driver has no tensor maps.
inline cudaError_t make_tensor_map(TensorMap* map, const TiledMatrix& matrix) {
  if (tensor_map_fault(matrix)) return cudaErrorInvalidValue;
#ifdef M3I_EMULATOR
  emulator::encode_tensor_map(
      map, {const_cast<void*>(matrix.base), matrix.rows, matrix.columns, matrix.row_bytes,
            matrix.box_rows, matrix.box_columns, static_cast<int>(bytes_of(matrix.dtype)),
            matrix.dtype == DType::kFloat32, static_cast<int>(swizzle_bytes(matrix.swizzle))});
  return cudaSuccess;
#else
  void* encode = nullptr;
  if (const cudaError_t error = find_encoder(&encode); error != cudaSuccess) return error;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns),
                            static_cast<cuuint32_t>(matrix.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      reinterpret_cast<CUtensorMap*>(map), tensor_map_type(matrix.dtype), 2,
      const_cast<void*>(matrix.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      tensor_map_swizzle(matrix.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

}  // namespace m3i
