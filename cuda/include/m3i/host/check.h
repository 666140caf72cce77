// Checks of the ops' arguments. Every message names the argument, what was expected and what was
// given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace m3i {

// In a shape given to check_shape: any extent.
inline constexpr int64_t kAny = -1;

template <class Extents>
std::string shape_string(const Extents& extents) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t extent : extents) {
    text << separator;
    extent == kAny ? text << "*" : text << extent;
    separator = ", ";
  }
  text << (extents.size() == 0 ? "[]" : "]");
  return text.str();
}

// The name of a dtype as in Python: uint8, not Byte.
inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline void check_dtype(const torch::stable::Tensor& tensor, const char* name,
                        torch::headeronly::ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": expected dtype ", dtype_name(expected),
                  ", got ", dtype_name(tensor.scalar_type()));
}

// kAny in `expected` matches every extent.
inline void check_shape(const torch::stable::Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool matches = sizes.size() == expected.size();
  for (size_t i = 0; matches && i < sizes.size(); ++i) {
    const int64_t wanted = expected.begin()[i];
    matches = wanted == kAny || wanted == sizes[i];
  }
  STD_TORCH_CHECK(matches, name, ": expected shape ", shape_string(expected), ", got ",
                  shape_string(sizes));
}

inline void check_contiguous(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  shape_string(tensor.strides()), " for shape ", shape_string(tensor.sizes()));
}

// Checks that `tensor` is on the device of `reference`.
inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const torch::stable::Tensor& reference, const char* reference_name) {
  STD_TORCH_CHECK(tensor.is_cuda() == reference.is_cuda() &&
                      tensor.get_device_index() == reference.get_device_index(),
                  name, ": expected on the device of ", reference_name, " (",
                  reference.is_cuda() ? "cuda:" : "cpu:", reference.get_device_index(), "), got ",
                  tensor.is_cuda() ? "cuda:" : "cpu:", tensor.get_device_index());
}

}  // namespace m3i
