// The views of a batch, as the arguments of fn.m3i_draw_views and fn.m3i_views describe them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "dali/pipeline/operator/operator.h"
#include "views/cpu/kernel_table.h"

namespace m3i {

// DALI has no argument of doubles, and the draws need all their bits: hexadecimal text, such as
// "0x1.3333333333333p-2", has them.
inline std::vector<ViewDistribution> view_distributions(const std::vector<std::string>& numbers) {
  DALI_ENFORCE(!numbers.empty() && numbers.size() % kViewDistribution == 0,
               "distribution: expected 15 numbers a view, got " + std::to_string(numbers.size()));
  std::vector<double> values;
  for (const std::string& number : numbers) {
    char* end = nullptr;
    values.push_back(std::strtod(number.c_str(), &end));
    DALI_ENFORCE(*end == '\0' && !number.empty(), "distribution: expected a number, got " + number);
  }
  std::vector<ViewDistribution> views(values.size() / kViewDistribution);
  std::memcpy(views.data(), values.data(), values.size() * sizeof(double));
  return views;
}

// geometry: height, width, blur_kernel_size and cubic of each view.
inline std::vector<ViewGeometry> view_geometry(const std::vector<int>& geometry) {
  DALI_ENFORCE(!geometry.empty() && geometry.size() % kViewGeometry == 0,
               "geometry: expected four numbers a view, got " + std::to_string(geometry.size()));
  std::vector<ViewGeometry> views;
  for (size_t v = 0; v < geometry.size(); v += kViewGeometry) {
    const int height = geometry[v], width = geometry[v + 1], blur = geometry[v + 2];
    const int least = std::min(height, width), most = std::max(height, width);
    DALI_ENFORCE(least >= 1 && most <= kViewMaxSide && blur >= 1 && blur <= kViewMaxBlur &&
                     blur % 2 == 1 && blur / 2 < least,
                 "geometry: expected sides and an odd kernel of which half is less, got " +
                     std::to_string(height) + " x " + std::to_string(width) + " and " +
                     std::to_string(blur));
    views.push_back({height, width, blur, geometry[v + 3]});
  }
  return views;
}

// Checks the parameters, input 0, and one or two pictures of a sample, from input `first_image` on.
// Returns the samples.
template <typename Backend>
int check_view_inputs(const dali::Workspace& ws, size_t num_views, int first_image) {
  const auto& params = ws.Input<dali::CPUBackend>(0);
  const int batch = params.num_samples();
  const dali::TensorShape<2> rows(static_cast<int64_t>(num_views), kViewColumns);
  DALI_ENFORCE(
      params.type() == DALI_FLOAT && params.shape() == dali::uniform_list_shape(batch, rows),
      "views: expected parameters [V, 13] float32");
  for (int m = first_image; m < ws.NumInput(); ++m) {
    const auto& images = ws.Input<Backend>(m);
    DALI_ENFORCE(images.type() == DALI_UINT8 && images.sample_dim() == 3,
                 "views: expected images [H, W, 3] uint8");
  }
  return batch;
}

// Checks the inputs of fn.m3i_views, and describes its outputs.
template <typename Backend>
void describe_views(std::vector<dali::OutputDesc>& out, const dali::Workspace& ws,
                    const std::vector<ViewGeometry>& geometry) {
  const int batch = check_view_inputs<Backend>(ws, geometry.size(), 1);
  out.resize(geometry.size());
  for (size_t v = 0; v < geometry.size(); ++v) {
    const dali::TensorShape<3> shape(kViewChannels, static_cast<int64_t>(geometry[v].height),
                                     static_cast<int64_t>(geometry[v].width));
    out[v] = {dali::uniform_list_shape(batch, shape), DALI_UINT8};
  }
}

// Pictures of sample i, where the backend has them, from input `first_image` on. Throws where its
// parameters are not for them.
template <typename Backend>
std::vector<ViewImage> view_images(const dali::Workspace& ws, int i, size_t num_views,
                                   int first_image = 1) {
  std::vector<ViewImage> images;
  for (int m = first_image; m < ws.NumInput(); ++m) {
    const auto& list = ws.Input<Backend>(m);
    const auto shape = list.tensor_shape_span(i);
    DALI_ENFORCE(shape[2] == kViewChannels, "views: expected images of three channels");
    images.push_back({list.template tensor<uint8_t>(i), static_cast<int32_t>(shape[0]),
                      static_cast<int32_t>(shape[1]), kViewChannels * shape[1]});
  }
  const auto* params =
      reinterpret_cast<const ViewParams*>(ws.Input<dali::CPUBackend>(0).tensor<float>(i));
  for (size_t v = 0; v < num_views; ++v) {
    const ViewImage& image =
        images[view_source(static_cast<int>(v), static_cast<int>(images.size()))];
    const char* wrong = wrong_view_param(params[v], image.height, image.width);
    DALI_ENFORCE(!wrong, dali::make_string("views: view ", v, ": ", wrong ? wrong : "",
                                           ": expected a value for a picture of ", image.height,
                                           " x ", image.width));
  }
  return images;
}

}  // namespace m3i
