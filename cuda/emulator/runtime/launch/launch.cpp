// Launches: CUDA's limits, then one cluster of blocks after another, or several in turns.
#include "emulator/launch.h"

#include "runtime/launch/device.h"
#include "runtime/launch/log.h"
#include "runtime/launch/module.h"
#include "runtime/launch/report.h"
#include "runtime/launch/signals.h"
#include "runtime/memory/memory.h"
#include "runtime/memory/race.h"
#include "runtime/memory/requests.h"
#include "runtime/threads/registers.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <map>
#include <mutex>

extern "C" M3I_EMULATOR_API uint3 gridDim;  // scheduler.cpp

namespace m3i::emulator {

namespace {

std::mutex one_launch_at_a_time;
cudaError_t last_error = cudaSuccess;
uint32_t clusters_at_once = 1;
// Dynamic shared memory that a kernel has been allowed by its attribute.
std::map<const void*, size_t> allowed_dynamic;

bool within(dim3 extents, unsigned x, unsigned y, unsigned z) {
  return 1 <= extents.x && extents.x <= x && 1 <= extents.y && extents.y <= y && 1 <= extents.z &&
         extents.z <= z;
}

cudaError_t check_shared(const cudaLaunchConfig_t& config, const void* kernel,
                         size_t static_bytes) {
  const auto found = allowed_dynamic.find(kernel);
  const size_t dynamic = config.dynamicSmemBytes;
  if (found != allowed_dynamic.end()) {
    return dynamic <= found->second && static_bytes + dynamic <= most_shared_bytes()
               ? cudaSuccess
               : cudaErrorInvalidValue;
  }
  return static_bytes + dynamic <= kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

// Blocks of a cluster along each axis.
dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& value = config.attrs[i].val.clusterDim;
    cluster = dim3(value.x, value.y, value.z);
  }
  return cluster;
}

cudaError_t check_cluster(const cudaLaunchConfig_t& config) {
  const dim3 cluster = cluster_of(config), grid = config.gridDim;
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 0 || blocks > kMostClusterBlocks) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

cudaError_t check_attributes(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeID id = config.attrs[i].id;
    const bool known = id == cudaLaunchAttributeIgnore ||
                       (id == cudaLaunchAttributeClusterDimension && has_clusters());
    if (!known) return cudaErrorNotSupported;
  }
  return check_cluster(config);
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const Module* module = module_of(kernel);
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  const Symbol* symbol = module ? module->function_at(address) : nullptr;
  if (!symbol) return cudaErrorInvalidDeviceFunction;
  if (!within(config.gridDim, 0x7fffffffu, 65535, 65535) ||
      !within(config.blockDim, 1024, 1024, 64)) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 block = config.blockDim;
  const unsigned long long threads = 1ull * block.x * block.y * block.z;
  if (threads > 1024) return cudaErrorInvalidConfiguration;
  const auto bound = module->launch_bound(address);
  if (bound && threads > bound->threads) return cudaErrorLaunchOutOfResources;
  const cudaError_t error = check_attributes(config);
  if (error != cudaSuccess) return error;
  return check_shared(config, kernel, module->static_shared_bytes(*symbol));
}

// Whose first block is this one.
void add_cluster(Cluster& cluster, uint3 first, dim3 extents, uint32_t registers) {
  for (uint32_t i = 0; i < cluster.size; ++i) {
    Block& block = cluster.blocks.emplace_back();
    block.rank = static_cast<uint32_t>(cluster.blocks.size()) - 1;
    block.index = {first.x + i % extents.x, first.y + i / extents.x % extents.y,
                   first.z + i / extents.x / extents.y};
    block.launch_registers = registers;
  }
}

// Clusters that run at once. Blocks without a cluster run alone.
uint32_t most_at_once(uint32_t cluster_size) {
  return cluster_size == 1 ? 1 : std::min(clusters_at_once, kMostClusterBlocks / cluster_size);
}

void run_grid(const cudaLaunchConfig_t& config, const Call& call, uint32_t registers) {
  gridDim = config.gridDim;
  begin_launch_epoch();
  const dim3 extents = cluster_of(config);
  const dim3 grid(gridDim.x / extents.x, gridDim.y / extents.y, gridDim.z / extents.z);
  const uint32_t size = extents.x * extents.y * extents.z;
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t next = 0; next < all;) {
    Cluster cluster;
    cluster.size = size;
    for (uint32_t n = 0; n < most_at_once(size) && next < all; ++n, ++next) {
      const auto x = static_cast<unsigned>(next % grid.x * extents.x);
      const auto y = static_cast<unsigned>(next / grid.x % grid.y * extents.y);
      const auto z = static_cast<unsigned>(next / grid.x / grid.y * extents.z);
      add_cluster(cluster, {x, y, z}, extents, registers);
    }
    scramble_shared();
    run_cluster(cluster, config.blockDim, call);
    finish_requests();
    if (launch_error() != cudaSuccess) return;
  }
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   void (*invoke)(void* closure), void* closure) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  forget_report();
  log_launch(config, kernel, cluster_of(config));
  cudaError_t error = check_launch(config, kernel);
  if (error == cudaSuccess && !skips_launches()) {
    const Module* module = module_of(kernel);
    const dim3 cluster = cluster_of(config);
    const uint32_t size = cluster.x * cluster.y * cluster.z;
    set_shared(size * most_at_once(size), config.dynamicSmemBytes, module->shared_base(),
               module->shared_bytes);
    begin_reports(kernel);
    const auto address = reinterpret_cast<uintptr_t>(kernel);
    const uint32_t registers = launch_registers(module->launch_bound(address));
    const FaultHandler handler;
    if (sigsetjmp(FaultHandler::leave, 1) == 0) {
      run_grid(config, {invoke, closure}, registers);
    } else {
      forget_running();
    }
    log_requests(kernel);
    error = launch_error();
  }
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  forget_report();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > most_shared_bytes()) return cudaErrorInvalidValue;
  allowed_dynamic[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

void* dynamic_shared() {
  return reinterpret_cast<void*>(dynamic_shared_begin(running_block->rank));
}

void thread_fence() { running_block->fenced = true; }

// How many clusters of a launch run at once, taking turns, where blocks are in clusters.
extern "C" M3I_EMULATOR_API void m3i_emulator_run_clusters(uint32_t at_once) {
  clusters_at_once = at_once;
}

}  // namespace m3i::emulator

cudaError_t cudaPeekAtLastError() { return m3i::emulator::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = m3i::emulator::last_error;
  m3i::emulator::last_error = cudaSuccess;
  return error;
}
