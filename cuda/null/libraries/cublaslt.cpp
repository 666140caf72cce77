// libcublasLt.so.13: descriptors are empty, one algorithm suits every product, none is computed.
#include <cublasLt.h>

#include <cstring>

#include "libraries/library.h"

namespace {
// Descriptors are opaque to who makes them; those that callers put on their own stack are larger.
template <typename T>
cublasStatus_t make(T** descriptor) {
  *descriptor = reinterpret_cast<T*>(new char[256]());
  return CUBLAS_STATUS_SUCCESS;
}
}  // namespace

M3I_EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(m3i::null::new_handle());
  return CUBLAS_STATUS_SUCCESS;
}

M3I_EXPORT size_t cublasLtGetVersion() { return 130400; }

M3I_EXPORT size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }

M3I_EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* descriptor,
                                                   cublasComputeType_t, cudaDataType_t) {
  return make(descriptor);
}

M3I_EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType,
                                                     uint64_t, uint64_t, int64_t) {
  return make(layout);
}

M3I_EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return make(preference);
}

M3I_EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int asked,
    cublasLtMatmulHeuristicResult_t* results, int* given) {
  std::memset(results, 0, sizeof *results * static_cast<size_t>(asked));
  *given = 1;
  return CUBLAS_STATUS_SUCCESS;
}

M3I_EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*,
                                         const void*, cublasLtMatrixLayout_t, const void*,
                                         cublasLtMatrixLayout_t, const void*, const void*,
                                         cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t,
                                         const cublasLtMatmulAlgo_t*, void*, size_t,
                                         cudaStream_t stream) {
  m3i::null::record_library_call("cublasLt", "cublasLtMatmul", stream);
  return CUBLAS_STATUS_SUCCESS;
}
