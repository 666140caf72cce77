#include "runtime/memory/memory.h"

#include "cuda_runtime_api.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <new>
#include <vector>

namespace m3i::emulator {

namespace {

struct Allocation {
  Region region;
  void* mapping;
  size_t mapped;
};

// By the address of their first byte.
std::map<uintptr_t, Allocation>& allocations() {
  static auto* map = new std::map<uintptr_t, Allocation>;  // outlives every tensor
  return *map;
}

Region* last_found = nullptr;
Region dynamic_regions[kMostClusterBlocks], static_region;
uintptr_t dynamic_memory = 0;  // where the first one begins

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

// Bytes that the shadow of a region of `size` bytes has room for.
size_t shadow_size(size_t size) {
  size_t power = 256;
  while (power < size) power *= 2;
  return power;
}

std::map<size_t, std::vector<Stamp*>>& free_shadows() {
  static auto* lists = new std::map<size_t, std::vector<Stamp*>>;
  return *lists;
}
size_t bytes_of_free_shadows = 0;

// The block whose dynamic shared memory, or the gap after it, an address is in; null if it is
// elsewhere.
Region* dynamic_region_near(uintptr_t address) {
  const uintptr_t block = (address - dynamic_memory) / kSharedStride;
  return block < kMostClusterBlocks ? &dynamic_regions[block] : nullptr;
}

}  // namespace

void Region::make_shadow() {
  const size_t size = shadow_size(end - begin);
  std::vector<Stamp*>& free = free_shadows()[size];
  if (free.empty()) {
    shadow.writes = static_cast<Stamp*>(map(2 * sizeof(Stamp) * size));
  } else {
    shadow.writes = free.back();
    free.pop_back();
    bytes_of_free_shadows -= 2 * sizeof(Stamp) * size;
  }
  shadow.reads = shadow.writes + size;
}

void Region::drop_shadow() {
  if (!shadow.writes) return;
  constexpr size_t kMostKept = 256 << 20;
  const size_t size = shadow_size(end - begin), bytes = 2 * sizeof(Stamp) * size;
  if (bytes_of_free_shadows + bytes <= kMostKept) {
    free_shadows()[size].push_back(shadow.writes);
    bytes_of_free_shadows += bytes;
  } else {
    munmap(shadow.writes, bytes);
  }
  shadow = {};
}

void* allocate_guarded(size_t size) {
  if (size == 0) return nullptr;
  const size_t padded = round_up(size, kAllocationAlignment);
  const size_t mapped = round_up(padded, page()) + page();
  void* mapping = map(mapped);
  const uintptr_t guard = reinterpret_cast<uintptr_t>(mapping) + mapped - page();
  mprotect(reinterpret_cast<void*>(guard), page(), PROT_NONE);
  const uintptr_t begin = guard - padded;
  std::memset(reinterpret_cast<void*>(begin), 0xff, padded);
  allocations()[begin] = {{begin, begin + size, Region::Kind::kGlobal, 0, {}}, mapping, mapped};
  return reinterpret_cast<void*>(begin);
}

void free_guarded(void* memory) {
  if (!memory) return;
  const auto found = allocations().find(reinterpret_cast<uintptr_t>(memory));
  Allocation& allocation = found->second;
  if (last_found == &allocation.region) last_found = nullptr;
  allocation.region.drop_shadow();
  munmap(allocation.mapping, allocation.mapped);
  allocations().erase(found);
}

Region* region_at(uintptr_t address) {
  if (last_found && last_found->holds(address)) return last_found;
  if (static_region.holds(address)) return &static_region;
  if (Region* region = dynamic_region_near(address)) {
    return region->holds(address) ? region : nullptr;
  }
  auto next = allocations().upper_bound(address);
  if (next == allocations().begin()) return nullptr;
  Region& region = (--next)->second.region;
  if (!region.holds(address)) return nullptr;
  return last_found = &region;
}

std::string describe_outside(uintptr_t address) {
  const auto past = [&](const Region& region, const char* name) {
    return std::to_string(address - region.end) + " bytes past the end of " + name + " of " +
           std::to_string(region.end - region.begin) + " bytes";
  };
  constexpr uintptr_t kNear = 1 << 16;
  if (const Region* region = dynamic_region_near(address); region && region->begin) {
    return past(*region, "dynamic shared memory");
  }
  const auto next = allocations().upper_bound(address);
  if (next != allocations().begin()) {
    const Region& region = std::prev(next)->second.region;
    if (address - region.end < kNear) return past(region, "an allocation");
  }
  if (next != allocations().end() && next->first - address < kNear) {
    const Region& region = next->second.region;
    return std::to_string(region.begin - address) + " bytes before an allocation of " +
           std::to_string(region.end - region.begin) + " bytes";
  }
  return address < page() ? "a null pointer" : "in no allocation";
}

// ---- Shared memory ------------------------------------------------------------------------------

void set_shared(uint32_t num_blocks, size_t dynamic_bytes, uintptr_t static_begin,
                size_t static_bytes) {
  static const auto memory = reinterpret_cast<uintptr_t>(map(kMostClusterBlocks * kSharedStride));
  dynamic_memory = memory;
  for (uint32_t block = 0; block < kMostClusterBlocks; ++block) {
    Region& region = dynamic_regions[block];
    const bool used = block < num_blocks;
    if (used && !region.shadow.writes) {
      const uintptr_t begin = dynamic_shared_begin(block);
      region = {begin, begin + kSharedStride, Region::Kind::kDynamicShared, block, {}};
      region.make_shadow();
    }
    region.end = region.begin + (used ? dynamic_bytes : 0);
  }
  if (static_begin != static_region.begin || static_begin + static_bytes != static_region.end) {
    static_region.drop_shadow();
    static_region = {static_begin, static_begin + static_bytes, Region::Kind::kStaticShared, 0, {}};
    if (static_bytes) static_region.make_shadow();
  }
}

uintptr_t dynamic_shared_begin(uint32_t block) { return dynamic_memory + block * kSharedStride; }

void scramble_shared() {
  const auto scramble = [](const Region& region) {
    std::memset(reinterpret_cast<void*>(region.begin), 0xff, region.end - region.begin);
  };
  for (const Region& region : dynamic_regions) scramble(region);
  scramble(static_region);
}

}  // namespace m3i::emulator

using m3i::emulator::allocate_guarded;

cudaError_t cudaMalloc(void** memory, size_t size) {
  *memory = allocate_guarded(size);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  m3i::emulator::free_guarded(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  std::memset(memory, value, size);
  return cudaSuccess;
}
