#include "libraries/library.h"

#include <set>

namespace m3i::null {

namespace {
std::set<const void*>& handles() {
  static auto* all = new std::set<const void*>;
  return *all;
}

}  // namespace

Handle* new_handle() {
  auto* handle = new Handle;
  std::lock_guard<std::recursive_mutex> guard(lock());
  handles().insert(handle);
  return handle;
}

void record_library_call(const char* library, const char* call, cudaStream_t on) {
  Stream& stream = stream_of(on);
  Capture* capture = capture_of(stream);
  {
    Record record("library");
    record.text("library", library).text("call", call).number("stream", stream.id);
    if (capture != nullptr) record.number("capture", static_cast<long long>(capture->id));
    if (lines_of_launches()) record.python_line();
  }
  next_operation(stream);
  add_to_capture(stream, true);
}

}  // namespace m3i::null

using namespace m3i::null;

M3I_EXPORT long null_cuda_library_call(const char* library, const char* call, const void* first) {
  cudaStream_t stream = nullptr;
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    if (handles().count(first)) stream = static_cast<const Handle*>(first)->stream;
  }
  record_library_call(library, call, stream);
  return 0;
}

M3I_EXPORT long null_cuda_unsupported(const char* library, const char* call) {
  Record("unsupported").text("library", library).text("call", call).python_line();
  return cudaErrorNotSupported;
}
