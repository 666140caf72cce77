// Communicators of the null NCCL: how ranks meet, and wait for each other.
#include "libraries/nccl_ranks.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "libraries/nccl_reduce.h"
#include "runtime/null.h"

namespace m3i::null {
namespace {

constexpr int kLooksAwake = 100;
constexpr useconds_t kNapMicroseconds = 100;

double patience_seconds() {
  const char* text = std::getenv("NULL_CUDA_NCCL_SECONDS");
  return text != nullptr && *text != '\0' ? std::atof(text) : 300;
}

}  // namespace

bool wait_for(const std::function<bool()>& fulfilled) {
  auto ends = std::chrono::steady_clock::now() + std::chrono::duration<double>(patience_seconds());
  for (int looks = 0; !fulfilled(); ++looks) {
    if (std::chrono::steady_clock::now() > ends) return false;
    looks < kLooksAwake ? sched_yield() : usleep(kNapMicroseconds);
  }
  return true;
}

ncclResult_t fault(const std::string& what) {
  Record("fault").text("what", what).python_line();
  std::fprintf(stderr, "null NCCL: %s\n", what.c_str());
  return ncclInvalidUsage;
}

ncclResult_t barrier(ncclComm& comm, const std::string& doing) {
  uint64_t own = ++comm.barriers;
  comm.shared->arrived[comm.rank].store(own);
  for (int rank = 0; rank < comm.ranks; ++rank) {
    if (!wait_for([&] { return comm.shared->arrived[rank].load() >= own; })) {
      return fault("rank " + std::to_string(rank) + " has not come to rank " +
                   std::to_string(comm.rank) + "'s " + doing);
    }
  }
  return ncclSuccess;
}

}  // namespace m3i::null

namespace {

using m3i::null::barrier;
using m3i::null::fault;
using m3i::null::kMostRanks;
using m3i::null::Shared;

Shared* open_shared(const std::string& name) {
  int file = shm_open(name.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return nullptr;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<Shared*>(memory);
}

ncclResult_t join(ncclComm_t* comm, const std::string& name, int ranks, int rank) {
  if (ranks > kMostRanks) return fault("more ranks than " + std::to_string(kMostRanks));
  Shared* shared = open_shared(name);
  if (shared == nullptr) return ncclSystemError;
  *comm = new ncclComm{shared, name, rank, ranks, m3i::null::current_device(), 0, 0, {}};
  ncclResult_t error = barrier(**comm, "ncclCommInitRank");
  // All have it mapped: the name may go, so that no run leaves a file behind.
  if (error == ncclSuccess && rank == 0) shm_unlink(name.c_str());
  return error;
}

}  // namespace

M3I_EXPORT ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

M3I_EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : "error of the null NCCL";
}

M3I_EXPORT const char* ncclGetLastError(ncclComm_t) { return ""; }

M3I_EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> made{0};
  std::memset(id->internal, 0, sizeof id->internal);
  std::snprintf(
      id->internal, sizeof id->internal, "/null_nccl_%d_%d_%lld", getpid(), made++,
      static_cast<long long>(std::chrono::steady_clock::now().time_since_epoch().count()));
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  return join(comm, id.internal, ranks, rank);
}

M3I_EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id,
                                               int rank, ncclConfig_t*) {
  return join(comm, id.internal, ranks, rank);
}

M3I_EXPORT ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* result,
                                      ncclConfig_t*) {
  struct Choice {
    int color, key;
  };
  Choice own{color, key};
  std::memcpy(comm->shared->slots[comm->rank], &own, sizeof own);
  if (ncclResult_t error = barrier(*comm, "ncclCommSplit")) return error;
  std::vector<std::pair<int, int>> members;  // key, rank
  for (int rank = 0; rank < comm->ranks; ++rank) {
    Choice choice;
    std::memcpy(&choice, comm->shared->slots[rank], sizeof choice);
    if (choice.color == color) members.emplace_back(choice.key, rank);
  }
  if (ncclResult_t error = barrier(*comm, "ncclCommSplit")) return error;
  int number = comm->splits++;
  *result = nullptr;
  if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
  std::sort(members.begin(), members.end());
  auto own_place = std::find(members.begin(), members.end(), std::pair{key, comm->rank});
  std::string name = comm->name + "_" + std::to_string(number) + "_" + std::to_string(color);
  return join(result, name, static_cast<int>(members.size()),
              static_cast<int>(own_place - members.begin()));
}

M3I_EXPORT ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->ranks;
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  *device = comm->device;
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

// The memory stays: threads of torch may still name the communicator.
M3I_EXPORT ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
M3I_EXPORT ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
M3I_EXPORT ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }

M3I_EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* operation, void* scalar,
                                                 ncclDataType_t type, ncclScalarResidence_t,
                                                 ncclComm_t comm) {
  comm->scales.push_back(m3i::null::number_at(scalar, type));
  *operation = static_cast<ncclRedOp_t>(ncclNumOps + static_cast<int>(comm->scales.size()) - 1);
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

// Registered memory is faster on a GPU, and nothing else.
M3I_EXPORT ncclResult_t ncclCommRegister(const ncclComm_t comm, void*, size_t, void** handle) {
  *handle = comm;
  return ncclSuccess;
}

M3I_EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }

M3I_EXPORT ncclResult_t ncclMemAlloc(void** pointer, size_t bytes) {
  return cudaMalloc(pointer, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

M3I_EXPORT ncclResult_t ncclMemFree(void* pointer) {
  return cudaFree(pointer) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
