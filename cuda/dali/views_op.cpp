// fn.m3i_draw_views and fn.m3i_views: a batch's views by the functions of cuda/views, in DALI's
// threads. pipelines/torch_backend.py gets the same bits from torch.ops.m3i.
#include <vector>

#include "dali/nvtx_range.h"
#include "dali/views_plan.h"
#include "views/cpu/kernel_table.h"
#include "views/draw.h"

namespace m3i {

class DrawViews : public dali::Operator<dali::CPUBackend> {
 public:
  explicit DrawViews(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec),
        seed_(static_cast<uint64_t>(spec.GetArgument<int64_t>("key"))),
        centre_(spec.GetArgument<bool>("centre")),
        views_(view_distributions(spec.GetRepeatedArgument<std::string>("distribution"))) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    DALI_ENFORCE(rows.type() == DALI_INT64, "m3i_draw_views: expected rows of int64");
    for (int m = 1; m < ws.NumInput(); ++m) {
      const auto& sizes = ws.Input<dali::CPUBackend>(m);
      DALI_ENFORCE(sizes.type() == DALI_INT64 && sizes.sample_dim() == 1,
                   "m3i_draw_views: expected sizes [2 or more] int64");
    }
    const dali::TensorShape<2> shape(static_cast<int64_t>(views_.size()), kViewColumns);
    out.resize(1);
    out[0] = {dali::uniform_list_shape(rows.num_samples(), shape), DALI_FLOAT};
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const auto& rows = ws.Input<dali::CPUBackend>(0);
    auto& out = ws.Output<dali::CPUBackend>(0);
    const NvtxRange range("data.draw", rows.num_samples());
    for (int i = 0; i < rows.num_samples(); ++i) {  // some microseconds each
      auto* params = reinterpret_cast<ViewParams*>(out.mutable_tensor<float>(i));
      const auto position = static_cast<uint64_t>(rows.tensor<int64_t>(i)[0]);
      for (size_t v = 0; v < views_.size(); ++v) {
        const int source = view_source(static_cast<int>(v), ws.NumInput() - 1);
        const int64_t* size = ws.Input<dali::CPUBackend>(1 + source).tensor<int64_t>(i);
        params[v] = centre_ ? centre(size[0], size[1])
                            : views::draw_view(views_[v], size[0], size[1], seed_, position,
                                               static_cast<uint32_t>(v));
      }
    }
  }

 private:
  // The largest centred square, otherwise unchanged.
  static ViewParams centre(int64_t height, int64_t width) {
    const int64_t side = std::min(height, width);
    return {static_cast<float>((height - side) / 2),
            static_cast<float>((width - side) / 2),
            static_cast<float>(side),
            static_cast<float>(side),
            0,
            1,
            1,
            1,
            0,
            0,
            0,
            0,
            0};
  }

  uint64_t seed_;
  bool centre_;
  std::vector<ViewDistribution> views_;
};

class MakeViews : public dali::Operator<dali::CPUBackend> {
 public:
  explicit MakeViews(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec),
        geometry_(view_geometry(spec.GetRepeatedArgument<int>("geometry"))),
        scratch_(num_threads_) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws) override {
    describe_views<dali::CPUBackend>(out, ws, geometry_);
    return true;
  }

  void RunImpl(dali::Workspace& ws) override {
    const int batch = ws.Input<dali::CPUBackend>(0).num_samples();
    for (size_t v = 0; v < geometry_.size(); ++v) ws.Output<dali::CPUBackend>(v).SetLayout("CHW");
    auto& pool = ws.GetThreadPool();
    for (int i = 0; i < batch; ++i) {
      pool.AddWork([this, &ws, i](int thread) { make(ws, i, scratch_[thread]); }, -i);
    }
    pool.RunAll();
  }

 private:
  void make(dali::Workspace& ws, int i, ViewScratch& scratch) {
    const NvtxRange range("data.views", i);
    const auto* params =
        reinterpret_cast<const ViewParams*>(ws.Input<dali::CPUBackend>(0).tensor<float>(i));
    const std::vector<ViewImage> images = view_images<dali::CPUBackend>(ws, i, geometry_.size());
    std::vector<uint8_t*> out;
    for (size_t v = 0; v < geometry_.size(); ++v) {
      out.push_back(ws.Output<dali::CPUBackend>(static_cast<int>(v)).mutable_tensor<uint8_t>(i));
    }
    make_views(images.data(), static_cast<int>(images.size()), geometry_.data(), params,
               static_cast<int>(geometry_.size()), out.data(), scratch);
  }

  std::vector<ViewGeometry> geometry_;
  std::vector<ViewScratch> scratch_;  // of each thread
};

}  // namespace m3i

namespace dali {

DALI_REGISTER_OPERATOR(M3iDrawViews, m3i::DrawViews, CPU);
DALI_REGISTER_OPERATOR(M3iViews, m3i::MakeViews, CPU);

DALI_SCHEMA(M3iDrawViews)
    .DocStr(R"(Draws the parameters of all views of a sample: [V, 13] float32.

Inputs: rows as those of `m3i_read`, of which the position is read, then [2 or more] int64 that begin
with height and width of a picture, and those of a second one where view 1 is cut of it.)")
    .NumInput(2, 3)
    .NumOutput(1)
    .AddArg("distribution", "15 numbers a view as hexadecimal text: ViewDistribution.",
            DALI_STRING_VEC)
    .AddOptionalArg<int64_t>("key", "Seed of the draws.", 0)
    .AddOptionalArg("centre", "Takes the largest centred square in place of a draw.", false);

DALI_SCHEMA(M3iViews)
    .DocStr(R"(Cuts all views of decoded pictures: an output [3, H, W] uint8 for each.

Inputs: parameters of `m3i_draw_views`, a picture [H, W, 3] uint8, and a second one for view 1.)")
    .NumInput(2, 3)
    .InputDevice(0, dali::InputDevice::CPU)
    .OutputFn([](const OpSpec& spec) {
      return static_cast<int>(spec.GetRepeatedArgument<int>("geometry").size() /
                              m3i::kViewGeometry);
    })
    .AddArg("geometry", "Height, width, blur kernel and 1 for bicubic, of each view.",
            DALI_INT_VEC);

}  // namespace dali
