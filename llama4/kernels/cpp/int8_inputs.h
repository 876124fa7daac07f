// Rows of x rounded to int8, with a scale for each 32 inputs: what products with the formats `Int8Inputs` multiply.

#pragma once

#include <limits>

#include "gguf_blocks.h"

namespace {

// A step of a row of x, `to`, of which `count` inputs are left, with zeros behind them.
template <class X, class Number, long step>
INLINE void take_inputs(const X* x, long count, Number (&to)[step]) {
  if constexpr (std::is_same_v<X, Number>) __builtin_memcpy(to, x, count * sizeof(X));
  else
    for (long i = 0; i < count; i++) assign(to[i], upcast(x[i]));
  std::fill(to + count, to + step, Number());
}

// The same rounded to integers, so that the largest of 32 is the largest that there is, and their scales. NaN and
// infinity have no integers: the scale of a group that has one is NaN.
template <class X, class Number, long step>
INLINE void round_inputs(const X* x, long count, Number (&to)[step], float* scales) {
  constexpr int largest = std::numeric_limits<Number>::max();
  for (long i = 0; i < count; i += 32) {
    const f32x16 low = load_floats(x + i), high = load_floats(x + i + 16);
    const float most = horizontal_max(max(max(low, -low), max(high, -high)));
    const float factor = most > 0 ? largest / most : 0;
    store_low(to + i, to_integers(round_to_integer(low * factor)));
    store_low(to + i + 16, to_integers(round_to_integer(high * factor)));
    const float nothing = horizontal_sum((low - low) + (high - high));  // `low * 0` GCC takes for 0
    scales[i / 32] = most / largest + nothing;
  }
  std::fill(to + count, to + step, 0);
  std::fill(scales + count / 32, scales + step / 32, 0);
}

}  // namespace
