// Weights to four bits: what llama4/quantization/int4.py does, a group at a time in registers.

#pragma once

#include "vectors.h"

namespace {

// A number as its dtype has it, for a scale: not zero, so that codes are zero where all weights are.
template <class X>
float as_scale(float x) {
  X rounded;
  assign(rounded, x);
  return widened(rounded) == 0 ? 1 : widened(rounded);
}

f32 codes_of(f32 weights, float scale) {
  return larger(smaller(weights / scale + 12582912.f - 12582912.f, f32{} + 7.f), f32{} - 8.f);
}

// The scale of a group with the least squared error: of some ranges, in parts of its largest weight, each refitted to the
// codes it gives.
template <class X>
float fitted_scale(const float* group, long size, const float* ranges, long count) {
  float highest = group[0], lowest = group[0], best = 1, least = INFINITY;
  for (long i = 1; i < size; i++) highest = std::max(highest, group[i]), lowest = std::min(lowest, group[i]);
  for (long range = 0; range < count; range++) {
    float scale = as_scale<X>((highest > -lowest ? highest : lowest) * (ranges[range] / -8));
    for (int round = 0; round < 2; round++) {
      f32 error{}, squares{}, products{};
      for (long i = 0; i < size; i += 16) {
        f32 weights = load<f32>(group + i), codes = codes_of(weights, scale), off = codes * scale - weights;
        error += off * off, squares += codes * codes, products += codes * weights;
      }
      if (sum(error) < least) least = sum(error), best = scale;
      scale = as_scale<X>(sum(products) / std::max(sum(squares), 1e-9f));
    }
  }
  return best;
}

// Groups of weights, a multiple of sixteen each, to codes, eight in a word, the first lowest, and a scale per group.
template <class X>
void quantize_int4(const X* weights, long groups, long size, const float* ranges, long count, uint32_t* words,
                   X* scales) {
#pragma omp parallel for schedule(static)
  for (long g = 0; g < groups; g++) {
    float* group = scratch<float, 13>(size);
    for (long i = 0; i < size; i += 16) store(group + i, floats(weights + g * size + i));
    const float scale = fitted_scale<X>(group, size, ranges, count);
    assign(scales[g], scale);
    for (long i = 0; i < size; i += 16) {
      i32 codes = __builtin_convertvector(codes_of(load<f32>(group + i), scale), i32) + 8;
      for (long half = 0; half < 2; half++) {
        uint32_t word = 0;
        for (long k = 0; k < 8; k++) word |= uint32_t(codes[8 * half + k]) << 4 * k;
        words[(g * size + i) / 8 + half] = word;
      }
    }
  }
}

}  // namespace
