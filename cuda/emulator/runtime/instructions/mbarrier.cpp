#include "runtime/instructions/mbarrier.h"

#include "emulator/instructions/mbarrier.h"
#include "runtime/launch/device.h"
#include "runtime/launch/report.h"
#include "runtime/memory/access.h"
#include "runtime/memory/race.h"
#include "runtime/threads/cluster.h"
#include "runtime/threads/scheduler.h"

namespace m3i::emulator {

namespace {

constexpr uint32_t kMostArrivals = (1u << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

uintptr_t address_of(const void* barrier) { return reinterpret_cast<uintptr_t>(barrier); }

[[noreturn]] void fail_at(const char* operation, uintptr_t address, const std::string& why,
                          Site site) {
  fail((std::string(operation) + " on " + describe_mbarrier(address) + why).c_str(), site);
}

// The mbarrier at an address, of any block of the cluster; fails unless the running thread knows of
// it.
Mbarrier& find_any(const char* operation, uintptr_t address, Site site) {
  const auto found = running_cluster->mbarriers.find(address);
  if (found == running_cluster->mbarriers.end()) {
    fail_at(operation, address, ", which nobody has initialised", site);
  }
  Mbarrier& barrier = found->second;
  if (!ordered(barrier.made)) {
    fail_at(operation, address,
            ", which " + who(barrier.made) + " initialised without a barrier between the two",
            site);
  }
  return barrier;
}

void check_fenced(const char* operation, const Mbarrier& barrier, uintptr_t address, Site site) {
  if (barrier.fenced) return;
  fail_at(operation, address, ", which was initialised without an mbarrier_init_fence", site);
}

bool is_remote(uintptr_t address) {
  const Region* region = region_at(address);
  return region && region->shared() && region->block != running_block->rank;
}

Mbarrier& find(const char* operation, uintptr_t address, Site site) {
  if (is_remote(address)) fail_at(operation, address, ", which is another block's", site);
  return find_any(operation, address, site);
}

void pass_if_complete(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.completed = barrier.arrived;
  for (const uint32_t id : barrier.waiting) {
    Thread& thread = running_cluster->thread(id);
    thread.block->make_ready(thread);
  }
  barrier.waiting.clear();
}

void expect(const char* operation, Mbarrier& barrier, uintptr_t address, uint32_t bytes,
            Site site) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) {
    fail_at(operation, address, ": more than 2^20 - 1 bytes are expected", site);
  }
}

void arrive_at(const char* operation, Mbarrier& barrier, uintptr_t address, uint32_t bytes,
               Site site) {
  if (barrier.pending == 0) {
    fail_at(operation, address,
            ": all " + std::to_string(barrier.count) + " arrivals of phase " +
                std::to_string(barrier.phase) + " have come, and " + std::to_string(barrier.bytes) +
                " bytes have not",
            site);
  }
  expect(operation, barrier, address, bytes, site);
  running->site = site;
  release(*running, barrier.arrived);
  --barrier.pending;
  pass_if_complete(barrier);
  // Who runs ahead of those that it should wait for meets them before it has overwritten what they
  // are to read.
  give_way(site);
}

void arrive(const char* operation, void* at_barrier, uint32_t bytes, Site site) {
  const uintptr_t address = address_of(at_barrier);
  arrive_at(operation, find(operation, address, site), address, bytes, site);
}

bool is_complete(const Mbarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != parity; }

Mbarrier& find_to_wait(const char* operation, uintptr_t address, uint32_t parity, Site site) {
  if (parity > 1) {
    fail_at(operation, address, " for parity " + std::to_string(parity) + ": expected 0 or 1",
            site);
  }
  return find(operation, address, site);
}

void acquire_phase(const Mbarrier& barrier) {
  acquire(*running, barrier.completed);
  if (barrier.agent) hear_of_agent(*running, barrier.agent, barrier.phase);
}

}  // namespace

#define M3I_CALLER_SITE at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)))

void mbarrier_init(void* at_barrier, uint32_t count) {
  const Site site = M3I_CALLER_SITE;
  const uintptr_t address = address_of(at_barrier);
  require_architecture(90, "mbarrier_init", site);
  const auto instruction = reinterpret_cast<uintptr_t>(site.instruction);
  Region& region = shared_region(address, instruction);
  if (const auto found = running_cluster->mbarriers.find(address);
      found != running_cluster->mbarriers.end()) {
    fail_at("mbarrier_init", address,
            ", which " + who(found->second.made) + " has initialised before", site);
  }
  if (count == 0 || count > kMostArrivals) {
    fail_at("mbarrier_init", address,
            " for " + std::to_string(count) + " arrivals: expected 1 to 2^20 - 1", site);
  }
  check_aligned(address, sizeof(uint64_t), Access::kWrite, instruction);
  Mbarrier& barrier = running_cluster->mbarriers[address];
  barrier.made = own_stamp();
  barrier.maker = running->id;
  barrier.count = barrier.pending = count;
  mark_mbarrier(region, address);
}

void mbarrier_init_fence() {
  for (auto& [address, barrier] : running_cluster->mbarriers) {
    if (barrier.maker == running->id) barrier.fenced = true;
  }
}

void mbarrier_arrive(void* barrier) { arrive("mbarrier_arrive", barrier, 0, M3I_CALLER_SITE); }

void mbarrier_arrive_expect_tx(void* barrier, uint32_t bytes) {
  arrive("mbarrier_arrive_expect_tx", barrier, bytes, M3I_CALLER_SITE);
}

void mbarrier_arrive_remote(void* at_barrier, uint32_t rank) {
  constexpr const char* kName = "mbarrier_arrive_remote";
  const Site site = M3I_CALLER_SITE;
  const uintptr_t address = map_to_rank(address_of(at_barrier), rank, site);
  if (is_remote(address)) visit(*region_at(address), address, site);
  Mbarrier& barrier = find_any(kName, address, site);
  check_fenced(kName, barrier, address, site);
  arrive_at(kName, barrier, address, 0, site);
}

void mbarrier_expect_tx(void* at_barrier, uint32_t bytes) {
  const Site site = M3I_CALLER_SITE;
  const uintptr_t address = address_of(at_barrier);
  Mbarrier& barrier = find("mbarrier_expect_tx", address, site);
  expect("mbarrier_expect_tx", barrier, address, bytes, site);
  pass_if_complete(barrier);
}

void mbarrier_complete_tx(void* at_barrier, uint32_t bytes) {
  const uintptr_t address = address_of(at_barrier);
  complete_bytes(find("mbarrier_complete_tx", address, M3I_CALLER_SITE), bytes);
}

bool mbarrier_try_wait(void* at_barrier, uint32_t parity) {
  const Site site = M3I_CALLER_SITE;
  const Mbarrier& barrier = find_to_wait("mbarrier_try_wait", address_of(at_barrier), parity, site);
  if (!is_complete(barrier, parity)) yield(site);
  if (!is_complete(barrier, parity)) return false;
  acquire_phase(barrier);
  return true;
}

void mbarrier_wait(void* at_barrier, uint32_t parity) {
  const Site site = M3I_CALLER_SITE;
  const uintptr_t address = address_of(at_barrier);
  Mbarrier& barrier = find_to_wait("mbarrier_wait", address, parity, site);
  while (!is_complete(barrier, parity)) {
    running->mbarrier = address;
    running->parity = parity;
    barrier.waiting.push_back(running->id);
    wait(Thread::State::kAtMbarrier, site);
  }
  acquire_phase(barrier);
}

// ---- Copies -------------------------------------------------------------------------------------

Mbarrier& mbarrier_for_copy(uintptr_t address, Site site) {
  Mbarrier& barrier = find_any("a copy", address, site);
  check_fenced("a copy", barrier, address, site);
  if (!barrier.agent) barrier.agent = add_agent();
  return barrier;
}

void complete_bytes(Mbarrier& barrier, size_t bytes) {
  barrier.bytes -= static_cast<int64_t>(bytes);
  pass_if_complete(barrier);
}

void mark_landed(const Mbarrier& barrier, Region& region, uintptr_t address, size_t size) {
  mark_written_by_agent(region, address, size, barrier.agent, barrier.phase + 1);
}

// ---- Reports ------------------------------------------------------------------------------------

std::string describe_mbarrier(uintptr_t address) {
  const Region* region = region_at(address);
  return "the mbarrier of " + (region ? describe_memory(*region, address, sizeof(uint64_t))
                                      : "8 bytes at " + hex(address) + ", in no allocation");
}

std::string describe_mbarriers(const Cluster& cluster) {
  std::string lines;
  for (const auto& [address, barrier] : cluster.mbarriers) {
    lines += "\n  " + describe_mbarrier(address) + ": phase " + std::to_string(barrier.phase) +
             ", of parity " + std::to_string(barrier.phase & 1) + ", waits for " +
             std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
             " arrivals and for " + std::to_string(barrier.bytes) + " bytes";
  }
  return lines;
}

}  // namespace m3i::emulator
