// libcudnn.so.9: the version that torch compares with its own, and handles.
#include <cudnn_version.h>
#include <library_types.h>

#include "libraries/library.h"

M3I_EXPORT int cudnnCreate(void** handle) {
  *handle = m3i::null::new_handle();
  return 0;
}

M3I_EXPORT int cudnnSetStream(void* handle, cudaStream_t stream) {
  static_cast<m3i::null::Handle*>(handle)->stream = stream;
  return 0;
}

// By this number torch decides whether cuDNN computes attention, as on a card. None of its engines
// is here, so that a run which chooses cuDNN fails.
M3I_EXPORT size_t cudnnGetVersion() { return CUDNN_VERSION; }

// By these it decides whether the library is the one that it was built with.
M3I_EXPORT int cudnnGetProperty(libraryPropertyType type, int* value) {
  switch (type) {
    case MAJOR_VERSION:
      *value = CUDNN_MAJOR;
      return 0;
    case MINOR_VERSION:
      *value = CUDNN_MINOR;
      return 0;
    case PATCH_LEVEL:
      *value = CUDNN_PATCHLEVEL;
      return 0;
  }
  return 2000;  // CUDNN_STATUS_BAD_PARAM
}

M3I_EXPORT size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
