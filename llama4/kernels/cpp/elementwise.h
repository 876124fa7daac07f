// Operations on one row or one head, between the products.

#pragma once

#include "simd.h"

namespace {

constexpr long max_head_dim = 1024;  // so that a head in float32 stays in the nearest cache

inline float inverse_rms(float squares, long count, float eps) { return 1 / __builtin_sqrtf(squares / count + eps); }

// y = x / sqrt(mean(x^2) + eps) * weight
template <class X, class W>
void rms_norm(const X* x, long D, const W* weight, float eps, W* y) {
  f32x16 squares[2] = {};
  for (long d = 0; d < D; d += 16) {
    f32x16 v = load_floats(x + d);
    squares[d / 16 % 2] += v * v;
  }
  float factor = inverse_rms(horizontal_sum(squares[0] + squares[1]), D, eps);
  for (long d = 0; d < D; d += 16) store_floats(y + d, load_floats(x + d) * factor * load_floats(weight + d));
}

// A head [C]: consecutive pairs as complex numbers, multiplied by `rotation` [C / 2] unless that is null; then RMS
// normalisation unless eps is negative; then multiplied by a factor. x may be y.
template <class X>
void apply_rope(const X* x, long C, const float* rotation, float eps, float factor, X* y) {
  float head[max_head_dim];
  f32x16 squares{};
  for (long c = 0; c < C; c += 16) {
    f32x16 v = load_floats(x + c);
    if (rotation) {
      f32x16 r = load<f32x16>(rotation + c);
      f32x16 re = shuffle<[](int i) { return i & ~1; }>(r, r);
      f32x16 im = shuffle<[](int i) { return i | 1; }>(r, r);
      f32x16 other = shuffle<[](int i) { return i & 1 ? i - 1 : lanes + i + 1; }>(v, -v);
      v = v * re + other * im;
    }
    squares += v * v;
    store(head + c, v);
  }
  if (eps >= 0) factor *= inverse_rms(horizontal_sum(squares), C, eps);
  for (long c = 0; c < C; c += 16) store_floats(y + c, load<f32x16>(head + c) * factor);
}

// y = silu(gate) * up
template <class X>
void swiglu(const X* gate, const X* up, long F, X* y) {
  for (long i = 0; i < F; i += 16) {
    f32x16 g = load_floats(gate + i);
    store_floats(y + i, g / (exp(-g) + 1.f) * load_floats(up + i));
  }
}

}  // namespace
