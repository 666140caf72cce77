// dcnv3: the ops on the CPU; kernels in cpu/kernels.h, once for each instruction set.
//
// Threads share out pairs of image and group; in a forward with few pairs, rows of pairs. Every
// output is computed by one thread, in an order that does not depend on how many there are.
#include "dcnv3/cpu/kernel_table.h"

#include "dcnv3/args.h"
#include "m3i/cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Below this many products of a point and a channel a thread is not worth waking.
constexpr int64_t kGrainWork = 64 * 1024;

// With fewer pairs for each thread, a forward shares out rows: a thread without a pair would idle.
constexpr int64_t kPairsPerThread = 4;

// Of the planes of a run. With four groups a run reads whole lines of offsets and masks, or nearly.
constexpr int64_t kRunBytes = 1 << 20;

constexpr int64_t kAlignment = 64;

const Dcnv3CpuKernels& fastest_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kDcnv3Avx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kDcnv3Avx2;
#endif
  return kDcnv3Baseline;
}

// Memory that calls use again, of one thread: mapped anew at every call, its pages would cost more
// than what is computed in them.
class Workspace {
 public:
  // `bytes` bytes, aligned to kAlignment, uninitialised, until the next call.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, whole)));
      if (!memory_) throw std::bad_alloc();
      size_ = whole;
    }
    return memory_.get();
  }

  // Gives back what is too much to keep.
  void trim() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 8 << 20;

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

// Scratch, and memory for planes behind it.
struct ThreadMemory {
  Workspace& workspace;
  char *scratch, *planes;

  ThreadMemory(const Dcnv3CpuKernels& kernels, const Dcnv3Shape& shape, DType dtype,
               int64_t planes_bytes)
      : workspace(of_thread()) {
    const int64_t scratch_bytes = kernels.scratch_bytes(shape, dtype);
    scratch = workspace.reserve(scratch_bytes + planes_bytes);
    planes = scratch + scratch_bytes;
    std::memset(scratch, 0, scratch_bytes);
    kernels.prepare(shape, dtype, scratch);
  }
  ThreadMemory(const ThreadMemory&) = delete;
  ~ThreadMemory() { workspace.trim(); }

 private:
  static Workspace& of_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
};

// Pairs of a run, whose planes are about kRunBytes.
int64_t run_length(const Dcnv3Shape& shape, int64_t plane_bytes) {
  return std::clamp<int64_t>(kRunBytes / plane_bytes, 1, shape.groups);
}

// body(run): pairs [begin, end) in runs of at most `length`, each of one image.
template <class Body>
void for_each_run(const Dcnv3Shape& shape, int64_t begin, int64_t end, int64_t length,
                  const Body& body) {
  while (begin < end) {
    const int64_t next_image = (begin / shape.groups + 1) * shape.groups;
    const int64_t stop = std::min({end, next_image, begin + length});
    body(Dcnv3Run{begin, stop - begin});
    begin = stop;
  }
}

// Of so many tasks a thread takes at least this many at once; each has `rows` rows of output.
int64_t grain(const Dcnv3Shape& shape, int64_t rows) {
  const int64_t work = rows * shape.out_width * shape.points * shape.group_size;
  return std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, work));
}

// ---- Forward ------------------------------------------------------------------------------------

void forward_by_pairs(const Dcnv3CpuKernels& kernels, const Dcnv3Params& params) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t plane_bytes = kernels.plane_bytes(shape, params.dtype);
  const int64_t length = run_length(shape, plane_bytes);
  torch::stable::parallel_for(
      0, shape.batch * shape.groups, grain(shape, shape.out_height),
      [&](int64_t begin, int64_t end) {
        const ThreadMemory memory(kernels, shape, params.dtype, length * plane_bytes);
        for_each_run(shape, begin, end, length, [&](Dcnv3Run run) {
          kernels.pack(shape, params.dtype, params.x, run, memory.planes);
          kernels.forward(params, run, 0, shape.out_height, memory.planes, memory.scratch);
        });
      });
}

void forward_by_rows(const Dcnv3CpuKernels& kernels, const Dcnv3Params& params) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t pairs = shape.batch * shape.groups;
  const int64_t plane_bytes = kernels.plane_bytes(shape, params.dtype);
  static thread_local Workspace workspace;
  char* planes = workspace.reserve(pairs * plane_bytes);
  torch::stable::parallel_for(0, pairs, grain(shape, shape.out_height),
                              [&](int64_t begin, int64_t end) {
                                kernels.pack(shape, params.dtype, params.x, {begin, end - begin},
                                             planes + begin * plane_bytes);
                              });
  const int64_t rows = shape.out_height, groups = shape.groups;
  torch::stable::parallel_for(
      0, shape.batch * rows, grain(shape, groups), [&](int64_t begin, int64_t end) {
        const ThreadMemory memory(kernels, shape, params.dtype, 0);
        while (begin < end) {
          const int64_t image = begin / rows, stop = std::min(end, (image + 1) * rows);
          kernels.forward(params, {image * groups, groups}, begin - image * rows,
                          stop - image * rows, planes + image * groups * plane_bytes,
                          memory.scratch);
          begin = stop;
        }
      });
  workspace.trim();
}

Tensor dcnv3_cpu(const Tensor& x, const Tensor& offset, const Tensor& mask,
                 std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                 double offset_scale, bool remove_center, bool softmax) {
  const Dcnv3Call call = prepare_dcnv3(
      x, offset, mask,
      {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax});
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pairs = call.params.shape.batch * groups;
  if (pairs == 0) return call.out;
  const auto forward =
      threads == 1 || pairs >= kPairsPerThread * threads ? forward_by_pairs : forward_by_rows;
  forward(fastest_kernels(), call.params);
  return call.out;
}

// ---- Backward -----------------------------------------------------------------------------------

void backward(const Dcnv3CpuKernels& kernels, const Dcnv3BwdParams& params) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t plane_bytes = kernels.plane_bytes(shape, params.dtype);
  const int64_t length = run_length(shape, plane_bytes);
  torch::stable::parallel_for(
      0, shape.batch * shape.groups, grain(shape, shape.out_height),
      [&](int64_t begin, int64_t end) {
        const ThreadMemory memory(kernels, shape, params.dtype, 2 * length * plane_bytes);
        char* grad_planes = memory.planes + length * plane_bytes;
        for_each_run(shape, begin, end, length, [&](Dcnv3Run run) {
          if (params.grad_offset || params.grad_mask) {
            kernels.pack(shape, params.dtype, params.x, run, memory.planes);
          }
          kernels.backward(params, run, memory.planes, grad_planes, memory.scratch);
        });
      });
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_bwd_cpu(
    const Tensor& grad_out, const Tensor& x, const Tensor& offset, const Tensor& mask,
    std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double offset_scale, bool remove_center,
    bool softmax, std::vector<bool> needs_grad, bool /*deterministic*/) {
  const Dcnv3BwdCall call = prepare_dcnv3_bwd(
      grad_out, x, offset, mask,
      {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax},
      needs_grad);
  const Dcnv3BwdParams& params = call.params;
  if (params.shape.batch > 0 && (params.grad_x || params.grad_offset || params.grad_mask)) {
    backward(fastest_kernels(), params);
  }
  return call.grads;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("dcnv3", TORCH_BOX(&dcnv3_cpu));
  library.impl("dcnv3_bwd", TORCH_BOX(&dcnv3_bwd_cpu));
}

}  // namespace
}  // namespace m3i
