// Kernels around mbarriers, for the tests of the emulator.
#include "m3i/host/launch.h"
#include "m3i/gpu/mbarrier.cuh"
#include "m3i/gpu/shared.cuh"

namespace {

constexpr int kStages = 3, kConsumers = 2;

struct Ring {
  m3i::Mbarrier full[kStages], empty[kStages];
  int slots[kStages][32];
};

// One warp fills the slots of a ring, round by round, and two others read each of them.
// out[step, c, l] = (c + 1) values[step, 31 - l]
__global__ void __launch_bounds__(32 * (1 + kConsumers))
    ring_kernel(const int* values, int* out, int num_steps) {
  Ring& ring = *m3i::dynamic_shared<Ring>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      m3i::mbarrier_init(&ring.full[i], 32);
      m3i::mbarrier_init(&ring.empty[i], 32 * kConsumers);
    }
    m3i::mbarrier_init_fence();
  }
  __syncthreads();
  for (int step = 0; step < num_steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    if (warp == 0) {
      m3i::mbarrier_wait(&ring.empty[stage], 1 - parity);
      ring.slots[stage][lane] = values[32 * step + lane];
      m3i::mbarrier_arrive(&ring.full[stage]);
    } else {
      m3i::mbarrier_wait(&ring.full[stage], parity);
      out[32 * (kConsumers * step + warp - 1) + lane] = warp * ring.slots[stage][31 - lane];
      m3i::mbarrier_arrive(&ring.empty[stage]);
    }
  }
}

// As above with one slot, of a warp each, and a producer that asks again and again.
__global__ void __launch_bounds__(64) poll_kernel(const int* values, int* out, int num_steps) {
  __shared__ m3i::Mbarrier full, empty;
  __shared__ int slot[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 32) {
    m3i::mbarrier_init(&full, 32);
    m3i::mbarrier_init(&empty, 32);
  }
  __syncthreads();
  for (int step = 0; step < num_steps; ++step) {
    if (threadIdx.x < 32) {
      while (!m3i::mbarrier_try_wait(&empty, 1 - step % 2)) {
      }
      slot[lane] = values[32 * step + lane];
      m3i::mbarrier_arrive(&full);
    } else {
      while (!m3i::mbarrier_try_wait(&full, step % 2)) {
      }
      out[32 * step + lane] = slot[31 - lane];
      m3i::mbarrier_arrive(&empty);
    }
  }
}

enum Operation { kArrive, kArriveExpectTx, kExpectTx, kCompleteTx, kTryWait };

// A thread by itself does what the script says, (operation, argument) each, on a barrier of `count`
// arrivals. out[i] = whether operation i, if it is kTryWait, found the phase complete.
__global__ void script_kernel(const int* script, int* out, int num_operations, int count) {
  __shared__ m3i::Mbarrier barrier;
  m3i::mbarrier_init(&barrier, count);
  for (int i = 0; i < num_operations; ++i) {
    const auto argument = static_cast<uint32_t>(script[2 * i + 1]);
    switch (script[2 * i]) {
      case kArrive:
        m3i::mbarrier_arrive(&barrier);
        break;
      case kArriveExpectTx:
        m3i::mbarrier_arrive_expect_tx(&barrier, argument);
        break;
      case kExpectTx:
        m3i::mbarrier_expect_tx(&barrier, argument);
        break;
      case kCompleteTx:
        m3i::mbarrier_complete_tx(&barrier, argument);
        break;
      case kTryWait:
        out[i] = m3i::mbarrier_try_wait(&barrier, argument);
        break;
    }
  }
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t ring(const int* values, int* out, int num_steps) {
  return m3i::launch_with_shared(ring_kernel, 1, 32 * (1 + kConsumers), sizeof(Ring), nullptr,
                                 values, out, num_steps);
}

M3I_TEST_API cudaError_t poll(const int* values, int* out, int num_steps) {
  return m3i::launch(poll_kernel, 1, 64, nullptr, values, out, num_steps);
}

M3I_TEST_API cudaError_t script(const int* operations, int* out, int num_operations, int count) {
  return m3i::launch(script_kernel, 1, 1, nullptr, operations, out, num_operations, count);
}
