// Weights to int4, as llama4/quantization/int4.py does it, a group at a time in registers.

#pragma once

#include "simd.h"

namespace {

// A scale as its dtype holds it; 1 for zero, so that values are zero where all weights are.
template <class X>
float round_scale(float x) {
  X rounded;
  assign(rounded, x);
  return upcast(rounded) == 0 ? 1 : upcast(rounded);
}

inline f32x16 to_int4(f32x16 weights, float scale) {
  return max(min(round_to_integer(weights / scale), f32x16{} + 7.f), f32x16{} - 8.f);
}

// The scale of a group with the least squared error. Tries some ranges, as parts of the largest weight, and for each
// the scale that fits the values which it gives best.
template <class X>
float best_scale(const float* group, long size, const float* ranges, long count) {
  float highest = group[0], lowest = group[0], best = 1, least = INFINITY;
  for (long i = 1; i < size; i++) highest = std::max(highest, group[i]), lowest = std::min(lowest, group[i]);
  for (long range = 0; range < count; range++) {
    float scale = round_scale<X>((highest > -lowest ? highest : lowest) * (ranges[range] / -8));
    for (int round = 0; round < 2; round++) {
      f32x16 error{}, squares{}, products{};
      for (long i = 0; i < size; i += 16) {
        f32x16 weights = load<f32x16>(group + i), values = to_int4(weights, scale), off = values * scale - weights;
        error += off * off, squares += values * values, products += values * weights;
      }
      if (horizontal_sum(error) < least) least = horizontal_sum(error), best = scale;
      scale = round_scale<X>(horizontal_sum(products) / std::max(horizontal_sum(squares), 1e-9f));
    }
  }
  return best;
}

// Groups of `size` weights, a multiple of 16, to values, eight in a word, the first in the lowest bits, and a scale per
// group, which is NaN if one of them is NaN or infinite.
template <class X>
void quantize_int4(long threads, const X* weights, long groups, long size, const float* ranges, long count,
                   uint32_t* words, X* scales) {
  Team(threads).for_each(groups, size * count, [=](long g) {
    float* group = scratch<float, Use::group>(size);
    f32x16 zeros{};
    for (long i = 0; i < size; i += 16) {
      const f32x16 own = load_floats(weights + g * size + i);
      store(group + i, own), zeros += zero_or_nan(own);
    }
    const float scale = best_scale<X>(group, size, ranges, count);
    assign(scales[g], scale + horizontal_sum(zeros));
    for (long i = 0; i < size; i += 16) {
      i32x16 values = to_integers(to_int4(load<f32x16>(group + i), scale)) + 8;
      for (long half = 0; half < 2; half++) {
        uint32_t word = 0;
        for (long k = 0; k < 8; k++) word |= uint32_t(values[8 * half + k]) << 4 * k;
        words[(g * size + i) / 8 + half] = word;
      }
    }
  });
}

}  // namespace
