// libcuda.so.1: what torch asks the driver itself; the rest of its names are generated.
#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "runtime/null.h"

// cuda.h maps these names to versions; both are exported.
#undef cuDevicePrimaryCtxRelease

namespace {
long context;  // its address stands for the one context
}

M3I_EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

M3I_EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDeviceGetCount(int* count) {
  *count = m3i::null::device_count();
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, static_cast<size_t>(length), "%s", m3i::null::card().name);
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

M3I_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice) {
  *retained = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

M3I_EXPORT CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "error of the null CUDA driver";
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute,
                                         CUdevice device) {
  return static_cast<CUresult>(
      cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}

namespace {

// What is written to a tensor map here, for tests: the arguments, and zeros beyond the rank.
struct MapArguments {
  cuuint64_t address, sizes[5], strides[4];
  cuuint32_t box[5], steps[5];
  uint8_t type, rank, interleave, swizzle, promotion, fill;
};
static_assert(sizeof(MapArguments) == sizeof(CUtensorMap));

}  // namespace

// What CUDA's programming guide asks of a tensor map.
M3I_EXPORT CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  bool legal = rank >= 1 && rank <= 5 && reinterpret_cast<size_t>(map) % 64 == 0 &&
               reinterpret_cast<size_t>(address) % 16 == 0;
  for (cuuint32_t i = 0; legal && i < rank; ++i) {
    legal =
        sizes[i] >= 1 && sizes[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] >= 1;
    if (legal && i + 1 < rank) legal = strides[i] % 16 == 0 && strides[i] < 1ull << 40;
  }
  if (!legal) {
    m3i::null::Record("error")
        .number("code", CUDA_ERROR_INVALID_VALUE)
        .text("call", "cuTensorMapEncodeTiled")
        .python_line();
    return CUDA_ERROR_INVALID_VALUE;
  }
  MapArguments given{};
  given.address = reinterpret_cast<cuuint64_t>(address);
  given.type = static_cast<uint8_t>(type);
  given.rank = static_cast<uint8_t>(rank);
  given.interleave = static_cast<uint8_t>(interleave);
  given.swizzle = static_cast<uint8_t>(swizzle);
  given.promotion = static_cast<uint8_t>(promotion);
  given.fill = static_cast<uint8_t>(fill);
  std::copy_n(sizes, rank, given.sizes);
  std::copy_n(strides, rank - 1, given.strides);
  std::copy_n(box, rank, given.box);
  std::copy_n(steps, rank, given.steps);
  std::memcpy(map, &given, sizeof(given));
  return CUDA_SUCCESS;
}

// ---- Modules: kernels that a library has NVRTC compile for the card while it runs
// ------------------------------------------------------------------------------------------

M3I_EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*,
                                       void**) {
  *module = reinterpret_cast<CUmodule>(new char);
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

M3I_EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new char);
  m3i::null::register_kernel(*function, name,
                             10 * m3i::null::card().major + m3i::null::card().minor);
  return CUDA_SUCCESS;
}

M3I_EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

M3I_EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                       int value) {
  return static_cast<CUresult>(
      cudaFuncSetAttribute(function, static_cast<cudaFuncAttribute>(attribute), value));
}

M3I_EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned shared, CUstream stream,
                                   void** arguments, void**) {
  return static_cast<CUresult>(cudaLaunchKernel(function, dim3(grid_x, grid_y, grid_z),
                                                dim3(block_x, block_y, block_z), arguments, shared,
                                                stream));
}

M3I_EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                              unsigned grid_z, unsigned block_x, unsigned block_y,
                                              unsigned block_z, unsigned shared, CUstream stream,
                                              void** arguments) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream,
                        arguments, nullptr);
}

M3I_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function,
                                                                int threads, size_t shared) {
  return static_cast<CUresult>(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared));
}
