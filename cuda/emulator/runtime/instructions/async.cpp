#include "runtime/instructions/async.h"

#include "emulator/instructions/wgmma.h"
#include "runtime/launch/report.h"
#include "runtime/memory/stamp.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <string>

namespace m3i::emulator {

namespace {

// What `stamp` marks happened before the operation: for each warp that issued it, one lane knows.
bool issuers_know(const AsyncRead& operation, Stamp stamp) {
  for (uint32_t warp = operation.first; warp < operation.last; warp += kWarpSize) {
    bool known = false;
    for (uint32_t rank = warp; rank < std::min(operation.last, warp + kWarpSize); ++rank) {
      known = known || ordered(stamp, running_block->threads[rank].id);
    }
    if (!known) return false;
  }
  return true;
}

// The first of the writer's fences after it wrote with this stamp; 0 if there is none.
Stamp fence_after(Stamp write, std::vector<Stamp> Thread::* kind = &Thread::proxy_fences) {
  const std::vector<Stamp>& fences = running_cluster->thread(thread_of(write)).*kind;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), write & ~kFlag);
  return fence == fences.end() ? 0 : *fence;
}

[[noreturn]] void fail_chunk(const AsyncRead& operation, uintptr_t address,
                             const std::string& why) {
  const Region& region = *region_at(address);
  fail_with(cudaErrorLaunchFailure,
            "asynchronous read of " + describe_memory(region, address, kChunk) + ", " + why,
            operation.site);
}

void check_write(AsyncRead& operation, uintptr_t address, Stamp write) {
  if (of_this_cluster(write) == 0)
    fail_chunk(operation, address, "which this block has not written");
  if (in_flight(write)) {
    fail_chunk(operation, address, "to which a copy is under way: it was not waited for");
  }
  if (!issuers_know(operation, write)) {
    fail_chunk(operation, address, "which was written without a barrier between the two");
  }
  const bool by_thread = thread_of(write) < running_cluster->num_threads();
  if (by_thread) {
    const Stamp fence = fence_after(write);
    if (fence == 0 || !issuers_know(operation, fence)) {
      fail_chunk(operation, address,
                 "which a thread wrote without fence_proxy_async and a barrier after it");
    }
  }
  operation.checked[thread_of(write) % kWarpgroupSize] = write;
}

}  // namespace

const void* begin_read(AsyncRead& operation, uint32_t offset) {
  const uintptr_t address = dynamic_shared_begin(running_block->rank) + offset;
  Region* region = region_at(address);
  if (!region || region->kind != Region::Kind::kDynamicShared || address + kChunk > region->end) {
    fail_with(cudaErrorIllegalAddress,
              "out-of-bounds asynchronous read of 16 bytes at byte " + std::to_string(offset) +
                  " of dynamic shared memory, " + describe_outside(address),
              operation.site);
  }
  const Stamp* written = region->shadow.writes + offset;
  for (uint32_t i = 0; i < kChunk; ++i) {
    if (i > 0 && written[i] == written[i - 1]) continue;
    const Stamp checked = operation.checked[thread_of(written[i]) % kWarpgroupSize];
    if (written[i] == 0 || written[i] != checked) check_write(operation, address + i, written[i]);
  }
  note_read(*region, address, kChunk, operation.stamp);
  std::vector<uint16_t>& being_read = running_block->being_read;
  if (being_read.empty()) being_read.resize((region->end - region->begin) / kChunk + 1);
  ++being_read[offset / kChunk];
  operation.chunks.push_back(offset / kChunk);
  return reinterpret_cast<const void*>(address);
}

void end_read(const AsyncRead& operation) {
  for (const uint32_t chunk : operation.chunks) --running_block->being_read[chunk];
}

void check_overwritten(const Region& region, uintptr_t address, size_t size, Site site) {
  const Stamp* written = region.shadow.writes + (address - region.begin);
  Stamp checked = 0;
  for (size_t i = 0; i < size; ++i) {
    const Stamp write = of_this_cluster(written[i]);
    if (write == checked || in_flight(write)) continue;
    checked = write;
    if (write == 0 || thread_of(write) >= running_cluster->num_threads()) continue;
    const Stamp fence = fence_after(write);
    if (fence != 0 && ordered(fence)) continue;
    fail_with(cudaErrorLaunchFailure,
              "a copy to " + describe_memory(region, address + i, 1) +
                  ", which a thread wrote without fence_proxy_async and a barrier after it",
              site);
  }
}

void check_fenced_in_global(const Region& region, uintptr_t address, size_t size, Site site) {
  if (!region.shadow.writes) return;  // no kernel has touched it
  const Stamp* written = region.shadow.writes + (address - region.begin);
  Stamp checked = 0;
  for (size_t i = 0; i < size; ++i) {
    const Stamp write = of_this_cluster(written[i]);
    if (write == checked) continue;
    checked = write;
    if (write == 0 || thread_of(write) >= running_cluster->num_threads()) continue;
    const Stamp fence = fence_after(write, &Thread::global_proxy_fences);
    const bool by_writer = fence != 0 && ordered(fence);
    if (by_writer && known_at_global_fence(*running, fence)) continue;
    fail_with(cudaErrorLaunchFailure,
              "a tensor copy of " + describe_memory(region, address + i, 1) + ", which " +
                  who(write) + " wrote without fence_proxy_async_global of " +
                  (by_writer ? "the copying thread after it heard of that"
                             : "its own and a barrier after it"),
              site);
  }
}

bool is_being_read(const Region& region, uintptr_t address, size_t size) {
  if (region.kind != Region::Kind::kDynamicShared) return false;
  const std::vector<uint16_t>& being_read = running_cluster->blocks[region.block].being_read;
  if (being_read.empty()) return false;
  const size_t first = (address - region.begin) / kChunk;
  const size_t last = (address + size - 1 - region.begin) / kChunk;
  return std::any_of(being_read.begin() + static_cast<long>(first),
                     being_read.begin() + static_cast<long>(last) + 1,
                     [](uint16_t count) { return count > 0; });
}

void fence_proxy_async() { note_proxy_fence(*running); }
void fence_proxy_async_global() { note_global_proxy_fence(*running); }

uint32_t shared_offset(const void* shared) {
  const auto address = reinterpret_cast<uintptr_t>(shared);
  const Region* region = region_at(address);
  if (!region || region->kind != Region::Kind::kDynamicShared) {
    fail_with(cudaErrorIllegalAddress, hex(address) + " is not in dynamic shared memory",
              at(reinterpret_cast<uintptr_t>(__builtin_return_address(0))));
  }
  return static_cast<uint32_t>(address - region->begin);
}

}  // namespace m3i::emulator
