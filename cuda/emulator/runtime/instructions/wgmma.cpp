// wgmma.mma_async: computed when the last thread of the warpgroup comes, seen by each thread when
// it waits.
#include "emulator/instructions/wgmma.h"

#include "emulator/numbers/numbers.h"
#include "runtime/instructions/async.h"
#include "runtime/launch/device.h"
#include "runtime/launch/report.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace m3i::emulator {

namespace {

constexpr uint32_t kRows = 64, kDepth = 16;
constexpr uint32_t kMostColumns = 256;
constexpr uint32_t kMark = 0x7fa5a5a5;  // a signalling NaN: in registers whose result is under way

struct Payload {
  float* d;
  const WarpgroupProduct* product;
  Site site;
};

struct Operands {
  float a[kRows][kDepth];
  float b[kDepth][kMostColumns];
};

// ---- The threads --------------------------------------------------------------------------------

uint32_t index_of(const Thread& thread) { return thread.rank / kWarpgroupSize; }

Warpgroup& warpgroup_of(const Thread& thread, Site site) {
  Block& block = *running_block;
  const size_t whole = block.threads.size() / kWarpgroupSize;
  if (block.warpgroups.empty()) block.warpgroups.resize(whole);
  if (index_of(thread) >= whole) {
    fail("wgmma by a warp that is not one of four whole ones from a multiple of four on", site);
  }
  return block.warpgroups[index_of(thread)];
}

Thread& member(uint32_t first, uint32_t i) { return running_block->threads[first + i]; }

const Payload& payload(const Warpgroup& group, uint32_t i) {
  return *static_cast<const Payload*>(group.payloads[i]);
}

bool same_product(const WarpgroupProduct& p, const WarpgroupProduct& q) {
  return p.kind == q.kind && p.columns == q.columns && p.accumulate == q.accumulate &&
         p.a_is_m_major == q.a_is_m_major && p.b_is_n_major == q.b_is_n_major &&
         (p.a_words ? q.a_words != nullptr : !q.a_words && p.a == q.a) && p.b == q.b;
}

void check_same_product(const Warpgroup& group, uint32_t first) {
  const Payload& own = payload(group, 0);
  for (uint32_t i = 1; i < kWarpgroupSize; ++i) {
    const Payload& other = payload(group, i);
    if (same_product(*own.product, *other.product)) continue;
    fail_thread(member(first, i),
                "wgmma with other operands than thread " + to_string(member(first, 0).index) +
                    " of its warpgroup has, " + to_string(own.site),
                other.site);
  }
}

// ---- A and B ------------------------------------------------------------------------------------

// A matrix descriptor, and how the matrix lies: `rows` along M or N, 16 along K.
struct Matrix {
  uint32_t start, leading, stride, swizzle_bytes;
  bool row_major;  // M- or N-major

  Matrix(uint64_t descriptor, bool transposed, Site site) : row_major(transposed) {
    const auto field = [&](unsigned from) {
      return static_cast<uint32_t>(descriptor >> from & 0x3fffu) << 4;
    };
    start = field(0);
    leading = field(16);
    stride = field(32);
    constexpr uint32_t kBytes[] = {16, 128, 64, 32};
    swizzle_bytes = kBytes[descriptor >> 62];
    if (descriptor >> 49 & 7u) fail("wgmma: a base offset is not emulated", site);
    // Eight rows of the swizzle's width are one pattern.
    if (swizzle_bytes > 16 && (start & (8 * swizzle_bytes - 1) & ~127u) != 0) {
      fail(("wgmma: the pattern of the " + std::to_string(swizzle_bytes) +
            "-byte swizzle does not start at a multiple of its " +
            std::to_string(8 * swizzle_bytes) + " bytes: start address " + hex(start))
               .c_str(),
           site);
    }
  }

  // Of 8 elements along K from (row, 8 i) on, or along M or N from (8 i, k) on.
  uint32_t chunk(uint32_t row, uint32_t k) const {
    if (row_major) {
      const uint32_t i = row / 8, across = swizzle_bytes / kChunk;
      if (across == 1) return k % 8 * kChunk + k / 8 * leading + i * stride;
      return i % across * kChunk + i / across * leading + k % 8 * swizzle_bytes + k / 8 * stride;
    }
    const uint32_t next = swizzle_bytes == kChunk ? leading : kChunk;
    return row % 8 * swizzle_bytes + row / 8 * stride + k / 8 * next;
  }

  // Bits 4 to 6 of the address, as far as the swizzle goes, by those three above them.
  uint32_t address(uint32_t row, uint32_t k) const {
    const uint32_t linear = (start + chunk(row, k)) & 0x3ffffu;
    return linear ^ (linear >> 3 & (swizzle_bytes - 1) & ~15u);
  }
};

void to_floats(Product kind, const void* chunk, float (&values)[8]) {
  uint16_t bits[8];
  std::memcpy(bits, chunk, sizeof(bits));
  for (uint32_t i = 0; i < 8; ++i) {
    values[i] = kind == Product::kHalf ? half_to_float(bits[i]) : bfloat16_to_float(bits[i]);
  }
}

// Calls put(row, k, value) for each element of a matrix in shared memory.
template <class Put>
void load_shared(AsyncRead& read, Product kind, const Matrix& matrix, uint32_t rows, Put put) {
  const uint32_t row_step = matrix.row_major ? 8 : 1, k_step = matrix.row_major ? 1 : 8;
  for (uint32_t row = 0; row < rows; row += row_step) {
    for (uint32_t k = 0; k < kDepth; k += k_step) {
      float values[8];
      to_floats(kind, begin_read(read, matrix.address(row, k)), values);
      for (uint32_t i = 0; i < 8; ++i) {
        put(row + (matrix.row_major ? i : 0), k + (matrix.row_major ? 0 : i), values[i]);
      }
    }
  }
}

void load_registers(const Warpgroup& group, Product kind, float (&a)[kRows][kDepth]) {
  for (uint32_t i = 0; i < kWarpgroupSize; ++i) {
    const uint32_t* words = payload(group, i).product->a_words;
    const uint32_t row = i / kWarpSize * 16 + i % kWarpSize / 4, k = i % 4 * 2;
    for (uint32_t e = 0; e < 8; ++e) {
      const auto bits = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
      a[row + e / 2 % 2 * 8][k + e / 4 * 8 + e % 2] =
          kind == Product::kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
    }
  }
}

void load_operands(const Warpgroup& group, AsyncRead& read, Operands& operands) {
  const WarpgroupProduct& product = *payload(group, 0).product;
  if (product.a_words) {
    load_registers(group, product.kind, operands.a);
  } else {
    load_shared(read, product.kind, Matrix(product.a, product.a_is_m_major, read.site), kRows,
                [&](uint32_t row, uint32_t k, float value) { operands.a[row][k] = value; });
  }
  load_shared(read, product.kind, Matrix(product.b, product.b_is_n_major, read.site),
              product.columns,
              [&](uint32_t row, uint32_t k, float value) { operands.b[k][row] = value; });
}

// In the order of k. A product of two 16-bit numbers is exact in float, so that it makes no
// difference whether the compiler fuses, or how many it takes at once.
#ifdef __x86_64__
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(const Operands& operands, uint32_t columns, float* d) {
  for (uint32_t i = 0; i < kRows; ++i) {
    for (uint32_t j = 0; j < columns; j += 8) {
      float sum[8];
      std::memcpy(sum, d + i * columns + j, sizeof(sum));
      for (uint32_t k = 0; k < kDepth; ++k) {
        for (uint32_t e = 0; e < 8; ++e) sum[e] += operands.a[i][k] * operands.b[k][j + e];
      }
      std::memcpy(d + i * columns + j, sum, sizeof(sum));
    }
  }
}

// ---- D ------------------------------------------------------------------------------------------

// Where registers 4j .. 4j + 3 of a thread belong: two neighbours in a row, two eight rows below.
template <class Body>
void for_each_register(Accumulator& accumulator, uint32_t i, Body body) {
  const uint32_t row = i / kWarpSize * 16 + i % kWarpSize / 4;
  float* d = accumulator.registers[i];
  for (uint32_t r = 0; r < accumulator.columns / 2; ++r) {
    const uint32_t column = r / 4 * 8 + i % 4 * 2 + r % 2;
    body(d[r], accumulator.values[(row + r / 2 % 2 * 8) * accumulator.columns + column]);
  }
}

// Fails if somebody changed the registers of a thread since a product that is under way.
void check_untouched(Accumulator& accumulator, uint32_t i, const Thread& thread, Site site) {
  const float* d = accumulator.registers[i];
  const auto is_marked = [](float value) { return bits_of_float(value) == kMark; };
  if (!std::all_of(d, d + accumulator.columns / 2, is_marked)) {
    fail_thread(thread,
                "an accumulator of wgmma was written before wgmma_wait: its product is "
                "under way",
                site);
  }
}

Accumulator& accumulator_of(Warpgroup& group, uint32_t columns) {
  float* d = payload(group, 0).d;
  for (Accumulator& other : group.accumulators) {
    if (other.registers[0] == d && other.columns == columns) return other;
  }
  group.accumulators.push_back(
      {columns, 0, std::vector<float>(kRows * columns), std::vector<float*>(kWarpgroupSize), {}});
  return group.accumulators.back();
}

// The accumulator with what the registers hold that are not under way already.
Accumulator& gather(Warpgroup& group, uint32_t first) {
  Accumulator& accumulator = accumulator_of(group, payload(group, 0).product->columns);
  for (uint32_t i = 0; i < kWarpgroupSize; ++i) {
    const Thread& thread = member(first, i);
    const Payload& own = payload(group, i);
    if (accumulator.in_flight[i]) {
      check_untouched(accumulator, i, thread, own.site);
      continue;
    }
    if (!thread.products_fenced) {
      fail_thread(thread, "wgmma without wgmma_fence since its registers could be written",
                  own.site);
    }
    accumulator.registers[i] = own.d;
    for_each_register(accumulator, i, [](float& d, float& value) { value = d; });
  }
  return accumulator;
}

void complete(Warpgroup& group, uint32_t first) {
  check_same_product(group, first);
  const Payload& own = payload(group, kWarpgroupSize - 1);
  const WarpgroupProduct& product = *own.product;
  const uint64_t clock = ++group.issued;
  group.reads.push_back(
      {first, first + kWarpgroupSize, agent_stamp(group.agent, clock), own.site, {}});
  static Operands operands;
  load_operands(group, group.reads.back(), operands);
  Accumulator& accumulator = gather(group, first);
  if (!product.accumulate) {
    std::fill(accumulator.values.begin(), accumulator.values.end(), 0.0f);
  }
  multiply(operands, product.columns, accumulator.values.data());
  accumulator.end = clock;
  for (float* d : accumulator.registers) std::fill_n(d, product.columns / 2, float_of_bits(kMark));
  accumulator.in_flight.set();
}

// Puts the sums of accumulators to which no later product adds into the thread's registers.
void deliver(Warpgroup& group, uint64_t done, const Thread& thread, Site site) {
  const uint32_t i = thread.rank % kWarpgroupSize;
  for (Accumulator& accumulator : group.accumulators) {
    if (accumulator.end > done || !accumulator.in_flight[i]) continue;
    check_untouched(accumulator, i, thread, site);
    for_each_register(accumulator, i, [](float& d, float& value) { d = value; });
    accumulator.in_flight.reset(i);
  }
  const auto idle = [](const Accumulator& accumulator) { return accumulator.in_flight.none(); };
  group.accumulators.erase(
      std::remove_if(group.accumulators.begin(), group.accumulators.end(), idle),
      group.accumulators.end());
}

Site caller(const void* return_address) { return {nullptr, 0, return_address}; }

}  // namespace

void wgmma(float* d, const WarpgroupProduct& product) {
  Thread& thread = *running;
  const Site site = caller(__builtin_return_address(0));
  require_architecture(90, "wgmma", site);
  Warpgroup& group = warpgroup_of(thread, site);
  Payload own{d, &product, site};
  const uint32_t first = index_of(thread) * kWarpgroupSize;
  if (group.payloads.empty()) {
    group.payloads.resize(kWarpgroupSize);
    group.agent = add_agent();
  }
  group.payloads[thread.rank - first] = &own;
  if (++group.arrived < kWarpgroupSize) {
    thread.operation = "wgmma";
    return wait(Thread::State::kAtWarpgroup, site);
  }
  complete(group, first);
  group.arrived = 0;
  for (uint32_t i = 0; i < kWarpgroupSize; ++i) running_block->make_ready(member(first, i));
}

void wgmma_fence() { running->products_fenced = true; }

void wgmma_commit() {
  Thread& thread = *running;
  thread.products_committed = warpgroup_of(thread, caller(__builtin_return_address(0))).issued;
  thread.product_groups.push_back(thread.products_committed);
}

void wgmma_wait(int groups) {
  Thread& thread = *running;
  const Site site = caller(__builtin_return_address(0));
  Warpgroup& group = warpgroup_of(thread, site);
  std::vector<uint64_t>& ends = thread.product_groups;
  if (group.issued > thread.products_committed) {
    fail("wgmma_wait, with products that no wgmma_commit has put in a group", site);
  }
  if (ends.size() <= static_cast<size_t>(groups)) return;
  const uint64_t done = ends[ends.size() - static_cast<size_t>(groups) - 1];
  ends.erase(ends.begin(), ends.end() - groups);
  while (!group.reads.empty() && group.issued - group.reads.size() < done) {
    end_read(group.reads.front());
    group.reads.pop_front();
  }
  deliver(group, done, thread, site);
  hear_of_agent(thread, group.agent, static_cast<uint32_t>(done));
  thread.products_fenced = false;
}

void finish_products(const Thread& thread) {
  if (running_block->warpgroups.empty()) return;
  const uint32_t i = thread.rank % kWarpgroupSize;
  if (index_of(thread) >= running_block->warpgroups.size()) return;
  for (const Accumulator& accumulator : running_block->warpgroups[index_of(thread)].accumulators) {
    if (accumulator.in_flight[i]) fail("a thread returned without wgmma_wait", thread.site);
  }
}

}  // namespace m3i::emulator
