// The trace: a line of JSON for each thing that a GPU would have been asked for.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime/null.h"

namespace m3i::null {

namespace {

// %p in the name of NULL_CUDA_TRACE is the process's number, so that ranks do not share a file.
FILE* open_trace() {
  const char* name = std::getenv("NULL_CUDA_TRACE");
  if (name == nullptr || *name == '\0') return nullptr;
  std::string path = name;
  if (size_t at = path.find("%p"); at != std::string::npos) {
    path.replace(at, 2, std::to_string(getpid()));
  }
  FILE* file = std::fopen(path.c_str(), "a");
  if (file == nullptr) {
    std::fprintf(stderr, "NULL_CUDA_TRACE: cannot write %s: %s\n", path.c_str(), strerror(errno));
    std::exit(2);
  }
  return file;
}

FILE* file() {
  static FILE* trace = open_trace();
  return trace;
}

int thread_number() {
  static std::atomic<int> threads{0};
  thread_local int number = threads++;
  return number;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      result += escaped;
    } else {
      result += c;
    }
  }
  return result + "\"";
}

// Python's C interface, looked up in the running process: the runtime is loaded before Python, and
// into processes without one.
struct Python {
  int (*initialized)();
  int (*gil_ensure)();
  void (*gil_release)(int);
  void* (*this_thread)();
  void* (*frame_of)(void*);
  void* (*back)(void*);
  void* (*code)(void*);
  int (*line)(void*);
  void* (*attribute)(void*, const char*);
  const char* (*utf8)(void*);
  void (*decref)(void*);
  bool complete;
};

template <typename F>
bool look_up(F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

const Python& python() {
  static const Python api = [] {
    Python p{};
    p.complete =
        look_up(p.initialized, "Py_IsInitialized") & look_up(p.gil_ensure, "PyGILState_Ensure") &
        look_up(p.gil_release, "PyGILState_Release") &
        look_up(p.this_thread, "PyGILState_GetThisThreadState") &
        look_up(p.frame_of, "PyThreadState_GetFrame") & look_up(p.back, "PyFrame_GetBack") &
        look_up(p.code, "PyFrame_GetCode") & look_up(p.line, "PyFrame_GetLineNumber") &
        look_up(p.attribute, "PyObject_GetAttrString") & look_up(p.utf8, "PyUnicode_AsUTF8") &
        look_up(p.decref, "Py_DecRef");
    return p;
  }();
  return api;
}

std::string file_of(void* frame) {
  void* code = python().code(frame);
  void* name = python().attribute(code, "co_filename");
  const char* text = name != nullptr ? python().utf8(name) : nullptr;
  std::string file = text != nullptr ? text : "";
  if (name != nullptr) python().decref(name);
  python().decref(code);
  return file;
}

// The line of the innermost frame of a file below `root`, else of the innermost of all. Packages
// that are installed there, as in a checkout's own environment, are not what is looked for.
std::string line_below(const char* root) {
  std::string innermost;
  void* frame = python().frame_of(python().this_thread());
  while (frame != nullptr) {
    std::string file = file_of(frame);
    std::string line = file + ":" + std::to_string(python().line(frame));
    if (innermost.empty()) innermost = line;
    bool below = root != nullptr && file.rfind(root, 0) == 0 &&
                 file.find("/site-packages/") == std::string::npos;
    void* outer = python().back(frame);
    python().decref(frame);
    frame = outer;
    if (below) {
      if (frame != nullptr) python().decref(frame);
      return line;
    }
  }
  return innermost;
}

}  // namespace

bool tracing() { return file() != nullptr; }

Record::Record(const char* kind) {
  if (!tracing()) return;
  line_ = std::string("{\"kind\": \"") + kind + "\"";
  number("thread", thread_number()).number("device", current_device());
}

Record::~Record() {
  if (line_.empty()) return;
  line_ += "}\n";
  // One write a line: lines of several threads do not mix.
  std::lock_guard<std::recursive_mutex> guard(lock());
  std::fwrite(line_.data(), 1, line_.size(), file());
  std::fflush(file());
}

Record& Record::text(const char* key, const std::string& value) {
  if (!line_.empty()) line_ += std::string(", \"") + key + "\": " + quoted(value);
  return *this;
}

Record& Record::number(const char* key, long long value) {
  if (!line_.empty()) line_ += std::string(", \"") + key + "\": " + std::to_string(value);
  return *this;
}

Record& Record::triple(const char* key, dim3 value) {
  if (!line_.empty()) {
    line_ += std::string(", \"") + key + "\": [" + std::to_string(value.x) + ", " +
             std::to_string(value.y) + ", " + std::to_string(value.z) + "]";
  }
  return *this;
}

Record& Record::python_line() {
  std::string line = m3i::null::python_line();
  return line.empty() ? *this : text("line", line);
}

std::string python_line() {
  if (!tracing() || !python().complete || !python().initialized()) return "";
  if (python().this_thread() == nullptr) return "";  // a thread that Python has never seen
  int state = python().gil_ensure();
  std::string line = line_below(std::getenv("NULL_CUDA_ROOT"));
  python().gil_release(state);
  return line;
}

std::recursive_mutex& lock() {
  // Never destroyed: threads of torch call until the process has gone.
  static auto* mutex = new std::recursive_mutex;
  return *mutex;
}

}  // namespace m3i::null

// Writes {"kind": "mark", "name": NAME} into the trace: where a step begins, say.
M3I_EXPORT void null_cuda_mark(const char* name) { m3i::null::Record("mark").text("name", name); }
