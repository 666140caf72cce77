// fn.m3i_views on a GPU: the pictures where DALI decoded them, all views of a batch in one launch.
#include <string>
#include <vector>

#include "dali/kernels/dynamic_scratchpad.h"
#include "dali/nvtx_range.h"
#include "dali/views_plan.h"
#include "views/op.h"

namespace m3i {

class MakeViewsOnGpu : public dali::Operator<dali::GPUBackend> {
 public:
  explicit MakeViewsOnGpu(const dali::OpSpec& spec)
      : dali::Operator<dali::GPUBackend>(spec),
        geometry_(view_geometry(spec.GetRepeatedArgument<int>("geometry"))) {
    DALI_ENFORCE(geometry_.size() <= kViewsMostOnCuda,
                 "geometry: expected up to " + std::to_string(kViewsMostOnCuda) +
                     " views of a sample on a GPU, got " + std::to_string(geometry_.size()));
    for (const ViewGeometry& view : geometry_) {
      DALI_ENFORCE(view.height == view.width,
                   "geometry: expected square views on a GPU, got " + std::to_string(view.height) +
                       " x " + std::to_string(view.width) + "; m3i_patches cuts any");
    }
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    describe_views<dali::GPUBackend>(out, ws, geometry_);
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    const int batch = rows.num_samples();
    if (batch == 0) return;
    const NvtxRange range("data.views", batch);
    std::vector<ViewImage> images;
    std::vector<ViewParams> params;
    for (int i = 0; i < batch; ++i) {
      for (const ViewImage& image : view_images<dali::GPUBackend>(ws, i, geometry_.size())) {
        images.push_back(image);
      }
      const auto* row = reinterpret_cast<const ViewParams*>(rows.tensor<float>(i));
      params.insert(params.end(), row, row + geometry_.size());
    }
    std::vector<uint8_t*> out;  // the samples of an output of equal shapes lie one after the other
    for (size_t v = 0; v < geometry_.size(); ++v) {
      auto& list = ws.Output<dali::GPUBackend>(static_cast<int>(v));
      list.SetLayout("CHW");
      DALI_ENFORCE(list.IsContiguous(), "m3i_views: expected contiguous outputs");
      out.push_back(list.mutable_tensor<uint8_t>(0));
    }
    const cudaStream_t stream = ws.stream();
    dali::kernels::DynamicScratchpad memory(stream);
    ViewsCudaParams launched{};
    launched.num_samples = batch;
    launched.num_pictures = ws.NumInput() - 1;
    const int64_t scratch_bytes =
        plan_views(geometry_.data(), static_cast<int>(geometry_.size()), out.data(), launched);
    launched.images = memory.ToGPU(stream, images);
    launched.params = memory.ToGPU(stream, params);
    launched.scratch = scratch_bytes
                           ? memory.AllocateGPU<uint8_t>(static_cast<size_t>(scratch_bytes), 256)
                           : nullptr;
    CUDA_CALL(launch_views(launched, stream));
  }

 private:
  std::vector<ViewGeometry> geometry_;
};

}  // namespace m3i

namespace dali {

DALI_REGISTER_OPERATOR(M3iViews, m3i::MakeViewsOnGpu, GPU);

}  // namespace dali
