// libcusolver.so.12: handles; factorisations are recorded and compute nothing.
#include <cstdint>

#include "libraries/library.h"

using m3i::null::new_handle;

M3I_EXPORT int cusolverDnCreate(void** handle) {
  *handle = new_handle();
  return 0;
}

M3I_EXPORT int cusolverDnSetStream(void* handle, cudaStream_t stream) {
  static_cast<m3i::null::Handle*>(handle)->stream = stream;
  return 0;
}

M3I_EXPORT int cusolverDnCreateParams(void** parameters) {
  *parameters = new_handle();
  return 0;
}

M3I_EXPORT int cusolverDnCreateSyevjInfo(void** info) {
  *info = new_handle();
  return 0;
}

M3I_EXPORT int cusolverDnCreateGesvdjInfo(void** info) {
  *info = new_handle();
  return 0;
}

// Workspaces of eigenvalues: n^2 numbers and a little, as the real library asks for.
M3I_EXPORT int cusolverDnXsyevd_bufferSize(void*, void*, int, int, int64_t n, int, const void*,
                                           int64_t, int, const void*, int, size_t* on_device,
                                           size_t* on_host) {
  *on_device = static_cast<size_t>(2 * n * n + 64) * sizeof(double);
  *on_host = 0;
  return 0;
}

M3I_EXPORT int cusolverDnXsyevBatched_bufferSize(void*, void*, int, int, int64_t n, int,
                                                 const void*, int64_t, int, const void*, int,
                                                 size_t* on_device, size_t* on_host,
                                                 int64_t batch) {
  *on_device = static_cast<size_t>(2 * n * n + 64) * sizeof(double) * static_cast<size_t>(batch);
  *on_host = 0;
  return 0;
}

M3I_EXPORT int cusolverDnSsyevjBatched_bufferSize(void*, int, int, int n, const float*, int,
                                                  const float*, int* numbers, void*, int batch) {
  *numbers = (2 * n * n + 64) * batch;
  return 0;
}
