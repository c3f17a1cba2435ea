// How kernels become functions of C that return null, or say what went wrong.
#pragma once

#include "emulation.h"

#include <string>
#include <tuple>

#include "device.cuh"

namespace calls {

inline std::string message;

template <class Body>
const char* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

using Types = std::tuple<double, float, c10::BFloat16, c10::Half>;  // in the order of emulated.DTYPES

// ONLY_DTYPE leaves out the others, which compiles faster.
template <int kNumber, class Body>
bool called(int dtype, Body& body) {
#if defined(ONLY_DTYPE)
  constexpr bool kIsThere = kNumber == ONLY_DTYPE;
#else
  constexpr bool kIsThere = true;
#endif
  if constexpr (kIsThere) {
    if (dtype == kNumber) body(static_cast<std::tuple_element_t<kNumber, Types>*>(nullptr));
  }
  return kIsThere && dtype == kNumber;
}

// Calls body with a null pointer of type number dtype, one of those for which there are kernels.
template <int... kNumbers, class Body>
const char* typed(int dtype, Body body) {
  return guarded([&] {
    if (!(called<kNumbers>(dtype, body) || ...)) throw std::invalid_argument("dtype: there are no kernels of it");
  });
}

}  // namespace calls
