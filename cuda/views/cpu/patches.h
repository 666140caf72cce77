// views on the CPU: a view cut to patches, by the functions of kernel_table.h.
#pragma once

#include "views/cpu/kernel_table.h"

#include <cstring>

namespace m3i {

// Memory that calls use again, of one thread.
struct PatchScratch {
  ViewScratch view;    // a view before it is cut
  ViewScratch kernel;  // of what makes it
};

// Writes one view as patches, [rows * columns, 3, P, P]; `first` of the grid is not read. The crop
// lies in the picture, and the grid's sides are within kViewMaxSide. filter: see geometry_of.
inline void make_patches(const ViewImage& image, const ViewGeometry& filter,
                         const ViewParams& params, const ViewGrid& grid, int patch_size,
                         uint8_t* out, PatchScratch& scratch) {
  const ViewGeometry geometry = geometry_of(grid, patch_size, filter);
  const size_t row = static_cast<size_t>(geometry.width);
  uint8_t* view = scratch.view.reserve(kViewChannels * geometry.height * row);
  fastest_views_kernels().make_view(image, geometry, params, view, scratch.kernel);
  const size_t side = static_cast<size_t>(patch_size), plane = geometry.height * row;
  for (int64_t y = 0; y < grid.rows; ++y) {
    for (int64_t x = 0; x < grid.columns; ++x) {
      const uint8_t* corner = view + y * side * row + x * side;
      for (int c = 0; c < kViewChannels; ++c) {
        for (size_t i = 0; i < side; ++i, out += side) {
          std::memcpy(out, corner + c * plane + i * row, side);
        }
      }
    }
  }
}

}  // namespace m3i
