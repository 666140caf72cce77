// What the files of the null CUDA runtime share: the card, the trace, errors, streams and kernels.
//
// The runtime takes the place of libcudart under a CUDA build of torch on a machine without a GPU.
// Memory is the host's; copies and fills are done at once; launches are checked, recorded and,
// unless a hook computes them, dropped. What a GPU would refuse is refused with CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define M3I_EXPORT extern "C" __attribute__((visibility("default")))

namespace m3i::null {

// ---- The card
// ------------------------------------------------------------------------------------

// What a card says of itself. Bytes, but where a name says otherwise.
struct Card {
  const char* name;
  int major, minor;
  int multiprocessors;
  size_t memory;
  size_t l2_cache;
  size_t shared_per_multiprocessor;
  size_t shared_per_block_optin;
  int memory_bus_bits;
  int clock_khz;
};

// The card of NULL_CUDA_CARD: a100, h100 (the default) or b200. Any other name ends the process.
const Card& card();

// Devices of the process: NULL_CUDA_DEVICES, 1 unless given.
int device_count();

// The calling thread's device.
int current_device();

// ---- Errors
// --------------------------------------------------------------------------------------

// Records the error, keeps it for cudaGetLastError, and returns it.
cudaError_t fail(cudaError_t error, const std::string& what);

// The error that NULL_CUDA_FAIL=CALL:N:CODE asks of the N-th such call of the process; else
// success.
cudaError_t injected_error(const char* call);

#define M3I_ENTER(call)                                                                     \
  if (cudaError_t injected = ::m3i::null::injected_error(#call); injected != cudaSuccess) { \
    return ::m3i::null::fail(injected, #call ", as NULL_CUDA_FAIL asks");                   \
  }

// ---- The trace
// -----------------------------------------------------------------------------------

// One line of JSON in the file of NULL_CUDA_TRACE. Written when it goes out of scope; costs nothing
// where there is no trace. The keys of each kind are listed in README.md.
class Record {
 public:
  explicit Record(const char* kind);
  ~Record();
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  Record& text(const char* key, const std::string& value);
  Record& number(const char* key, long long value);
  Record& triple(const char* key, dim3 value);
  // The Python line that the calling thread is at; no key where there is none.
  Record& python_line();

 private:
  std::string line_;  // empty where nothing is traced
};

bool tracing();

// NULL_CUDA_LINES=1: launches and calls of libraries have their Python line, too.
bool lines_of_launches();

// FILE:LINE of the innermost Python frame of the calling thread whose file lies below
// NULL_CUDA_ROOT and in no site-packages, else of the innermost frame; empty without Python or a
// trace. Takes Python's global lock: the caller must hold no lock that a thread with Python's waits
// for.
std::string python_line();

// ---- Streams
// -------------------------------------------------------------------------------------

// A capture going on, shared by the stream that began it and those that joined it.
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  struct Stream* origin;
  bool active = true;
  cudaError_t invalidated = cudaSuccess;
  std::map<struct Stream*, long> last_work;  // of each stream in it: how many operations it has
  long nodes = 0;
  long launches = 0;
};

using Seen =
    std::map<struct Stream*, long>;  // of each stream: how many operations are ordered before

struct Stream {
  int id = 0;  // 0: the legacy default stream; others are numbered as they are made
  int device = 0;
  int priority = 0;
  unsigned flags = 0;
  std::shared_ptr<Capture> capture;
  Seen seen;  // within the capture
};

// The stream behind a handle.
Stream& stream_of(cudaStream_t handle);

// The capture that the stream is part of; null where there is none.
Capture* capture_of(Stream& stream);

// Counts one operation of the stream to its capture, if there is one.
void add_to_capture(Stream& stream, bool is_launch);

// cudaErrorStreamCaptureUnsupported where a capture forbids the call to this thread, as
// cudaMalloc and synchronous copies are; it ends that capture too, as on a GPU.
cudaError_t refuse_in_capture(const char* call);

// Where an event or stream that this stream's work goes through is complete: copies from pinned
// memory that are ordered before it have been made, and their source may be written again.
void complete_copies(Stream* stream, long up_to);
void complete_all_copies();

// Counts an operation that the host may wait for, and returns its number on the stream.
long next_operation(Stream& stream);
long operations_so_far(Stream& stream);

// ---- Kernels
// -------------------------------------------------------------------------------------

// Has the function launch a kernel of this mangled name, from an image for this architecture.
void register_kernel(const void* function, const std::string& mangled, int architecture);

// ---- Memory
// --------------------------------------------------------------------------------------

enum class Side { kPageable, kPinned, kDevice };

// Where an address lies.
Side side_of(const void* pointer);

// Where the pages are that an allocation, a copy or a kernel's image lies in; null for foreign
// ones.
struct Allocation {
  char* begin;
  size_t bytes;
  Side side;
  int device;
};
const Allocation* allocation_of(const void* pointer);

// Everything that is one process's: taken for each call that changes it.
std::recursive_mutex& lock();

}  // namespace m3i::null
