// Arrays whose numbers are float32 or, as their bits, bfloat16.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace native {

// body(a number of the array's type): what it returns.
template <typename Array, typename Body>
auto of_type(const Array& x, const Body& body) {
  return x.element_type() == xla::ffi::F32 ? body(float{}) : body(uint16_t{});
}

}  // namespace native
