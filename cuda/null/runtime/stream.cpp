// Streams, events, captures and graphs: nothing runs late, but the rules of what may follow what
// hold.
#include <algorithm>
#include <functional>

#include "runtime/null.h"

namespace m3i::null {

namespace {

struct Event {
  bool recorded = false;
  Seen seen;                         // what is done once the event is
  std::shared_ptr<Capture> capture;  // that it was last recorded in
};

struct Graph {
  unsigned long long id = 0;
  long nodes = 0, launches = 0;
};

// Host functions of a capture run at each replay.
std::map<unsigned long long, std::vector<std::pair<cudaHostFn_t, void*>>>& host_functions() {
  static auto* all = new std::map<unsigned long long, std::vector<std::pair<cudaHostFn_t, void*>>>;
  return *all;
}

std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* active = new std::vector<std::shared_ptr<Capture>>;
  return *active;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local std::vector<Capture*> begun_here;

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

void merge(Seen& into, const Seen& from) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  for (auto [stream, count] : from) into[stream] = std::max(into[stream], count);
}

void complete(const Seen& of) {
  Seen seen;
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    seen = of;
  }
  for (auto [stream, count] : seen) complete_copies(stream, count);
}

cudaError_t invalidate(Capture& capture, cudaError_t error, const char* what) {
  capture.invalidated = error;
  return fail(error, what);
}

cudaError_t create_stream(cudaStream_t* handle, unsigned flags, int priority) {
  static int streams = 0;
  auto* stream = new Stream;
  std::lock_guard<std::recursive_mutex> guard(lock());
  stream->id = ++streams;
  stream->device = current_device();
  stream->flags = flags;
  stream->priority = priority;
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

void wait_record(const char* call, long long stream) {
  Record("wait").text("call", call).number("stream", stream).python_line();
}

}  // namespace

Stream& stream_of(cudaStream_t handle) {
  static auto* legacy = new Stream;
  bool is_default =
      handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? *legacy : *reinterpret_cast<Stream*>(handle);
}

Capture* capture_of(Stream& stream) {
  if (stream.capture != nullptr && !stream.capture->active) stream.capture.reset();
  return stream.capture.get();
}

long next_operation(Stream& stream) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  return ++stream.seen[&stream];
}

long operations_so_far(Stream& stream) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  return stream.seen[&stream];
}

void add_to_capture(Stream& stream, bool is_launch) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  Capture* capture = capture_of(stream);
  if (capture == nullptr) return;
  capture->nodes += 1;
  capture->launches += is_launch;
  capture->last_work[&stream] = operations_so_far(stream);
}

cudaError_t refuse_in_capture(const char* call) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  Capture* conflict = nullptr;
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    for (Capture* capture : begun_here) {
      if (capture->mode != cudaStreamCaptureModeRelaxed) conflict = capture;
    }
    if (thread_mode == cudaStreamCaptureModeGlobal) {
      for (auto& capture : captures()) {
        if (capture->mode == cudaStreamCaptureModeGlobal) conflict = capture.get();
      }
    }
  }
  if (conflict == nullptr) return cudaSuccess;
  return invalidate(*conflict, cudaErrorStreamCaptureUnsupported, call);
}

}  // namespace m3i::null

using namespace m3i::null;

// ---- Streams
// -------------------------------------------------------------------------------------

M3I_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return create_stream(stream, 0, 0);
}

M3I_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return create_stream(stream, flags, 0);
}

M3I_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags,
                                                    int priority) {
  return create_stream(stream, flags, priority);
}

// The stream stays, since events and copies may still name it.
M3I_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

M3I_EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream_of(stream).flags;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  M3I_ENTER(cudaStreamQuery)
  Stream& stream = stream_of(handle);
  if (Capture* capture = capture_of(stream)) {
    return invalidate(*capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
  }
  if (cudaError_t refused = refuse_in_capture("cudaStreamQuery")) return refused;
  complete(stream.seen);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  M3I_ENTER(cudaStreamSynchronize)
  Stream& stream = stream_of(handle);
  if (Capture* capture = capture_of(stream)) {
    return invalidate(*capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  }
  if (cudaError_t refused = refuse_in_capture("cudaStreamSynchronize")) return refused;
  wait_record("cudaStreamSynchronize", stream.id);
  complete(stream.seen);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaDeviceSynchronize() {
  M3I_ENTER(cudaDeviceSynchronize)
  if (cudaError_t refused = refuse_in_capture("cudaDeviceSynchronize")) return refused;
  wait_record("cudaDeviceSynchronize", -1);
  complete_all_copies();
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned) {
  M3I_ENTER(cudaStreamWaitEvent)
  Stream& stream = stream_of(handle);
  Event& event = event_of(awaited);
  if (!event.recorded) return cudaSuccess;
  Capture* own = capture_of(stream);
  Capture* other = event.capture.get();
  if (other != nullptr && !other->active) {
    return fail(cudaErrorCapturedEvent, "cudaStreamWaitEvent of an event of an ended capture");
  }
  if (other == nullptr && own != nullptr) {
    return invalidate(*own, cudaErrorStreamCaptureIsolation,
                      "cudaStreamWaitEvent of an event from outside the capture");
  }
  if (other != nullptr && own != nullptr && own != other) {
    return invalidate(*own, cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent of another capture");
  }
  if (other != nullptr && own == nullptr) {
    if (&stream == &stream_of(nullptr)) {
      return invalidate(*other, cudaErrorStreamCaptureImplicit,
                        "cudaStreamWaitEvent: the legacy stream cannot join a capture");
    }
    stream.capture = event.capture;
  }
  merge(stream.seen, event.seen);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Stream& stream = stream_of(handle);
  next_operation(stream);
  add_to_capture(stream, false);
  Capture* capture = capture_of(stream);
  if (capture == nullptr) {
    function(data);
  } else {
    host_functions()[capture->id].emplace_back(function, data);
  }
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback,
                                             void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

// ---- Events
// --------------------------------------------------------------------------------------

M3I_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}

M3I_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaEventRecord(cudaEvent_t recorded, cudaStream_t handle) {
  M3I_ENTER(cudaEventRecord)
  Event& event = event_of(recorded);
  Stream& stream = stream_of(handle);
  capture_of(stream);
  std::lock_guard<std::recursive_mutex> guard(lock());
  event.recorded = true;
  event.seen = stream.seen;
  event.capture = stream.capture;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

M3I_EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  M3I_ENTER(cudaEventQuery)
  Event& event = event_of(handle);
  if (event.capture != nullptr) return fail(cudaErrorCapturedEvent, "cudaEventQuery");
  if (cudaError_t refused = refuse_in_capture("cudaEventQuery")) return refused;
  complete(event.seen);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  M3I_ENTER(cudaEventSynchronize)
  Event& event = event_of(handle);
  if (event.capture != nullptr) return fail(cudaErrorCapturedEvent, "cudaEventSynchronize");
  if (cudaError_t refused = refuse_in_capture("cudaEventSynchronize")) return refused;
  wait_record("cudaEventSynchronize", -1);
  complete(event.seen);
  return cudaSuccess;
}

// There is no time on this device: a millisecond between any two events.
M3I_EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- Captures
// ------------------------------------------------------------------------------------

M3I_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static unsigned long long begun = 0;
  Stream& stream = stream_of(handle);
  if (&stream == &stream_of(nullptr)) {
    return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture of the legacy stream");
  }
  if (capture_of(stream) != nullptr) return fail(cudaErrorIllegalState, "cudaStreamBeginCapture");
  auto capture = std::make_shared<Capture>();
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    capture->id = ++begun;
    capture->mode = mode;
    capture->origin = &stream;
    captures().push_back(capture);
  }
  stream.capture = capture;
  begun_here.push_back(capture.get());
  Record("capture")
      .text("state", "begin")
      .number("capture", static_cast<long long>(capture->id))
      .number("stream", stream.id);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  Stream& stream = stream_of(handle);
  std::shared_ptr<Capture> capture = stream.capture;
  *result = nullptr;
  if (capture == nullptr || !capture->active) {
    return fail(cudaErrorIllegalState, "cudaStreamEndCapture");
  }
  if (capture->origin != &stream) {
    return fail(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture of a stream that joined");
  }
  bool here = std::find(begun_here.begin(), begun_here.end(), capture.get()) != begun_here.end();
  if (!here && capture->mode != cudaStreamCaptureModeRelaxed) {
    return fail(cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
  }
  bool joined =
      std::all_of(capture->last_work.begin(), capture->last_work.end(), [&](const auto& of_stream) {
        return of_stream.first == &stream || stream.seen[of_stream.first] >= of_stream.second;
      });
  {
    std::lock_guard<std::recursive_mutex> guard(lock());
    capture->active = false;
    captures().erase(std::remove(captures().begin(), captures().end(), capture), captures().end());
    begun_here.erase(std::remove(begun_here.begin(), begun_here.end(), capture.get()),
                     begun_here.end());
  }
  stream.capture.reset();
  Record("capture")
      .text("state", "end")
      .number("capture", static_cast<long long>(capture->id))
      .number("nodes", capture->nodes)
      .number("launches", capture->launches);
  if (capture->invalidated != cudaSuccess) {
    return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  }
  if (!joined) {
    return fail(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture: a stream has not come back");
  }
  *result =
      reinterpret_cast<cudaGraph_t>(new Graph{capture->id, capture->nodes, capture->launches});
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Capture* capture = capture_of(stream_of(handle));
  *status = capture == nullptr                    ? cudaStreamCaptureStatusNone
            : capture->invalidated == cudaSuccess ? cudaStreamCaptureStatusActive
                                                  : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle,
                                                cudaStreamCaptureStatus* status,
                                                unsigned long long* id, cudaGraph_t* graph,
                                                const cudaGraphNode_t** dependencies,
                                                const cudaGraphEdgeData** edges, size_t* count) {
  Capture* capture = capture_of(stream_of(handle));
  if (id != nullptr) *id = capture != nullptr ? capture->id : 0;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}

M3I_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

// ---- Graphs
// --------------------------------------------------------------------------------------

M3I_EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                            unsigned long long) {
  if (graph == nullptr) return fail(cudaErrorInvalidValue, "cudaGraphInstantiate");
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                     unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

M3I_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  M3I_ENTER(cudaGraphLaunch)
  auto& graph = *reinterpret_cast<Graph*>(executable);
  Stream& stream = stream_of(handle);
  Record("replay")
      .number("capture", static_cast<long long>(graph.id))
      .number("nodes", graph.nodes)
      .number("launches", graph.launches)
      .number("stream", stream.id);
  next_operation(stream);
  for (auto [function, data] : host_functions()[graph.id]) function(data);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes != nullptr) return fail(cudaErrorNotSupported, "cudaGraphGetNodes of the nodes");
  *count = static_cast<size_t>(reinterpret_cast<Graph*>(graph)->nodes);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

// Objects that torch hangs on a graph so that it outlives what its nodes use.
M3I_EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned,
                                            unsigned) {
  *object = reinterpret_cast<cudaUserObject_t>(new long);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

M3I_EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned,
                                                 unsigned) {
  return cudaSuccess;
}
