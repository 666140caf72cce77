// What an op's op_cuda.cpp asks of torch's C interface that a torch without CUDA cannot answer,
// or that has to be answered otherwise here. Linked into the library of the op, where these
// definitions go before torch's: the op's file itself needs no change.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <string>

extern "C" {

M3I_EMULATOR_API const char* m3i_emulator_report();

// The operators' namespace of this library: the build defines it.
extern const char m3i_emulated_namespace[];

// The kernels for CUDA become kernels for the CPU of a namespace of their own.
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char* file,
                                            uint32_t line, TorchLibraryHandle* library) {
  static const auto original = reinterpret_cast<decltype(&aoti_torch_library_init_impl)>(
      dlsym(RTLD_NEXT, "aoti_torch_library_init_impl"));
  return original(m3i_emulated_namespace, "CPU", file, line, library);
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = nullptr;
  if (error == cudaSuccess) return AOTI_TORCH_SUCCESS;
  const std::string text = std::string("CUDA error: ") +
                           cudaGetErrorString(static_cast<cudaError_t>(error)) + "\n" +
                           m3i_emulator_report();
  *message = strdup(text.c_str());
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
}
