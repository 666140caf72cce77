// Kernels whose warpgroups change their registers, for the tests of the emulator.
#include "m3i/host/launch.h"
#include "m3i/gpu/registers.cuh"

namespace {

constexpr int kThreads = 384;

// The first warpgroup gives registers up, the others take them. out[thread] = its warpgroup.
__global__ void __launch_bounds__(kThreads, 1) give_and_take_kernel(int* out) {
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    m3i::setmaxnreg_dec<24>();
  } else {
    m3i::setmaxnreg_inc<240>();
  }
  out[threadIdx.x] = group;
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t give_and_take(int* out) {
  return m3i::launch(give_and_take_kernel, 1, kThreads, nullptr, out);
}
