// ldmatrix and mma.sync: the fragments' layouts are those of m3i/gpu/mma.cuh.
#include "emulator/instructions/tile.h"
#include "emulator/numbers/numbers.h"
#include "runtime/launch/report.h"
#include "runtime/memory/access.h"
#include "runtime/memory/race.h"
#include "runtime/threads/scheduler.h"

#include <cstring>
#include <string>
#include <utility>

namespace m3i::emulator {

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

void check_whole_warp(uint32_t lanes, const char* what, Site site) {
  if (lanes != kAllLanes) {
    fail((std::string(what) + " by the lanes " + hex(lanes) + ": expected the whole warp").c_str(),
         site);
  }
}

Site caller(const void* return_address) { return {nullptr, 0, return_address}; }

// ---- ldmatrix -----------------------------------------------------------------------------------

struct Loaded {
  const void* row;
  int count;
  bool transposed;
  uint32_t* words;
};

void complete_load(uint32_t lanes, void* const* payloads, Site site) {
  check_whole_warp(lanes, "ldmatrix", site);
  const auto load = [&](uint32_t lane) -> const Loaded& {
    return *static_cast<const Loaded*>(payloads[lane]);
  };
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const Loaded& own = load(lane);
    for (int i = 0; i < own.count; ++i) {
      uint16_t pair[2];
      for (uint32_t k = 0; k < 2; ++k) {
        uint32_t row = lane / 4, column = 2 * (lane % 4) + k;
        if (own.transposed) std::swap(row, column);
        const void* begin = load(8 * static_cast<uint32_t>(i) + row).row;
        std::memcpy(&pair[k], static_cast<const uint16_t*>(begin) + column, sizeof(uint16_t));
      }
      own.words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

// ---- mma ----------------------------------------------------------------------------------------

struct Multiplied {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

constexpr uint32_t kRows = 16, kColumns = 8;

// Half of a word: element `index` of it.
uint16_t half_of(uint32_t word, uint32_t index) {
  return static_cast<uint16_t>(word >> 16 * index);
}

float element(Product kind, const uint32_t* words, uint32_t word, uint32_t index) {
  switch (kind) {
    case Product::kBFloat16:
      return bfloat16_to_float(half_of(words[word], index));
    case Product::kHalf:
      return half_to_float(half_of(words[word], index));
    case Product::kTf32:
      return tf32_to_float(words[word]);
  }
  return 0;
}

// A[row, k] and B[k, column], from the lanes that hold them. Of the 16-bit types, two neighbours in
// k share a word and k, k + 8 a lane; of tf32, k and k + 4 share a lane.
template <Product kKind>
float element_of_a(void* const* payloads, uint32_t row, uint32_t k) {
  constexpr uint32_t kPack = kKind == Product::kTf32 ? 1 : 2;
  const uint32_t lane = row % 8 * 4 + k % (4 * kPack) / kPack;
  const uint32_t word = row / 8 + 2 * (k / (4 * kPack));
  return element(kKind, static_cast<const Multiplied*>(payloads[lane])->a, word, k % kPack);
}

template <Product kKind>
float element_of_b(void* const* payloads, uint32_t k, uint32_t column) {
  constexpr uint32_t kPack = kKind == Product::kTf32 ? 1 : 2;
  const uint32_t lane = column * 4 + k % (4 * kPack) / kPack;
  return element(kKind, static_cast<const Multiplied*>(payloads[lane])->b, k / (4 * kPack),
                 k % kPack);
}

template <Product kKind>
void complete_product(uint32_t lanes, void* const* payloads, Site site) {
  check_whole_warp(lanes, "mma", site);
  constexpr uint32_t kDepth = kKind == Product::kTf32 ? 8 : 16;
  float a[kRows][kDepth], b[kDepth][kColumns];
  for (uint32_t k = 0; k < kDepth; ++k) {
    for (uint32_t i = 0; i < kRows; ++i) a[i][k] = element_of_a<kKind>(payloads, i, k);
    for (uint32_t j = 0; j < kColumns; ++j) b[k][j] = element_of_b<kKind>(payloads, k, j);
  }
  for (uint32_t i = 0; i < kRows; ++i) {
    for (uint32_t j = 0; j < kColumns; ++j) {
      float& d = static_cast<Multiplied*>(payloads[i % 8 * 4 + j / 2])->d[i / 8 * 2 + j % 2];
      for (uint32_t k = 0; k < kDepth; ++k) d += a[i][k] * b[k][j];
    }
  }
}

}  // namespace

void load_matrices(uint32_t* words, int count, bool transposed, const void* row) {
  const void* return_address = __builtin_return_address(0);
  // The lanes beyond the last matrix's rows give an address that nobody reads.
  if (running->lane < 8 * static_cast<uint32_t>(count)) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    const auto instruction = reinterpret_cast<uintptr_t>(return_address);
    check_aligned(address, 16, Access::kRead, instruction);
    shared_region(address, instruction);
  }
  Loaded own{row, count, transposed, words};
  meet(kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", complete_load, &own,
       caller(return_address));
}

void mma(Product kind, float* d, const uint32_t* a, const uint32_t* b) {
  const Site site = caller(__builtin_return_address(0));
  Multiplied own{d, a, b};
  switch (kind) {
    case Product::kBFloat16:
      return meet(kAllLanes, "mma (bf16)", complete_product<Product::kBFloat16>, &own, site);
    case Product::kHalf:
      return meet(kAllLanes, "mma (f16)", complete_product<Product::kHalf>, &own, site);
    case Product::kTf32:
      return meet(kAllLanes, "mma (tf32)", complete_product<Product::kTf32>, &own, site);
  }
}

void red_add(float* to, const float* values, int size) {
  check_aligned(reinterpret_cast<uintptr_t>(to), sizeof(float) * static_cast<size_t>(size),
                Access::kUpdate, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  for (int i = 0; i < size; ++i) to[i] += values[i];
}

}  // namespace m3i::emulator
