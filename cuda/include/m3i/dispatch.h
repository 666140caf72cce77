// Run-time values to template arguments: only launchers do this, over at most three axes. C++17.
#pragma once

#include "m3i/types.h"

#include <type_traits>

namespace m3i {

// body(Type<T>{}) for the one of First, Rest... whose dtype it is; the last one if none is.
template <class First, class... Rest, class Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  if constexpr (sizeof...(Rest) == 0) {
    return body(Type<First>{});
  } else {
    return dtype == kDType<First> ? body(Type<First>{}) : dispatch_dtype<Rest...>(dtype, body);
  }
}

// body(std::integral_constant<int, value>{}) for the one of kFirst, kRest... that equals value; the
// last one if none does.
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
