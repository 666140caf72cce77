// fn.m3i_patches on a GPU: the pictures where DALI decoded them, all views of a batch in one
// launch.
#include <string>
#include <vector>

#include "dali/kernels/dynamic_scratchpad.h"
#include "dali/nvtx_range.h"
#include "dali/patches_plan.h"
#include "views/op.h"

namespace m3i {

class MakePatchesOnGpu : public dali::Operator<dali::GPUBackend> {
 public:
  explicit MakePatchesOnGpu(const dali::OpSpec& spec)
      : dali::Operator<dali::GPUBackend>(spec),
        filters_(view_filters(spec.GetRepeatedArgument<int>("filters"))),
        patch_size_(check_patch_size(spec.GetArgument<int>("patch_size"))) {
    DALI_ENFORCE(filters_.size() <= kViewsMostOnCuda,
                 "filters: expected up to " + std::to_string(kViewsMostOnCuda) +
                     " views of a sample on a GPU, got " + std::to_string(filters_.size()));
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    describe_patches<dali::GPUBackend>(out, ws, filters_.size(), patch_size_);
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    const int batch = rows.num_samples();
    if (batch == 0) return;
    const NvtxRange range("data.views", batch);
    const size_t num_views = filters_.size();
    std::vector<ViewImage> images;
    std::vector<ViewParams> params;
    std::vector<ViewGrid> grids;
    std::vector<int64_t> lengths(num_views);  // patches of each view, of all samples
    for (int i = 0; i < batch; ++i) {
      for (const ViewImage& image : view_images<dali::GPUBackend>(ws, i, num_views, 2)) {
        images.push_back(image);
      }
      const auto* row = reinterpret_cast<const ViewParams*>(rows.tensor<float>(i));
      params.insert(params.end(), row, row + num_views);
      for (size_t v = 0; v < num_views; ++v) {
        grids.push_back(view_grid(ws, i, v));
        grids.back().first = lengths[v];
        lengths[v] += grids.back().rows * grids.back().columns;
      }
    }
    std::vector<uint8_t*> out;  // samples lie one after the other
    for (size_t v = 0; v < num_views; ++v) {
      auto& list = ws.Output<dali::GPUBackend>(static_cast<int>(v));
      DALI_ENFORCE(list.IsContiguous(), "m3i_patches: expected contiguous outputs");
      out.push_back(list.mutable_tensor<uint8_t>(0));
    }
    const cudaStream_t stream = ws.stream();
    dali::kernels::DynamicScratchpad memory(stream);
    ViewsCudaParams launched{};
    launched.num_samples = batch;
    launched.num_pictures = ws.NumInput() - 2;
    const int64_t scratch_bytes = plan_patches(filters_.data(), static_cast<int>(num_views),
                                               lengths.data(), patch_size_, out.data(), launched);
    launched.images = memory.ToGPU(stream, images);
    launched.params = memory.ToGPU(stream, params);
    launched.grids = memory.ToGPU(stream, grids);
    launched.scratch = memory.AllocateGPU<uint8_t>(static_cast<size_t>(scratch_bytes), 256);
    CUDA_CALL(launch_views(launched, stream));
  }

 private:
  std::vector<ViewGeometry> filters_;
  int patch_size_;
};

}  // namespace m3i

namespace dali {

DALI_REGISTER_OPERATOR(M3iPatches, m3i::MakePatchesOnGpu, GPU);

}  // namespace dali
