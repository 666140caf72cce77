// The views of a batch, as the arguments of fn.m3i_draw_views and fn.m3i_views describe them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "dali/pipeline/operator/operator.h"
#include "views/params.h"

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

// geometry: size, blur_kernel_size and cubic of each view.
inline std::vector<ViewGeometry> view_geometry(const std::vector<int>& geometry) {
  DALI_ENFORCE(!geometry.empty() && geometry.size() % 3 == 0,
               "geometry: expected three numbers a view, got " + std::to_string(geometry.size()));
  std::vector<ViewGeometry> views;
  for (size_t v = 0; v < geometry.size(); v += 3) {
    const int size = geometry[v], blur = geometry[v + 1];
    DALI_ENFORCE(size >= 1 && size <= kViewMaxSide && blur >= 1 && blur <= kViewMaxBlur &&
                     blur % 2 == 1 && blur / 2 < size,
                 "geometry: expected a size and an odd kernel of which half is less, got " +
                     std::to_string(size) + " and " + std::to_string(blur));
    views.push_back({size, blur, geometry[v + 2]});
  }
  return views;
}

}  // namespace m3i
