// What the null libraries share: handles that know their stream, and the record of a call.
#pragma once

#include "runtime/null.h"

namespace m3i::null {

// What cublasCreate and its like give out.
struct Handle {
  cudaStream_t stream = nullptr;
};

// A handle that lives as long as the process.
Handle* new_handle();

// Records a call of a library that computes something, on a stream.
void record_library_call(const char* library, const char* call, cudaStream_t stream);

}  // namespace m3i::null

// What generated entries call. The first: a call that would have computed something, on the stream
// of its handle where the first argument is one. The second: an entry that the null runtime does
// not have; it gives CUDA's "not supported", 801.
M3I_EXPORT long null_cuda_library_call(const char* library, const char* call, const void* first);
M3I_EXPORT long null_cuda_unsupported(const char* library, const char* call);
