// Barriers in shared memory, for the wrappers in m3i/gpu/mbarrier.cuh. Reports name the wrapper's
// caller by its address.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

M3I_EMULATOR_API void mbarrier_init(void* barrier, uint32_t count);
M3I_EMULATOR_API void mbarrier_init_fence();
M3I_EMULATOR_API void mbarrier_arrive(void* barrier);
M3I_EMULATOR_API void mbarrier_arrive_remote(void* barrier, uint32_t rank);
M3I_EMULATOR_API void mbarrier_arrive_expect_tx(void* barrier, uint32_t bytes);
M3I_EMULATOR_API void mbarrier_expect_tx(void* barrier, uint32_t bytes);
M3I_EMULATOR_API void mbarrier_complete_tx(void* barrier, uint32_t bytes);
// If the phase is not complete, the other threads run once, and it is tested again.
M3I_EMULATOR_API bool mbarrier_try_wait(void* barrier, uint32_t parity);
M3I_EMULATOR_API void mbarrier_wait(void* barrier, uint32_t parity);

}  // namespace m3i::emulator
