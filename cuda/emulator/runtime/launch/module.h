// Facts about a shared library with kernels, read from its file: functions by address, launch
// bounds, shared variables.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace m3i::emulator {

struct Symbol {
  uintptr_t begin;  // of a shared variable: its offset among them
  size_t size;
  std::string name;  // mangled
};

// A segment of the library's image in memory.
struct Segment {
  uintptr_t begin, end;
  bool writable;
};

// The arguments of __launch_bounds__: threads of a block, and blocks of a multiprocessor, 0 where
// not given.
struct LaunchBound {
  unsigned threads, blocks;
};

struct Module {
  std::string path;
  uintptr_t base = 0;
  std::vector<Segment> segments;
  std::vector<Symbol> functions;  // sorted by begin
  std::vector<Symbol> shared;     // sorted by begin
  std::vector<uintptr_t> bounds;  // sorted; where the padding of a kernel with launch bounds starts
  size_t shared_bytes = 0;        // extent of the thread-local block
  size_t tls_module = 0;          // its number in the dynamic loader

  // Address of the shared variables in this operating-system thread.
  uintptr_t shared_base() const;
  const Symbol* function_at(uintptr_t address) const;
  const Symbol* shared_at(size_t offset) const;
  const Segment* segment_at(uintptr_t address) const;
  // Of the kernel at an address.
  std::optional<LaunchBound> launch_bound(uintptr_t address) const;
  // Bytes of static shared memory that the kernel itself declares.
  size_t static_shared_bytes(const Symbol& kernel) const;
};

// The module that contains an address, or null. Each is read once.
const Module* module_of(const void* address);

std::string demangle(const std::string& name);
// `kernel<float, 16>` for `void kernel<float, 16>(Params)`.
std::string short_name(const std::string& mangled);

}  // namespace m3i::emulator
