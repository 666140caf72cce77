// The memory that a kernel may access, with a shadow that records accesses to each byte.
#pragma once

#include "emulator/runtime.h"

#include <string>

namespace m3i::emulator {

// The last accesses to a byte, see race.h.
using Stamp = uint64_t;

// Stamps of former epochs count for nothing, so a shadow is handed on as it is.
struct Shadow {
  Stamp* writes = nullptr;  // one a byte
  Stamp* reads = nullptr;
};

struct Region {
  enum class Kind { kGlobal, kDynamicShared, kStaticShared };
  uintptr_t begin = 0, end = 0;
  Kind kind = Kind::kGlobal;
  uint32_t block = 0;  // whose dynamic shared memory it is: its rank in the cluster
  Shadow shadow;       // made when a kernel first touches the region

  bool holds(uintptr_t address) const { return begin <= address && address < end; }
  bool shared() const { return kind != Kind::kGlobal; }
  void make_shadow();
  void drop_shadow();
};

// Memory that ends, after padding to its alignment, at an inaccessible page; filled with 0xff.
inline constexpr size_t kAllocationAlignment = 256;
void* allocate_guarded(size_t size);
void free_guarded(void* memory);

// The region that holds an address, or null.
Region* region_at(uintptr_t address);
// Describes an address in no region by its distance from the nearest allocation.
std::string describe_outside(uintptr_t address);

inline constexpr uint32_t kMostClusterBlocks = 8;
// Between the same bytes of two blocks of a cluster.
inline constexpr size_t kSharedStride = 256 * 1024;

// The shared memory of the blocks that run next: `dynamic_bytes` of each of them, and the variables
// of a module (static_bytes from static_begin). Empty between launches.
void set_shared(uint32_t num_blocks, size_t dynamic_bytes, uintptr_t static_begin,
                size_t static_bytes);
uintptr_t dynamic_shared_begin(uint32_t block);
// Overwrites all of it, as if never written.
void scramble_shared();

}  // namespace m3i::emulator
