// Memory: the host's pages, with a side (device, pinned), a device and the card's limit.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>

#include "runtime/null.h"

namespace m3i::null {

namespace {

std::map<const char*, Allocation>& allocations() {
  static auto* all = new std::map<const char*, Allocation>;
  return *all;
}

std::vector<size_t>& allocated() {
  static auto* bytes = new std::vector<size_t>(static_cast<size_t>(std::max(device_count(), 1)));
  return *bytes;
}

// What a device may hold: NULL_CUDA_MEMORY in bytes, else the card's memory.
size_t memory_limit() {
  static const size_t limit = [] {
    const char* text = std::getenv("NULL_CUDA_MEMORY");
    return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : card().memory;
  }();
  return limit;
}

const char* name_of(Side side) {
  return side == Side::kPageable ? "pageable" : side == Side::kPinned ? "pinned" : "device";
}

cudaError_t allocate(void** pointer, size_t bytes, Side side, const char* call) {
  size_t size = std::max<size_t>(bytes, 1);
  size_t device = static_cast<size_t>(current_device());
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    bool fits = side != Side::kDevice || allocated()[device] + size <= memory_limit();
    void* pages = fits ? mmap(nullptr, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                       : MAP_FAILED;
    if (pages != MAP_FAILED) {
      auto* begin = static_cast<char*>(pages);
      allocations()[begin] = {begin, size, side, current_device()};
      if (side == Side::kDevice) allocated()[device] += size;
      *pointer = pages;
    } else {
      *pointer = nullptr;
    }
  }
  if (*pointer == nullptr) return fail(cudaErrorMemoryAllocation, call);
  Record("allocate").text("side", name_of(side)).number("bytes", static_cast<long long>(size));
  return cudaSuccess;
}

// A copy whose source or destination the host must leave alone until it knows that it is done.
struct PendingCopy {
  const char* source;
  char* destination;
  size_t bytes;
  uint64_t source_sum;        // of a pinned source, when the copy was asked for
  std::vector<char> arrives;  // of a pinned destination, where copies are delayed
  Stream* stream;
  long operation;
  std::string line;
};

std::list<PendingCopy>& pending() {
  static auto* copies = new std::list<PendingCopy>;
  return *copies;
}

// NULL_CUDA_DELAY=1: what a copy brings to pinned memory is there when the host knows it, not
// before.
bool delayed() {
  static const bool on = [] {
    const char* text = std::getenv("NULL_CUDA_DELAY");
    return text != nullptr && std::string(text) == "1";
  }();
  return on;
}

uint64_t sum_of(const char* bytes, size_t count) {
  uint64_t sum = 0xcbf29ce484222325ull;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    sum = (sum ^ word) * 0x100000001b3ull;
    sum ^= sum >> 29;
  }
  for (; i < count; ++i) sum = (sum ^ static_cast<unsigned char>(bytes[i])) * 0x100000001b3ull;
  return sum;
}

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

// Ends the copies that `is_done` names: what was delayed arrives, and a pinned source that has been
// written since is a fault of who asked for the copy.
template <typename Predicate>
void finish(Predicate is_done) {
  std::vector<std::string> faults;
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    for (auto copy = pending().begin(); copy != pending().end();) {
      if (!is_done(*copy)) {
        ++copy;
        continue;
      }
      if (!copy->arrives.empty()) {
        std::memcpy(copy->destination, copy->arrives.data(), copy->bytes);
      } else if (copy->destination == nullptr &&
                 sum_of(copy->source, copy->bytes) != copy->source_sum) {
        faults.push_back(copy->line);
      }
      copy = pending().erase(copy);
    }
  }
  for (const std::string& line : faults) {
    Record("fault")
        .text("what", "pinned memory written before the copy from it was known to be done")
        .text("line", line);
  }
}

void remember(char* to, const char* from, size_t bytes, Stream& stream, const std::string& line) {
  bool from_pinned = side_of(from) == Side::kPinned;
  bool late = side_of(to) == Side::kPinned && delayed();
  if (!from_pinned && !late) return;
  PendingCopy copy{from,    late ? to : nullptr,       bytes, 0, {},
                   &stream, operations_so_far(stream), line};
  if (late) {
    copy.arrives.assign(from, from + bytes);
    std::memset(to, 0xff, bytes);
  } else {
    copy.source_sum = sum_of(from, bytes);
  }
  std::lock_guard<std::recursive_mutex> guard(lock());
  pending().push_back(std::move(copy));
}

cudaError_t copy(void* to, const void* from, size_t bytes, Stream& stream, bool asynchronous,
                 const char* call) {
  if (bytes == 0) return cudaSuccess;
  Side source = side_of(from), target = side_of(to);
  Capture* capture = capture_of(stream);
  bool pageable = source == Side::kPageable || target == Side::kPageable;
  bool of_host = pageable || source == Side::kPinned || target == Side::kPinned;
  std::string line = of_host ? python_line() : "";
  if (capture != nullptr && (pageable || !asynchronous)) {
    capture->invalidated = cudaErrorStreamCaptureUnsupported;
    return fail(cudaErrorStreamCaptureUnsupported, std::string(call) + " of pageable memory");
  }
  {
    Record record("copy");
    record.text("call", call).text("from", name_of(source)).text("to", name_of(target));
    record.number("bytes", static_cast<long long>(bytes)).number("stream", stream.id);
    if (capture != nullptr) record.number("capture", static_cast<long long>(capture->id));
    if (!line.empty()) record.text("line", line);
  }
  // What an earlier copy of the same stream brings to this source is there on a GPU.
  const char* begin = static_cast<const char*>(from);
  finish([&](const PendingCopy& earlier) {
    return earlier.destination != nullptr && earlier.stream == &stream &&
           overlap(earlier.destination, earlier.bytes, begin, bytes);
  });
  next_operation(stream);
  add_to_capture(stream, false);
  if (capture != nullptr) return cudaSuccess;
  std::memmove(to, from, bytes);
  if (asynchronous && !pageable) {
    remember(static_cast<char*>(to), begin, bytes, stream, line);
  }
  return cudaSuccess;
}

// Writes the byte `value`. Zeros of a whole page are the page that the system has not made yet, so
// that what a model at full size fills with zeros takes no memory of the host.
void write(char* begin, int value, size_t bytes) {
  constexpr uintptr_t kPage = 4096;
  char* first = begin + (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
  char* end = begin + bytes;
  char* last = end - reinterpret_cast<uintptr_t>(end) % kPage;
  bool own = value == 0 && first < last && side_of(begin) == Side::kDevice;
  if (!own || madvise(first, static_cast<size_t>(last - first), MADV_DONTNEED) != 0) {
    std::memset(begin, value, bytes);
    return;
  }
  std::memset(begin, 0, static_cast<size_t>(first - begin));
  std::memset(last, 0, static_cast<size_t>(end - last));
}

cudaError_t fill(void* pointer, int value, size_t bytes, Stream& stream) {
  Record record("fill");
  record.number("bytes", static_cast<long long>(bytes)).number("stream", stream.id);
  Capture* capture = capture_of(stream);
  if (capture != nullptr) record.number("capture", static_cast<long long>(capture->id));
  next_operation(stream);
  add_to_capture(stream, false);
  if (capture == nullptr) write(static_cast<char*>(pointer), value, bytes);
  return cudaSuccess;
}

// Ends the copies from and to memory that goes; pinned memory must not go before they are done.
void finish_within(const Allocation& gone) {
  bool in_flight = false;
  finish([&](const PendingCopy& copy) {
    bool within = overlap(gone.begin, gone.bytes, copy.source, copy.bytes) ||
                  (copy.destination != nullptr &&
                   overlap(gone.begin, gone.bytes, copy.destination, copy.bytes));
    in_flight |= within;
    return within;
  });
  if (in_flight && gone.side == Side::kPinned) {
    Record("fault")
        .text("what", "pinned memory freed before the copy of it was known to be done")
        .python_line();
  }
}

// Forgets the allocation that begins there, and returns it; one that begins at null if none does.
Allocation taken_out(void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  auto at = allocations().find(static_cast<char*>(pointer));
  if (at == allocations().end()) return {};
  Allocation gone = at->second;
  allocations().erase(at);
  if (gone.side == Side::kDevice) allocated()[static_cast<size_t>(gone.device)] -= gone.bytes;
  return gone;
}

cudaError_t release(void* pointer, const char* call) {
  if (pointer == nullptr) return cudaSuccess;
  Allocation gone = taken_out(pointer);
  if (gone.begin == nullptr) return fail(cudaErrorInvalidValue, call);
  finish_within(gone);
  Record("free")
      .text("side", name_of(gone.side))
      .number("bytes", static_cast<long long>(gone.bytes));
  munmap(gone.begin, gone.bytes);
  return cudaSuccess;
}

}  // namespace

const Allocation* allocation_of(const void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  auto after = allocations().upper_bound(static_cast<const char*>(pointer));
  if (after == allocations().begin()) return nullptr;
  const Allocation& candidate = std::prev(after)->second;
  return static_cast<const char*>(pointer) < candidate.begin + candidate.bytes ? &candidate
                                                                               : nullptr;
}

Side side_of(const void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  const Allocation* within = allocation_of(pointer);
  return within != nullptr ? within->side : Side::kPageable;
}

void complete_copies(Stream* stream, long up_to) {
  finish([&](const PendingCopy& copy) { return copy.stream == stream && copy.operation <= up_to; });
}

void complete_all_copies() {
  finish([](const PendingCopy&) { return true; });
}

}  // namespace m3i::null

using namespace m3i::null;

M3I_EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  M3I_ENTER(cudaMalloc)
  if (cudaError_t refused = refuse_in_capture("cudaMalloc")) return refused;
  return allocate(pointer, bytes, Side::kDevice, "cudaMalloc");
}

M3I_EXPORT cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, Side::kDevice, "cudaMallocManaged");
}

M3I_EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes, Side::kDevice, "cudaMallocAsync");
}

M3I_EXPORT cudaError_t cudaFree(void* pointer) {
  // cudaFree(nullptr) only makes the context, and is a customary first call.
  if (pointer == nullptr) return cudaSuccess;
  if (cudaError_t refused = refuse_in_capture("cudaFree")) return refused;
  return release(pointer, "cudaFree");
}

M3I_EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  return release(pointer, "cudaFreeAsync");
}

M3I_EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  M3I_ENTER(cudaHostAlloc)
  if (cudaError_t refused = refuse_in_capture("cudaHostAlloc")) return refused;
  return allocate(pointer, bytes, Side::kPinned, "cudaHostAlloc");
}

M3I_EXPORT cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return cudaHostAlloc(pointer, bytes, 0);
}

M3I_EXPORT cudaError_t cudaFreeHost(void* pointer) { return release(pointer, "cudaFreeHost"); }

M3I_EXPORT cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  auto* begin = static_cast<char*>(pointer);
  allocations()[begin] = {begin, bytes, Side::kPinned, current_device()};
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  Allocation gone = taken_out(pointer);
  if (gone.begin == nullptr) return fail(cudaErrorHostMemoryNotRegistered, "cudaHostUnregister");
  finish_within(gone);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaHostGetDevicePointer(void** of_device, void* of_host, unsigned) {
  *of_device = of_host;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  *total = memory_limit();
  *free_bytes = *total - allocated()[static_cast<size_t>(current_device())];
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                                const void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  std::memset(attributes, 0, sizeof *attributes);
  const Allocation* within = allocation_of(pointer);
  attributes->device = within != nullptr ? within->device : -1;
  attributes->type = cudaMemoryTypeUnregistered;
  if (within == nullptr) return cudaSuccess;
  attributes->type = within->side == Side::kPinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (within->side == Side::kPinned) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  M3I_ENTER(cudaMemcpy)
  if (cudaError_t refused = refuse_in_capture("cudaMemcpy")) return refused;
  return copy(to, from, bytes, stream_of(nullptr), false, "cudaMemcpy");
}

M3I_EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                       cudaStream_t stream) {
  M3I_ENTER(cudaMemcpyAsync)
  return copy(to, from, bytes, stream_of(stream), true, "cudaMemcpyAsync");
}

M3I_EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                           cudaStream_t stream) {
  return copy(to, from, bytes, stream_of(stream), true, "cudaMemcpyPeerAsync");
}

M3I_EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                         size_t from_pitch, size_t width, size_t height,
                                         cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    auto* target = static_cast<char*>(to) + row * to_pitch;
    auto* source = static_cast<const char*>(from) + row * from_pitch;
    cudaError_t error = copy(target, source, width, stream_of(stream), true, "cudaMemcpy2DAsync");
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (cudaError_t refused = refuse_in_capture("cudaMemset")) return refused;
  return fill(pointer, value, bytes, stream_of(nullptr));
}

M3I_EXPORT cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes,
                                       cudaStream_t stream) {
  M3I_ENTER(cudaMemsetAsync)
  return fill(pointer, value, bytes, stream_of(stream));
}
