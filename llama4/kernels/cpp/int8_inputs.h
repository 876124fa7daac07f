// Rows of x rounded to int8, with a scale for each group of inputs: what products with the formats `Int8Inputs` take.

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

// How a group of inputs becomes integers of which the largest is the largest that there is. NaN and infinity have no
// integers: the scale of a group that has one is NaN.
struct Rounding {
  float factor, scale;
};
template <class Number, class X>
INLINE Rounding rounding_of(const X* x, long count) {
  constexpr int largest = std::numeric_limits<Number>::max();
  f32x16 magnitudes{}, nothing{};
  for (long i = 0; i < count; i += 16) {
    const f32x16 own = load_floats(x + i);
    magnitudes = max(magnitudes, max(own, -own));
    nothing += own - own;  // `own * 0` GCC takes for 0
  }
  const float most = horizontal_max(magnitudes);
  return {most > 0 ? largest / most : 0, most / largest + horizontal_sum(nothing)};
}

template <class X, class Number>
INLINE void round_sixteen(const X* x, float factor, Number* to) {
  store_low(to, to_integers(round_to_integer(load_floats(x) * factor)));
}

// A step of a row of x rounded, and the scales of each 32.
template <class X, class Number, long step>
INLINE void round_inputs(const X* x, long count, Number (&to)[step], float* scales) {
  for (long i = 0; i < count; i += 32) {
    const Rounding rounding = rounding_of<Number>(x + i, 32);
    round_sixteen(x + i, rounding.factor, to + i), round_sixteen(x + i + 16, rounding.factor, to + i + 16);
    scales[i / 32] = rounding.scale;
  }
  std::fill(to + count, to + step, 0);
  std::fill(scales + count / 32, scales + step / 32, 0);
}

}  // namespace
