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

// How a group of inputs becomes integers of which the largest is the largest that there is; of 16 bits, at least half
// of it, as the scale is a power of two then: bfloat16 from 128 steps on are not rounded. NaN and infinity have no
// integers: the scale of a group that has one is NaN.
struct Rounding {
  float factor, scale;
};
template <class Number, class X>
INLINE Rounding rounding_of(const X* x, long count) {
  constexpr int largest = std::numeric_limits<Number>::max();
  f32x16 magnitudes{}, zeros{};
  for (long i = 0; i < count; i += 16) {
    const f32x16 own = load_floats(x + i);
    magnitudes = max(magnitudes, max(own, -own));
    zeros += zero_or_nan(own);
  }
  const float most = horizontal_max(magnitudes), zero = horizontal_sum(zeros);
  if constexpr (largest <= 127) return {most > 0 ? largest / most : 0, most / largest + zero};
  const auto above = (__builtin_bit_cast(uint32_t, most / largest) + 0x7fffff) & 0x7f800000;
  const auto power = __builtin_bit_cast(float, uint32_t(above));
  return {most > 0 ? 1 / power : 0, power + zero};
}

template <class X>
INLINE i32x16 round_sixteen(const X* x, float factor) {
  return to_integers(round_to_integer(load_floats(x) * factor));
}

// A step of a row of x rounded, and the scale of each group.
template <int group, class X, class Number, long step>
INLINE void round_inputs(const X* x, long count, Number (&to)[step], float* scales) {
  for (long i = 0; i < count; i += group) {
    const Rounding rounding = rounding_of<Number>(x + i, group);
    for (long k = i; k < i + group; k += 16) store_low(to + k, round_sixteen(x + k, rounding.factor));
    scales[i / group] = rounding.scale;
  }
  std::fill(to + count, to + step, 0);
  std::fill(scales + count / group, scales + step / group, 0);
}

}  // namespace
