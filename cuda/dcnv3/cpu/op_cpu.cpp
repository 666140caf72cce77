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

constexpr int64_t kAlignment = 64;

const Dcnv3CpuKernels& fastest_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kDcnv3Avx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kDcnv3Avx2;
#endif
  return kDcnv3Baseline;
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// `bytes` is a multiple of kAlignment.
Memory allocate(int64_t bytes) {
  char* memory = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
  if (!memory) throw std::bad_alloc();
  return Memory(memory);
}

Memory allocate_zeros(int64_t bytes) {
  Memory memory = allocate(bytes);
  std::memset(memory.get(), 0, bytes);
  return memory;
}

Memory make_scratch(const Dcnv3CpuKernels& kernels, const Dcnv3Shape& shape, DType dtype) {
  Memory scratch = allocate_zeros(kernels.scratch_bytes(shape, dtype));
  kernels.prepare(shape, dtype, scratch.get());
  return scratch;
}

// Of so many tasks a thread takes at least this many at once; each has `rows` rows of output.
int64_t grain(const Dcnv3Shape& shape, int64_t rows) {
  const int64_t work = rows * shape.out_width * shape.points * shape.group_size;
  return std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, work));
}

// ---- Forward ------------------------------------------------------------------------------------

void forward_by_pairs(const Dcnv3CpuKernels& kernels, const Dcnv3Params& params) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t pairs = shape.batch * shape.groups;
  torch::stable::parallel_for(
      0, pairs, grain(shape, shape.out_height), [&](int64_t begin, int64_t end) {
        const Memory scratch = make_scratch(kernels, shape, params.dtype);
        const Memory plane = allocate_zeros(kernels.plane_bytes(shape, params.dtype));
        for (int64_t pair = begin; pair < end; ++pair) {
          kernels.pack(shape, params.dtype, params.x, pair, plane.get());
          kernels.forward(params, pair, 0, shape.out_height, plane.get(), scratch.get());
        }
      });
}

void forward_by_rows(const Dcnv3CpuKernels& kernels, const Dcnv3Params& params) {
  const Dcnv3Shape& shape = params.shape;
  const int64_t pairs = shape.batch * shape.groups;
  const int64_t plane_bytes = kernels.plane_bytes(shape, params.dtype);
  const Memory planes = allocate(pairs * plane_bytes);
  torch::stable::parallel_for(0, pairs, grain(shape, shape.out_height),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t pair = begin; pair < end; ++pair) {
                                  char* plane = planes.get() + pair * plane_bytes;
                                  std::memset(plane, 0, plane_bytes);
                                  kernels.pack(shape, params.dtype, params.x, pair, plane);
                                }
                              });
  const int64_t rows = shape.out_height;
  torch::stable::parallel_for(0, pairs * rows, grain(shape, 1), [&](int64_t begin, int64_t end) {
    const Memory scratch = make_scratch(kernels, shape, params.dtype);
    while (begin < end) {
      const int64_t pair = begin / rows;
      const int64_t stop = std::min(end, (pair + 1) * rows);
      kernels.forward(params, pair, begin - pair * rows, stop - pair * rows,
                      planes.get() + pair * plane_bytes, scratch.get());
      begin = stop;
    }
  });
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
  const bool of_points = params.grad_offset || params.grad_mask;
  torch::stable::parallel_for(
      0, shape.batch * shape.groups, grain(shape, shape.out_height),
      [&](int64_t begin, int64_t end) {
        const Memory scratch = make_scratch(kernels, shape, params.dtype);
        const Memory plane = of_points ? allocate_zeros(plane_bytes) : Memory();
        const Memory grad_plane = params.grad_x ? allocate(plane_bytes) : Memory();
        for (int64_t pair = begin; pair < end; ++pair) {
          if (of_points) kernels.pack(shape, params.dtype, params.x, pair, plane.get());
          kernels.backward(params, pair, plane.get(), grad_plane.get(), scratch.get());
        }
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
