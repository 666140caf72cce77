// The ranks of a communicator of the null NCCL: the memory that they share, and how they wait for
// each other.
#pragma once

#include <nccl.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace m3i::null {

constexpr size_t kSlotBytes = 1 << 20;
constexpr size_t kMailBytes = 1 << 16;
constexpr int kMostRanks = 16;

// What a rank is about to do.
struct Intent {
  char call[24];
  uint64_t count;
  int type, operation, root;
};

struct Mail {
  std::atomic<uint64_t> sent, taken;  // chunks
  uint64_t bytes;
  char data[kMailBytes];
};

// The memory that the ranks of a communicator share; zero when it is made.
struct Shared {
  std::atomic<uint64_t> arrived[kMostRanks];
  Intent intents[kMostRanks];
  char slots[kMostRanks][kSlotBytes];
  Mail mail[kMostRanks][kMostRanks];
};

// Waits for a condition that another rank fulfils; false where it takes too long. Soon it sleeps
// between two looks, for ranks that outnumber the cores.
bool wait_for(const std::function<bool()>& fulfilled);

// Records a fault, and returns the error of the call that has made it.
ncclResult_t fault(const std::string& what);

// Returns once every rank has come; a fault names the first that has not.
ncclResult_t barrier(ncclComm& comm, const std::string& doing);

}  // namespace m3i::null

struct ncclComm {
  m3i::null::Shared* shared;
  std::string name;
  int rank, ranks, device;
  uint64_t barriers = 0;
  int splits = 0;
  std::vector<double> scales;  // of PreMulSum, by operation - ncclNumOps
};
