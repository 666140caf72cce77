// Launching a kernel: its parameters are copied, then every thread calls it with copies of its own.
#pragma once

#include "cuda_runtime_api.h"

#include <tuple>
#include <utility>

namespace m3i::emulator {

// Runs the grid to its end, in this thread.
M3I_EMULATOR_API cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                                    void (*invoke)(void* closure), void* closure);

template <class... Params>
struct Closure {
  void (*kernel)(Params...);
  std::tuple<Params...> params;
};

// The copies are made here, from the host's memory, which a kernel may not touch.
template <class... Params, size_t... kIndex>
M3I_EMULATOR_ACCESS void invoke(Closure<Params...>& closure, std::index_sequence<kIndex...>) {
  closure.kernel(std::get<kIndex>(closure.params)...);
}

template <class... Params>
M3I_EMULATOR_ACCESS void invoke(void* closure) {
  invoke(*static_cast<Closure<Params...>*>(closure), std::index_sequence_for<Params...>{});
}

}  // namespace m3i::emulator

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  m3i::emulator::Closure<Params...> closure{kernel, {static_cast<Params>(args)...}};
  return m3i::emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                               m3i::emulator::invoke<Params...>, &closure);
}
