// What stands between the products, for one row or head.

#pragma once

#include "vectors.h"

namespace {

float inverse_rms(float squares, long count, float eps) { return 1 / __builtin_sqrtf(squares / count + eps); }

template <class X, class W>
void rms_norm(const X* x, long D, const W* weight, float eps, W* y) {
  f32 squares[2] = {};
  for (long d = 0; d < D; d += 16) {
    f32 v = floats(x + d);
    squares[d / 16 % 2] += v * v;
  }
  float factor = inverse_rms(sum(squares[0] + squares[1]), D, eps);
  for (long d = 0; d < D; d += 16) keep(y + d, floats(x + d) * factor * floats(weight + d));
}

// A head [C]: consecutive pairs turned by unit complex numbers [C / 2], if any; then normalised, if eps is not negative;
// then multiplied by a factor. In place if wanted.
template <class X>
void turn(const X* x, long C, const float* rotation, float eps, float factor, X* y) {
  float head[1024];
  f32 squares{};
  for (long c = 0; c < C; c += 16) {
    f32 v = floats(x + c);
    if (rotation) {
      f32 r = load<f32>(rotation + c);
      f32 re = __builtin_shufflevector(r, r, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
      f32 im = __builtin_shufflevector(r, r, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
      f32 other = __builtin_shufflevector(v, -v, 17, 0, 19, 2, 21, 4, 23, 6, 25, 8, 27, 10, 29, 12, 31, 14);
      v = v * re + other * im;
    }
    squares += v * v;
    store(head + c, v);
  }
  if (eps >= 0) factor *= inverse_rms(sum(squares), C, eps);
  for (long c = 0; c < C; c += 16) keep(y + c, load<f32>(head + c) * factor);
}

// silu(gate) * up
template <class X>
void swiglu(const X* gate, const X* up, long F, X* y) {
  for (long i = 0; i < F; i += 16) {
    f32 g = floats(gate + i);
    keep(y + i, g / (exponential(-g) + 1.f) * floats(up + i));
  }
}

}  // namespace
