// libcublas.so.13: handles and their streams; products are recorded, and compute nothing.
#include "libraries/library.h"

using m3i::null::Handle;

M3I_EXPORT int cublasCreate_v2(void** handle) {
  *handle = m3i::null::new_handle();
  return 0;
}

M3I_EXPORT int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  static_cast<Handle*>(handle)->stream = stream;
  return 0;
}

M3I_EXPORT int cublasGetStream_v2(void* handle, cudaStream_t* stream) {
  *stream = static_cast<Handle*>(handle)->stream;
  return 0;
}

M3I_EXPORT int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;  // scalars lie on the host
  return 0;
}

M3I_EXPORT int cublasGetMathMode(void*, int* mode) {
  *mode = 0;  // the default
  return 0;
}

M3I_EXPORT int cublasGetVersion_v2(void*, int* version) {
  *version = 130400;
  return 0;
}

M3I_EXPORT int cublasGetProperty(int property, int* value) {
  *value = property == 0 ? 13 : property == 1 ? 4 : 0;  // major, minor, patch
  return 0;
}
