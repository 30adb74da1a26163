// A row of numbers as int8 codes with one scale.
#pragma once

#include "vectors.h"

namespace native {

constexpr float kTiny = 1.17549435e-38f;

// What the codes of a row are multiplied by: its largest entry is 127. `nan`: a sum that is NaN where the row has a
// number that is not finite, else zero.
struct RowScale {
  float scale, nan;
};

template <typename X>
RowScale scale_of_row(const X* x, int64_t size) {
  Floats most{}, nothing{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats value = load(x + i);
    most = larger(most, larger(value, -value));
    nothing += value - value;
  }
  const float top = largest(most) / 127.0f;
  return {top > kTiny ? top : kTiny, sum(nothing)};
}

}  // namespace native
