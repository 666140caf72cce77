// libcudnn.so.9: the version that torch compares with its own, and handles.
#include "libraries/library.h"

M3I_EXPORT int cudnnCreate(void** handle) {
  *handle = m3i::null::new_handle();
  return 0;
}

M3I_EXPORT int cudnnSetStream(void* handle, cudaStream_t stream) {
  static_cast<m3i::null::Handle*>(handle)->stream = stream;
  return 0;
}

M3I_EXPORT size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
