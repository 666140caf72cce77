// The launcher called as an operator of DALI calls it: pictures by themselves, rows of any stride,
// without torch.
#include "views/op.h"

extern "C" __attribute__((visibility("default"))) int make_listed_views(
    const m3i::ViewImage* images, const m3i::ViewParams* rows, uint8_t* out, uint8_t* smaller_out,
    int num_samples, int size, int smaller) {
  const m3i::ViewGeometry geometry[] = {{size, size, 3, 1}, {smaller, smaller, 3, 0}};
  uint8_t* const places[] = {out, smaller_out};
  m3i::ViewsCudaParams params{};
  params.images = images;
  params.params = rows;
  params.num_samples = num_samples;
  params.num_pictures = 1;
  if (m3i::plan_views(geometry, 2, places, params) != 0) return -1;
  return m3i::launch_views(params, nullptr);
}
