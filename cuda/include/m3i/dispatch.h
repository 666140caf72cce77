// Dispatch of run-time values to template arguments, in launchers only, over at most three axes.
// C++17.
#pragma once

#include "m3i/types.h"

#include <type_traits>

namespace m3i {

// Calls body(Type<T>{}) for the one of First, Rest... of this dtype, or for the last one.
template <class First, class... Rest, class Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  if constexpr (sizeof...(Rest) == 0) {
    return body(Type<First>{});
  } else {
    return dtype == kDType<First> ? body(Type<First>{}) : dispatch_dtype<Rest...>(dtype, body);
  }
}

// Calls body(std::integral_constant<int, value>{}) for the one of kFirst, kRest... that equals
// value, or for the last one.
template <int kFirst, int... kRest, class Body>
auto dispatch_int(int value, Body&& body) {
  if constexpr (sizeof...(kRest) == 0) {
    return body(std::integral_constant<int, kFirst>{});
  } else {
    return value == kFirst ? body(std::integral_constant<int, kFirst>{})
                           : dispatch_int<kRest...>(value, body);
  }
}

}  // namespace m3i
