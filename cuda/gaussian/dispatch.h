// gaussian: dispatch of the supported pairs of element types to template arguments.
#pragma once

#include "gaussian/params.h"
#include "m3i/dispatch.h"

namespace m3i {

// Calls body(Type<P>{}, Type<T>{}) for prediction and target; float64 pairs with itself only.
template <class Body>
auto dispatch_gaussian(const GaussianRows& of, const Body& body) {
  if (of.prediction == DType::kFloat64) return body(Type<double>{}, Type<double>{});
  return dispatch_dtype<float, BFloat16, Float16>(of.prediction, [&](auto prediction) {
    return dispatch_dtype<float, BFloat16, Float16>(
        of.target, [&](auto target) { return body(prediction, target); });
  });
}

}  // namespace m3i
