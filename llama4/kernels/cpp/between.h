// What stands between the products.

#pragma once

#include "vectors.h"

namespace {

float inverse_rms(float squares, long count, float eps) { return 1 / __builtin_sqrtf(squares / count + eps); }

template <class X, class W>
void rms_norm(const X* x, long N, long D, const W* weight, float eps, W* y) {
#pragma omp parallel for schedule(static) if (N * D > worth_threads)
  for (long n = 0; n < N; n++) {
    f32 squares[2] = {};
    for (long d = 0; d < D; d += 16) {
      f32 v = floats(x + n * D + d);
      squares[d / 16 % 2] += v * v;
    }
    float factor = inverse_rms(sum(squares[0] + squares[1]), D, eps);
    for (long d = 0; d < D; d += 16)
      keep(y + n * D + d, floats(x + n * D + d) * factor * floats(weight + d));
  }
}

// Heads [N, H, C]: consecutive pairs turned by unit complex numbers [N, C / 2], if any; then normalised, if eps is not
// negative; then multiplied by factors [N], if any.
template <class X>
void turn(const X* x, long stride, long N, long H, long C, const float* rotation, float eps, const float* factors,
          X* y) {
#pragma omp parallel for schedule(static) if (N * H * C > worth_threads)
  for (long n = 0; n < N; n++)
    for (long h = 0; h < H; h++) {
      const X* from = x + n * stride + h * C;
      float head[1024];
      f32 squares{};
      for (long c = 0; c < C; c += 16) {
        f32 v = floats(from + c);
        if (rotation) {
          f32 r = load<f32>(rotation + n * C + c);
          f32 re = __builtin_shufflevector(r, r, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
          f32 im = __builtin_shufflevector(r, r, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
          f32 other = __builtin_shufflevector(v, -v, 17, 0, 19, 2, 21, 4, 23, 6, 25, 8, 27, 10, 29, 12, 31, 14);
          v = v * re + other * im;
        }
        squares += v * v;
        store(head + c, v);
      }
      float factor = (eps < 0 ? 1 : inverse_rms(sum(squares), C, eps)) * (factors ? factors[n] : 1);
      for (long c = 0; c < C; c += 16) keep(y + (n * H + h) * C + c, load<f32>(head + c) * factor);
    }
}

// silu(gate) * up; rows of both lie `stride` apart.
template <class X>
void swiglu(const X* gate, const X* up, long N, long F, long stride, X* y) {
#pragma omp parallel for schedule(static) if (N * F > worth_threads)
  for (long n = 0; n < N; n++)
    for (long i = 0; i < F; i += 16) {
      f32 g = floats(gate + n * stride + i);
      keep(y + n * F + i, g / (exponential(-g) + 1.f) * floats(up + n * stride + i));
    }
}

}  // namespace
