// fn.m3i_view_grids and fn.m3i_patches: a batch's views of any size, as patches, by the functions
// of cuda/views, in DALI's threads. pipelines/torch_backend.py gets the same bits from torch.
#include <vector>

#include "dali/nvtx_range.h"
#include "dali/patches_plan.h"
#include "views/cpu/patches.h"
#include "views/grid.h"

namespace m3i {

class ViewGrids : public dali::Operator<dali::CPUBackend> {
 public:
  explicit ViewGrids(const dali::OpSpec& spec) : dali::Operator<dali::CPUBackend>(spec) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    const auto& params = ws.Input<dali::CPUBackend>(0);
    const auto& most = ws.Input<dali::CPUBackend>(1);
    DALI_ENFORCE(params.type() == DALI_FLOAT && params.sample_dim() == 2,
                 "m3i_view_grids: expected parameters [V, 13] float32");
    const int batch = params.num_samples();
    const int64_t num_views = batch ? params.tensor_shape_span(0)[0] : 0;
    const dali::TensorShape<1> numbers(num_views);
    DALI_ENFORCE(
        most.type() == DALI_INT64 && most.shape() == dali::uniform_list_shape(batch, numbers),
        "m3i_view_grids: expected a number of patches of each view, [V] int64");
    out.resize(1);
    out[0] = {dali::uniform_list_shape(batch, dali::TensorShape<2>(num_views, 2)), DALI_INT64};
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    const auto& most = ws.Input<dali::CPUBackend>(1);
    auto& out = ws.Output<dali::CPUBackend>(0);
    for (int i = 0; i < rows.num_samples(); ++i) {  // below a microsecond a view
      const auto* params = reinterpret_cast<const ViewParams*>(rows.tensor<float>(i));
      auto* to = out.mutable_tensor<int64_t>(i);
      for (int64_t v = 0; v < rows.tensor_shape_span(i)[0]; ++v) {
        const int64_t tokens = most.tensor<int64_t>(i)[v];
        DALI_ENFORCE(tokens >= 1 && params[v].height > 0 && params[v].width > 0,
                     dali::make_string("m3i_view_grids: view ", v,
                                       ": expected a crop and at least 1 patch, got ", tokens));
        const ViewGrid grid = views::grid_of(params[v].height, params[v].width, tokens);
        to[2 * v] = grid.rows;
        to[2 * v + 1] = grid.columns;
      }
    }
  }
};

class MakePatches : public dali::Operator<dali::CPUBackend> {
 public:
  explicit MakePatches(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec),
        filters_(view_filters(spec.GetRepeatedArgument<int>("filters"))),
        patch_size_(check_patch_size(spec.GetArgument<int>("patch_size"))),
        scratch_(num_threads_) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    describe_patches<dali::CPUBackend>(out, ws, filters_.size(), patch_size_);
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const int batch = ws.Input<dali::CPUBackend>(0).num_samples();
    auto& pool = ws.GetThreadPool();
    for (int i = 0; i < batch; ++i) {
      int64_t patches = 0;  // the largest ones first
      for (size_t v = 0; v < filters_.size(); ++v) {
        const ViewGrid grid = view_grid(ws, i, v);
        patches += grid.rows * grid.columns;
      }
      pool.AddWork([this, &ws, i](int thread) { make(ws, i, scratch_[thread]); }, patches);
    }
    pool.RunAll();
  }

 private:
  void make(dali::Workspace& ws, int i, PatchScratch& scratch) {
    const NvtxRange range("data.views", i);
    const auto* params =
        reinterpret_cast<const ViewParams*>(ws.Input<dali::CPUBackend>(0).tensor<float>(i));
    const std::vector<ViewImage> images = view_images<dali::CPUBackend>(ws, i, filters_.size(), 2);
    for (size_t v = 0; v < filters_.size(); ++v) {
      const int source = view_source(static_cast<int>(v), static_cast<int>(images.size()));
      uint8_t* out = ws.Output<dali::CPUBackend>(static_cast<int>(v)).mutable_tensor<uint8_t>(i);
      make_patches(images[source], filters_[v], params[v], view_grid(ws, i, v), patch_size_, out,
                   scratch);
    }
  }

  std::vector<ViewGeometry> filters_;
  int patch_size_;
  std::vector<PatchScratch> scratch_;  // of each thread
};

}  // namespace m3i

namespace dali {

DALI_REGISTER_OPERATOR(M3iViewGrids, m3i::ViewGrids, CPU);
DALI_REGISTER_OPERATOR(M3iPatches, m3i::MakePatches, CPU);

DALI_SCHEMA(M3iViewGrids)
    .DocStr(R"(Chooses rows and columns of patches of each view, of its crop's aspect: [V, 2] int64.

Inputs: parameters of `m3i_draw_views`, and the most patches of each view, [V] int64.)")
    .NumInput(2)
    .NumOutput(1);

DALI_SCHEMA(M3iPatches)
    .DocStr(R"(Cuts all views of decoded pictures to patches: an output [N, 3 P P] uint8 for each.

Inputs: parameters of `m3i_draw_views`, rows and columns of `m3i_view_grids`, a picture [H, W, 3]
uint8, and a second one for view 1.)")
    .NumInput(3, 4)
    .InputDevice(0, dali::InputDevice::CPU)
    .InputDevice(1, dali::InputDevice::CPU)
    .OutputFn([](const OpSpec& spec) {
      return static_cast<int>(spec.GetRepeatedArgument<int>("filters").size() / 2);
    })
    .AddArg("filters", "Blur kernel and 1 for bicubic, of each view.", DALI_INT_VEC)
    .AddArg("patch_size", "Pixels along a side of a patch.", DALI_INT32);

}  // namespace dali
