// cp.async: copies that land when their thread waits for them.
#include "emulator/instructions/tile.h"
#include "runtime/launch/report.h"
#include "runtime/memory/access.h"
#include "runtime/memory/race.h"
#include "runtime/threads/scheduler.h"

#include <cstring>
#include <string>

namespace m3i::emulator {

namespace {

void land(const AsyncCopy& copy) {
  Region* region = region_at(copy.to);
  if (copy.inside) {
    std::memcpy(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from),
                copy.bytes);
  } else {
    std::memset(reinterpret_cast<void*>(copy.to), 0, copy.bytes);
  }
  mark_written(*region, copy.to, copy.bytes);
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, bool inside) {
  const auto instruction = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const auto size = static_cast<size_t>(bytes);
  const AsyncCopy copy{reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), size,
                       inside};
  if (copy.from % size != 0) {
    fail_with(
        cudaErrorMisalignedAddress,
        "cp.async from " + hex(copy.from) + ", misaligned for " + std::to_string(size) + " bytes",
        at(instruction));
  }
  if (inside) {
    check_aligned(copy.from, size, Access::kRead, instruction);
    Region* source = region_at(copy.from);
    if (!source || source->shared()) {
      fail_with(cudaErrorIllegalAddress, "cp.async from memory that is not global",
                at(instruction));
    }
  }
  check_aligned(copy.to, size, Access::kWrite, instruction);
  mark_in_flight(shared_region(copy.to, instruction), copy.to, size);
  running->copies.push_back(copy);
}

void copy_async_commit() { running->copy_groups.push_back(running->copies.size()); }

void copy_async_wait(int groups) {
  Thread& thread = *running;
  const auto keep = static_cast<size_t>(groups);
  if (thread.copy_groups.size() <= keep) return;
  const size_t done = thread.copy_groups.size() - keep;
  const size_t end = thread.copy_groups[done - 1];
  for (size_t i = 0; i < end; ++i) land(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<long>(end));
  thread.copy_groups.erase(thread.copy_groups.begin(),
                           thread.copy_groups.begin() + static_cast<long>(done));
  for (size_t& group_end : thread.copy_groups) group_end -= end;
}

void finish_copies(Thread& thread) {
  for (const AsyncCopy& copy : thread.copies) land(copy);
  thread.copies.clear();
  thread.copy_groups.clear();
}

}  // namespace m3i::emulator
