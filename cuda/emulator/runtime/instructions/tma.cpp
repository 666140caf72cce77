// Tensor copies: boxes of a matrix, swizzled in shared memory.
#include "emulator/instructions/tma.h"

#include "runtime/instructions/async.h"
#include "runtime/instructions/mbarrier.h"
#include "runtime/launch/device.h"
#include "runtime/launch/report.h"
#include "runtime/memory/access.h"
#include "runtime/memory/race.h"
#include "runtime/threads/cluster.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace m3i::emulator {

namespace {

constexpr uint64_t kMark = 0x3a5f19c7b2d8e406;  // the first word of a map

// As it lies in the 128 bytes of a map.
struct EncodedMap {
  uint64_t mark;
  MappedMatrix matrix;
};
static_assert(sizeof(EncodedMap) <= 128);

bool delayed = false;

// ---- Boxes --------------------------------------------------------------------------------------

Box box_of(const void* map, int row, int column, Site site) {
  require_architecture(90, "a tensor copy", site);
  EncodedMap encoded;
  std::memcpy(&encoded, map, sizeof(encoded));
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || encoded.mark != kMark) {
    fail("a tensor copy by a map that make_tensor_map has not made", site);
  }
  return {encoded.matrix, row, column};
}

uint32_t row_bytes(const Box& box) {
  return static_cast<uint32_t>(box.matrix.box_columns * box.matrix.element_bytes);
}
uint32_t total_bytes(const Box& box) {
  return static_cast<uint32_t>(box.matrix.box_rows) * row_bytes(box);
}

// Where byte `i` of a box of rows lies that begins at `offset` in shared memory.
uint32_t place_in_shared(const Box& box, uint32_t offset, uint32_t i) {
  const uint32_t linear = offset + i;
  const auto width = static_cast<uint32_t>(box.matrix.swizzle_bytes);
  return linear ^ (linear >> 3 & (width - 1) & ~15u);
}

// The offset of a box in dynamic shared memory; fails unless it may begin there.
uint32_t check_place(const Box& box, uintptr_t address, Site site) {
  const Region* region = region_at(address);
  const auto width = static_cast<uint32_t>(box.matrix.swizzle_bytes);
  const uint32_t alignment = std::max(128u, width > 16 ? 8 * width : 0);
  if (!region || region->kind != Region::Kind::kDynamicShared) {
    fail_with(cudaErrorIllegalAddress,
              "a tensor copy with " + hex(address) + ", which is not in dynamic shared memory",
              site);
  }
  const auto offset = static_cast<uint32_t>(address - region->begin);
  if (offset % alignment != 0) {
    fail_with(cudaErrorMisalignedAddress,
              "a tensor copy with byte " + std::to_string(offset) +
                  " of dynamic shared memory: its box begins at multiples of " +
                  std::to_string(alignment),
              site);
  }
  return offset;
}

// Calls part(byte in the box, address in global memory, bytes) for what lies inside of each row.
template <class Part>
void for_each_row(const Box& box, Part part) {
  const MappedMatrix& matrix = box.matrix;
  const int64_t first = std::max<int64_t>(box.column, 0);
  const int64_t end = std::min<int64_t>(box.column + matrix.box_columns, matrix.columns);
  if (first >= end) return;
  for (int64_t row = 0; row < matrix.box_rows; ++row) {
    if (box.row + row < 0 || box.row + row >= matrix.rows) continue;
    const uintptr_t from =
        reinterpret_cast<uintptr_t>(matrix.base) +
        static_cast<uintptr_t>((box.row + row) * matrix.row_bytes + first * matrix.element_bytes);
    const int64_t in_box = row * matrix.box_columns + first - box.column;
    part(static_cast<uint32_t>(in_box * matrix.element_bytes), from,
         static_cast<uint32_t>((end - first) * matrix.element_bytes));
  }
}

// ---- Loads --------------------------------------------------------------------------------------

void land(const BoxLoad& load) {
  const uint32_t total = total_bytes(load.box);
  std::vector<unsigned char> bytes(total, 0);
  for_each_row(load.box, [&](uint32_t in_box, uintptr_t from, uint32_t size) {
    std::memcpy(bytes.data() + in_box, reinterpret_cast<const void*>(from), size);
  });
  Region& region = *region_at(load.to);
  const auto offset = static_cast<uint32_t>(load.to - region.begin);
  for (uint32_t i = 0; i < total; i += kChunk) {
    std::memcpy(reinterpret_cast<void*>(region.begin + place_in_shared(load.box, offset, i)),
                bytes.data() + i, kChunk);
  }
  Mbarrier& barrier = running_cluster->mbarriers.at(load.mbarrier);
  mark_landed(barrier, region, load.to, total);
  complete_bytes(barrier, total);
}

// The bytes in shared memory, of this block or another one.
void check_target(Region& region, const BoxLoad& load, Site site) {
  const auto instruction = reinterpret_cast<uintptr_t>(site.instruction);
  const uint32_t total = total_bytes(load.box);
  const bool remote = region.block != running_block->rank;
  if (load.to + total > region.end) {
    fail_with(cudaErrorIllegalAddress,
              "out-of-bounds write of " + std::to_string(total) + " bytes at " + hex(load.to) +
                  ", of which only " + std::to_string(region.end - load.to) + " lie in it",
              site);
  }
  // The other block knows of the copy once it has waited for its own mbarrier.
  if (remote) check_reachable(region, load.to, site);
  check_overwritten(region, load.to, total, site);
  check_race(region, load.to, total, Access::kWrite, instruction);
}

void load_to_block(const BoxLoad& load, Site site) {
  check_place(load.box, load.to, site);
  Region& region = *region_at(load.to);
  const Mbarrier& barrier = mbarrier_for_copy(load.mbarrier, site);
  check_target(region, load, site);
  // Who overwrites the source has to have heard of the phase, and so of the copy's end.
  for_each_row(load.box, [&](uint32_t, uintptr_t from, uint32_t size) {
    note_read(*region_at(from), from, size, agent_stamp(barrier.agent, barrier.phase + 1));
  });
  if (delayed) {
    mark_in_flight(region, load.to, total_bytes(load.box));
    running_cluster->blocks[region.block].box_loads.push_back(load);
  } else {
    land(load);
  }
}

void check_source(const Box& box, Site site) {
  for_each_row(box, [&](uint32_t, uintptr_t from, uint32_t size) {
    check_at(from, size, Access::kRead, reinterpret_cast<uintptr_t>(site.instruction));
    check_fenced_in_global(*region_at(from), from, size, site);
  });
}

uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// ---- Stores -------------------------------------------------------------------------------------

void write_box(const BoxStore& store) {
  for_each_row(store.box, [&](uint32_t in_box, uintptr_t to, uint32_t size) {
    const unsigned char* from = store.bytes.data() + in_box;
    if (!store.add) {
      std::memcpy(reinterpret_cast<void*>(to), from, size);
      return;
    }
    for (uint32_t i = 0; i < size; i += sizeof(float)) {
      float sum, value;
      std::memcpy(&sum, reinterpret_cast<const void*>(to + i), sizeof(sum));
      std::memcpy(&value, from + i, sizeof(value));
      sum += value;
      std::memcpy(reinterpret_cast<void*>(to + i), &sum, sizeof(sum));
    }
  });
}

void finish_read(BoxStore& store) {
  if (!store.is_read) end_read(store.read);
  store.is_read = true;
}

Site caller(const void* return_address) { return {nullptr, 0, return_address}; }

}  // namespace

void encode_tensor_map(void* map, const MappedMatrix& matrix) {
  const EncodedMap encoded{kMark, matrix};
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof(encoded));
}

void tma_prefetch(const void* map) { box_of(map, 0, 0, caller(__builtin_return_address(0))); }

void tma_load_2d(void* shared, const void* map, int row, int column, void* barrier) {
  const Site site = caller(__builtin_return_address(0));
  const Box box = box_of(map, row, column, site);
  check_source(box, site);
  load_to_block({box, address_of(shared), address_of(barrier)}, site);
}

void tma_load_2d_multicast(void* shared, const void* map, int row, int column, void* barrier,
                           uint16_t blocks) {
  const Site site = caller(__builtin_return_address(0));
  const uint32_t size = running_cluster->size;
  if (blocks == 0 || blocks >> size != 0) {
    fail(("a tensor copy to the blocks " + hex(blocks) + " of a cluster that has " +
          std::to_string(size))
             .c_str(),
         site);
  }
  const Box box = box_of(map, row, column, site);
  check_source(box, site);
  for (uint32_t rank = 0; rank < size; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    load_to_block({box, map_to_rank(address_of(shared), rank, site),
                   map_to_rank(address_of(barrier), rank, site)},
                  site);
  }
}

void tma_store_2d(const void* map, int row, int column, const void* shared, bool add) {
  const Site site = caller(__builtin_return_address(0));
  const uint32_t rank = running->rank;
  BoxStore store{
      box_of(map, row, column, site), add, {rank, rank + 1, own_stamp(), site, {}}, false, {}};
  if (add && !store.box.matrix.is_float) {
    fail("tma_reduce_add_2d to a matrix that is not of floats", site);
  }
  const uint32_t offset = check_place(store.box, reinterpret_cast<uintptr_t>(shared), site);
  store.bytes.resize(total_bytes(store.box));
  for (uint32_t i = 0; i < store.bytes.size(); i += kChunk) {
    const void* chunk = begin_read(store.read, place_in_shared(store.box, offset, i));
    std::memcpy(store.bytes.data() + i, chunk, kChunk);
  }
  for_each_row(store.box, [&](uint32_t, uintptr_t to, uint32_t size) {
    check_fenced_in_global(*region_at(to), to, size, site);
    check_at(to, size, add ? Access::kUpdate : Access::kWrite,
             reinterpret_cast<uintptr_t>(site.instruction));
  });
  running->box_stores.push_back(std::move(store));
}

void tma_store_commit() { running->box_groups.push_back(running->box_stores.size()); }

void tma_store_wait(int groups, bool read_only) {
  Thread& thread = *running;
  const auto keep = static_cast<size_t>(groups);
  const size_t committed = thread.box_groups.empty() ? 0 : thread.box_groups.back();
  if (thread.box_stores.size() > committed) {
    fail("tma_store_wait, with copies that no tma_store_commit has put in a group",
         caller(__builtin_return_address(0)));
  }
  if (thread.box_groups.size() <= keep) return;
  const size_t done = thread.box_groups.size() - keep, end = thread.box_groups[done - 1];
  for (size_t i = 0; i < end; ++i) {
    finish_read(thread.box_stores[i]);
    if (!read_only) write_box(thread.box_stores[i]);
  }
  if (read_only) return;
  thread.box_stores.erase(thread.box_stores.begin(), thread.box_stores.begin() + long(end));
  thread.box_groups.erase(thread.box_groups.begin(), thread.box_groups.begin() + long(done));
  for (size_t& group_end : thread.box_groups) group_end -= end;
}

void finish_boxes(Thread& thread) {
  for (const BoxStore& store : thread.box_stores) {
    if (!store.is_read)
      fail("a thread returned while a copy of it read shared memory", store.read.site);
    write_box(store);
  }
  thread.box_stores.clear();
  thread.box_groups.clear();
  if (running_block->alive == 1 && !running_block->box_loads.empty()) {
    fail("the block ended while a tensor copy to its shared memory was under way", thread.site);
  }
}

bool land_box(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    if (block.box_loads.empty()) continue;
    const BoxLoad load = block.box_loads.back();
    block.box_loads.pop_back();
    land(load);
    return true;
  }
  return false;
}

// Whether boxes land only once nobody can go on, the last one first; else at once.
extern "C" M3I_EMULATOR_API void m3i_emulator_delay_copies(bool delay) { delayed = delay; }

}  // namespace m3i::emulator
