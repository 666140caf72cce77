// add_layer_norm: dispatch of the supported pairs of element types to template arguments.
#pragma once

#include "add_layer_norm/params.h"
#include "m3i/dispatch.h"

namespace m3i {

// Calls body(Type<X>{}, Type<P>{}) for the stream and the branch: any type beside float, but
// double, and otherwise a type beside itself.
template <class Body>
auto dispatch_add_layer_norm(const AddLayerNormRows& of, const Body& body) {
  if (of.stream == DType::kFloat32) {
    return dispatch_dtype<float, BFloat16, Float16>(
        of.branch, [&](auto branch) { return body(Type<float>{}, branch); });
  }
  return dispatch_dtype<BFloat16, Float16, double>(
      of.stream, [&](auto stream) { return body(stream, stream); });
}

}  // namespace m3i
