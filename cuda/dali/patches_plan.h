// The patches of a batch's views of any size, as the arguments of fn.m3i_patches describe them.
#pragma once

#include <string>
#include <vector>

#include "dali/views_plan.h"

namespace m3i {

// filters: blur_kernel_size and cubic of each view.
inline std::vector<ViewGeometry> view_filters(const std::vector<int>& filters) {
  DALI_ENFORCE(!filters.empty() && filters.size() % 2 == 0,
               "filters: expected two numbers a view, got " + std::to_string(filters.size()));
  std::vector<ViewGeometry> views;
  for (size_t v = 0; v < filters.size(); v += 2) {
    const int blur = filters[v];
    DALI_ENFORCE(blur >= 1 && blur <= kViewMaxBlur && blur % 2 == 1,
                 "filters: expected an odd blur kernel of 1 to 1023, got " + std::to_string(blur));
    views.push_back({0, 0, blur, filters[v + 1]});
  }
  return views;
}

inline int check_patch_size(int patch_size) {
  DALI_ENFORCE(patch_size >= 1 && patch_size <= kViewMaxSide,
               "patch_size: expected 1 to 16384 pixels, got " + std::to_string(patch_size));
  return patch_size;
}

// Rows and columns of view v of sample i.
inline ViewGrid view_grid(const dali::Workspace& ws, int i, size_t v) {
  const int64_t* grid = ws.Input<dali::CPUBackend>(1).tensor<int64_t>(i) + 2 * v;
  return {grid[0], grid[1], 0};
}

// Checks the inputs of fn.m3i_patches: parameters, grids and one or two pictures of a sample; and
// describes its outputs, of which each sample's has as many rows as its grid has patches.
template <typename Backend>
void describe_patches(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws,
                      size_t num_views, int patch_size) {
  const int batch = check_view_inputs<Backend>(ws, num_views, 2);
  const auto& grids = ws.Input<dali::CPUBackend>(1);
  const dali::TensorShape<2> rows(static_cast<int64_t>(num_views), 2);
  DALI_ENFORCE(grids.type() == DALI_INT64 && grids.shape() == dali::uniform_list_shape(batch, rows),
               "m3i_patches: expected grids [V, 2] int64");
  const int64_t most = kViewMaxSide / patch_size;
  const int64_t bytes = static_cast<int64_t>(kViewChannels) * patch_size * patch_size;
  out.resize(num_views);
  for (size_t v = 0; v < num_views; ++v) {
    dali::TensorListShape<> shape(batch, 2);
    for (int i = 0; i < batch; ++i) {
      const ViewGrid grid = view_grid(ws, i, v);
      DALI_ENFORCE(
          grid.rows >= 1 && grid.rows <= most && grid.columns >= 1 && grid.columns <= most,
          dali::make_string("m3i_patches: view ", v, ": expected 1 to ", most,
                            " rows and columns of patches, got ", grid.rows, " x ", grid.columns));
      shape.set_tensor_shape(i, dali::TensorShape<2>(grid.rows * grid.columns, bytes));
    }
    out[v] = {shape, DALI_UINT8};
  }
}

}  // namespace m3i
