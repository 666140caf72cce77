// views: the grid of patches of a view of any size, on the host.
#pragma once

#include "views/params.h"

#include <algorithm>
#include <cmath>

namespace m3i::views {

// Rows and columns of patches of a view, of the aspect of a crop of height x width, both above 0;
// rows times columns is at most most_tokens, at least 1. Number by number that of grid_of in
// pipelines/sample_order/token_budget.py, which says what it chooses. `first` stays 0.
inline ViewGrid grid_of(double height, double width, int64_t most_tokens) {
  if (height > width) {
    const ViewGrid turned = grid_of(width, height, most_tokens);
    return {turned.columns, turned.rows, 0};
  }
  const double aspect = width / height;
  const double ideal = std::sqrt(static_cast<double>(most_tokens) / aspect);
  const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(most_tokens)));
  const auto of = [&](double nearest) {
    const int64_t rows = std::min(std::max(static_cast<int64_t>(nearest), int64_t{1}), side);
    // to the nearest even one, as Python rounds
    const auto columns = static_cast<int64_t>(std::nearbyint(static_cast<double>(rows) * aspect));
    return ViewGrid{rows, std::min(std::max(rows, columns), most_tokens / rows), 0};
  };
  const auto apart = [&](const ViewGrid& grid) {
    const double own = static_cast<double>(grid.columns) / static_cast<double>(grid.rows);
    return std::abs(std::log(own / aspect));
  };
  const ViewGrid fewer = of(std::floor(ideal)), more = of(std::ceil(ideal));
  const double of_fewer = apart(fewer), of_more = apart(more);
  if (of_fewer != of_more) return of_fewer < of_more ? fewer : more;
  return more.rows * more.columns > fewer.rows * fewer.columns ? more : fewer;
}

}  // namespace m3i::views
