// What stands between the products, and after the last, for one row or head.

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

// Of some logits: the largest, the place of the first such, and the sum of e^(x - largest). It is not a number if any logit
// is not, or the largest is infinite.
struct Largest {
  float value = -INFINITY;
  long place = 0;
  double total = 0;

  float logprob() const { return (value - value) - std::log(total); }

  void add(const Largest& later) {
    const double factor = value == later.value ? 1 : std::exp(-std::abs(value - later.value));
    if (later.value > value)
      *this = {later.value, later.place, total * factor + later.total};
    else
      total += later.total * factor;
  }
};

template <class X>
Largest largest(const X* logits, long begin, long end) {
  constexpr long piece = 1024;  // float32 adds up so many well
  const auto at = [&](long i) {
    if (i + 16 <= end) return floats(logits + i);
    f32 last = f32{} - INFINITY;
    for (long k = i; k < end; k++) last[k - i] = widened(logits[k]);
    return last;
  };
  f32 most = f32{} - INFINITY;
  i32 where{}, strange{}, places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (long i = begin; i < end; i += 16) {
    f32 v = at(i);
    where = v > most ? places + int(i) : where, most = larger(v, most), strange |= v != v;
  }
  Largest found{largest(most), end - 1};
  bool is_strange = false;
  for (int lane = 0; lane < 16; lane++) {
    if (most[lane] == found.value) found.place = std::min<long>(found.place, where[lane]);
    is_strange |= strange[lane] != 0;
  }
  for (long i = begin; i < end && found.value > -INFINITY;) {
    f32 part{};
    for (const long stop = std::min(end, i + piece); i < stop; i += 16) part += exponential(at(i) - found.value);
    found.total += sum(part);
  }
  if (is_strange) found.total = NAN;
  return found;
}

// The likeliest token of M rows of V logits, of equals the first, and its log_softmax, by a team. Each row falls into
// pieces, whose largest are kept in [M, pieces_of_logits].
constexpr long pieces_of_logits = 16;

template <class X>
void likeliest(const X* logits, long M, long V, Largest* parts, long* ids, float* logprobs) {
#pragma omp for schedule(static)
  for (long i = 0; i < M * pieces_of_logits; i++) {
    const long row = i / pieces_of_logits, piece = i % pieces_of_logits;
    parts[i] = largest(logits + row * V, piece * V / pieces_of_logits, (piece + 1) * V / pieces_of_logits);
  }
#pragma omp for schedule(static) nowait
  for (long m = 0; m < M; m++) {
    Largest all;
    for (long piece = 0; piece < pieces_of_logits; piece++) all.add(parts[m * pieces_of_logits + piece]);
    ids[m] = all.place, logprobs[m] = all.logprob();
  }
}

}  // namespace
