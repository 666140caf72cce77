// Kernels: which images a program brings, what each launch asks for, and whether this card takes
// it.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "runtime/null.h"

namespace m3i::null {

namespace {

// ---- Images: what nvcc packed for which compute capability --------------------------------------

struct Image {
  bool is_ptx;
  int architecture;  // 90 for sm_90 and sm_90a
};

// The container that nvcc hands to __cudaRegisterFatBinary. Not documented by NVIDIA; the layout is
// that which cuobjdump's listing of torch's and our own libraries agrees with.
struct FatBinaryWrapper {
  uint32_t magic, version;
  const char* data;
  const void* unused;
};
constexpr uint32_t kWrapperMagic = 0x466243b1, kContainerMagic = 0xba55ed50;

struct ContainerHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};

struct EntryHeader {
  uint16_t kind, version;  // kind 1: PTX, 2: machine code
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, options;
  uint16_t minor, major;
  uint32_t architecture;
};

std::vector<Image> images_of(const void* fat_binary) {
  FatBinaryWrapper wrapper;
  std::memcpy(&wrapper, fat_binary, sizeof wrapper);
  std::vector<Image> images;
  if (wrapper.magic != kWrapperMagic) return images;
  ContainerHeader container;
  std::memcpy(&container, wrapper.data, sizeof container);
  if (container.magic != kContainerMagic) return images;
  const char* at = wrapper.data + container.header_bytes;
  const char* end = at + container.bytes;
  while (at < end) {
    EntryHeader entry;
    std::memcpy(&entry, at, sizeof entry);
    images.push_back({entry.kind == 1, static_cast<int>(entry.architecture)});
    at += entry.header_bytes + entry.bytes;
  }
  return images;
}

// The architecture whose image the card runs: machine code of its major version, the newest that is
// not newer than the card, else PTX that the driver compiles; 0 where there is none.
int chosen_architecture(const std::vector<Image>& images) {
  int own = card().major * 10 + card().minor, best = 0;
  for (const Image& image : images) {
    bool runs = !image.is_ptx && image.architecture / 10 == card().major;
    if (runs && image.architecture <= own) best = std::max(best, image.architecture);
  }
  if (best != 0) return best;
  for (const Image& image : images) {
    if (image.is_ptx && image.architecture <= own) best = std::max(best, image.architecture);
  }
  return best;
}

// ---- Kernels
// -------------------------------------------------------------------------------------

using Hook = int (*)(const char* mangled, const unsigned* grid, const unsigned* block,
                     void** arguments, size_t shared);

struct Kernel {
  std::string mangled, name;
  int architecture = 0;  // of the image that runs; 0: none
  size_t most_dynamic_shared = 48 * 1024;
};

std::unordered_map<const void*, Kernel>& kernels() {
  static auto* all = new std::unordered_map<const void*, Kernel>;
  return *all;
}

std::unordered_map<void**, int>& architectures() {
  static auto* of_handle = new std::unordered_map<void**, int>;
  return *of_handle;
}

Hook hook = nullptr;

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// The kernel behind a function, with its name readable; null for one that nobody registered.
Kernel* kernel_of(const void* function) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  auto found = kernels().find(function);
  if (found == kernels().end()) return nullptr;
  if (found->second.name.empty()) found->second.name = demangled(found->second.mangled);
  return &found->second;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration pushed;

bool within_limits(const Configuration& asked, unsigned cluster) {
  const dim3 &g = asked.grid, &b = asked.block;
  bool grid = g.x && g.y && g.z && g.x <= 2147483647u && g.y <= 65535 && g.z <= 65535;
  bool block = b.x && b.y && b.z && b.x <= 1024 && b.y <= 1024 && b.z <= 64 &&
               uint64_t{b.x} * b.y * b.z <= 1024;
  bool clusters = cluster == 1 ||
                  (card().major >= 9 && cluster <= 8 && (uint64_t{g.x} * g.y * g.z) % cluster == 0);
  return grid && block && clusters;
}

cudaError_t launch(const void* function, const Configuration& asked, void** arguments,
                   unsigned cluster) {
  Kernel* kernel = kernel_of(function);
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "launch of no known kernel");
  Stream& stream = stream_of(asked.stream);
  Capture* capture = capture_of(stream);
  // A step has one stream, and its launches are many: the lines of the others alone are looked up.
  std::string line = stream.id != 0 ? python_line() : "";
  {
    Record record("launch");
    record.text("name", kernel->name).triple("grid", asked.grid).triple("block", asked.block);
    record.number("shared", static_cast<long long>(asked.shared)).number("stream", stream.id);
    record.number("architecture", kernel->architecture);
    if (cluster != 1) record.number("cluster", cluster);
    if (!line.empty()) record.text("line", line);
    if (capture != nullptr) record.number("capture", static_cast<long long>(capture->id));
    if (lines_of_launches()) record.python_line();
  }
  if (kernel->architecture == 0) return fail(cudaErrorNoKernelImageForDevice, kernel->name);
  if (!within_limits(asked, cluster)) return fail(cudaErrorInvalidConfiguration, kernel->name);
  if (asked.shared > kernel->most_dynamic_shared) {
    return fail(cudaErrorInvalidValue, kernel->name + ": dynamic shared memory not asked for");
  }
  next_operation(stream);
  add_to_capture(stream, true);
  if (hook == nullptr || capture != nullptr) return cudaSuccess;
  unsigned grid[] = {asked.grid.x, asked.grid.y, asked.grid.z};
  unsigned block[] = {asked.block.x, asked.block.y, asked.block.z};
  int status = hook(kernel->mangled.c_str(), grid, block, arguments, asked.shared);
  return status == 0 ? cudaSuccess : fail(static_cast<cudaError_t>(status), kernel->name);
}

}  // namespace

void register_kernel(const void* function, const std::string& mangled, int architecture) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  Kernel kernel;
  kernel.mangled = mangled;
  kernel.architecture = architecture;
  kernels().emplace(function, std::move(kernel));
}

}  // namespace m3i::null

using namespace m3i::null;

// Has each launch outside a capture computed by the hook: it is given the kernel's mangled name,
// and returns 0, also for kernels that it does not know, or an error of CUDA. Null takes it away.
M3I_EXPORT void null_cuda_set_hook(Hook computes) { hook = computes; }

// ---- What nvcc's code calls before main
// ----------------------------------------------------------

M3I_EXPORT void** __cudaRegisterFatBinary(void* fat_binary) {
  auto** handle = static_cast<void**>(std::calloc(1, sizeof(void*)));
  std::lock_guard<std::recursive_mutex> guard(lock());
  architectures()[handle] = chosen_architecture(images_of(fat_binary));
  return handle;
}

M3I_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

M3I_EXPORT void __cudaUnregisterFatBinary(void**) {}

M3I_EXPORT void __cudaRegisterFunction(void** handle, const char* function, char*,
                                       const char* device_name, int, uint3*, uint3*, dim3*, dim3*,
                                       int*) {
  std::lock_guard<std::recursive_mutex> guard(lock());
  register_kernel(function, device_name, architectures()[handle]);
}

// Variables of the device have the host's bytes.
M3I_EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

M3I_EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = const_cast<void*>(symbol);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes,
                                          size_t offset, cudaMemcpyKind) {
  std::memcpy(static_cast<char*>(const_cast<void*>(symbol)) + offset, from, bytes);
  return cudaSuccess;
}

// ---- Launches
// ------------------------------------------------------------------------------------

M3I_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                void* stream) {
  pushed = {grid, block, shared, static_cast<cudaStream_t>(stream)};
  return 0;
}

M3I_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                  void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

M3I_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block,
                                        void** arguments, size_t shared, cudaStream_t stream) {
  M3I_ENTER(cudaLaunchKernel)
  return launch(function, {grid, block, shared, stream}, arguments, 1);
}

M3I_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                          void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

M3I_EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                                   void** arguments, size_t shared,
                                                   cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

M3I_EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* asked, const void* function,
                                           void** arguments) {
  M3I_ENTER(cudaLaunchKernel)
  unsigned cluster = 1;
  for (unsigned i = 0; i < asked->numAttrs; ++i) {
    if (asked->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& dims = asked->attrs[i].val.clusterDim;
      cluster = dims.x * dims.y * dims.z;
    }
  }
  return launch(function, {asked->gridDim, asked->blockDim, asked->dynamicSmemBytes, asked->stream},
                arguments, cluster);
}

// ---- What a kernel says of itself
// ----------------------------------------------------------------

M3I_EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                            int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  Kernel* kernel = kernel_of(function);
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "cudaFuncSetAttribute");
  if (value < 0 || static_cast<size_t>(value) > card().shared_per_block_optin) {
    return fail(cudaErrorInvalidValue, "cudaFuncSetAttribute of " + kernel->name);
  }
  kernel->most_dynamic_shared = static_cast<size_t>(value);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  std::memset(attributes, 0, sizeof *attributes);
  Kernel* kernel = kernel_of(function);
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "cudaFuncGetAttributes");
  if (kernel->architecture == 0) return fail(cudaErrorNoKernelImageForDevice, kernel->name);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = kernel->architecture;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(kernel->most_dynamic_shared);
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int threads, size_t shared, unsigned) {
  int by_threads = 2048 / (threads > 0 ? threads : 1);
  size_t by_shared = card().shared_per_multiprocessor / (shared + 1024);
  *blocks = std::max(1, std::min(by_threads, static_cast<int>(by_shared)));
  return cudaSuccess;
}

M3I_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                                     const void* function,
                                                                     int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}
