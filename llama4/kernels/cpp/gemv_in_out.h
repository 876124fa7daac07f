// y = x W for few rows x [N, I] and W [I, O], the layout of experts: a row of W, times one input, is added to all
// outputs.

#pragma once

#include "simd.h"

namespace {

// How `outputs` numbers of one row of W, or of `together` rows whose products go to the same sums, become planes.
struct Float32Rows {
  using Number = float;
  using Plane = f32x16;
  using Factor = float;
  static constexpr int planes = 1, outputs = 16, together = 1;
  static void read(const float* a, const float*, Plane* out) { out[0] = load<f32x16>(a); }
  static Factor factor(float a, float) { return a; }
  static Plane broadcast(Factor x) { return x - f32x16{}; }
  static void store_sums(float* y, const f32x16* sums) { store(y, sums[0]); }
};

#ifdef __AVX512BF16__
struct Bfloat16Rows {
  using Number = bf16;
  using Plane = bf16x32;
  using Factor = uint32_t;
  static constexpr int planes = 2, outputs = 32, together = 2;
  static void read(const bf16* a, const bf16* b, Plane* out) {
    __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    out[0].bits = _mm512_unpacklo_epi16(first, second), out[1].bits = _mm512_unpackhi_epi16(first, second);
  }
  static Factor factor(bf16 a, bf16 b) { return a | uint32_t(b) << 16; }
  static Plane broadcast(Factor x) { return {_mm512_set1_epi32(x)}; }
  static void store_sums(bf16* y, const f32x16* sums) {  // four outputs are in the one, the next four in the other
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[1], (__m512)sums[0]);
    _mm512_storeu_si512(y, _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), both));
  }
};
#else
struct Bfloat16Rows {
  using Number = bf16;
  using Plane = f32x16;
  using Factor = float;
  static constexpr int planes = 2, outputs = 32, together = 1;
  static void read(const bf16* a, const bf16*, Plane* out) { out[0] = load_floats(a), out[1] = load_floats(a + 16); }
  static Factor factor(bf16 a, bf16) { return upcast(a); }
  static Plane broadcast(Factor x) { return x - f32x16{}; }
  static void store_sums(bf16* y, const f32x16* sums) { store_floats(y, sums[0]), store_floats(y + 16, sums[1]); }
};
#endif

// Each addition rounds all that was added before: a sum of many products in float32 loses digits, which a sum of short
// ones keeps. bfloat16 is rounded more coarsely anyway.
template <class X>
constexpr bool adds_sums = std::is_same_v<X, float>;
constexpr long inputs_per_sum = 64;

template <class X>
using RowsOf = std::conditional_t<std::is_same_v<X, float>, Float32Rows, Bfloat16Rows>;

// Adds K rows of W, `stride` apart, times N rows of factors to outputs [o, until) of a sum `own` [N, O], which is in
// the order of the planes. Where that ends, it is added to sums [N, O] and begins again.
template <class F, int K, int N, bool ends>
void add_weight_rows(const typename F::Number* w, long stride, long O, long o, long until, const typename F::Factor* x,
                     float* own, float* sums) {
  constexpr int steps = (K + F::together - 1) / F::together, ahead = 2048 / sizeof(*w);
  for (; o < until; o += F::outputs) {
    f32x16 registers[N][F::planes];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++) registers[n][plane] = load<f32x16>(own + n * O + o + 16 * plane);
#pragma GCC unroll 8
    for (int step = 0; step < steps; step++) {
      const auto *row = w + step * F::together * stride + o, *other = K == 1 ? row : row + stride;
      __builtin_prefetch(row + ahead, 0, 2);
      if (F::together == 2) __builtin_prefetch(other + ahead, 0, 2);
      typename F::Plane planes[F::planes];
      F::read(row, other, planes);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int plane = 0; plane < F::planes; plane++)
          registers[n][plane] = multiply_add(registers[n][plane], planes[plane], F::broadcast(x[n * steps + step]));
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++) {
        const long at = n * O + o + 16 * plane;
        store(own + at, ends ? f32x16{} : registers[n][plane]);
        if constexpr (ends) store(sums + at, load<f32x16>(sums + at) + registers[n][plane]);
      }
  }
}

// Parts in which the inputs of a matrix are added up, whatever the number of threads and rows: results are the same.
inline long parts_of(long I) { return std::clamp(I / 512, 1l, 8l); }

// Calls add(count, first, run) for inputs [i, end) in the order in which they are added: `count` of them, `run` apart,
// from `first` on. These are eight runs of rows side by side, of which a processor prefetches each; then single rows.
template <class Add>
void for_each_eight(long i, long end, const Add& add) {
  constexpr long runs = 8, longest = 16;
  while (i < end) {
    const long run = std::min(longest, (end - i) / runs);
    for (long k = 0; k < run; k++) add(std::integral_constant<int, runs>(), i + k, run);
    for (long k = i; !run && k < end; k++) add(std::integral_constant<int, 1>(), k, 0);
    i = run ? i + runs * run : end;
  }
}

// Partial results of y = x W in `sums` [N, O]: inputs [i, end) for outputs [o, until).
template <class X>
void add_inputs(const X* w, const X* x, long N, long I, long O, long i, long end, long o, long until, float* sums) {
  using F = RowsOf<X>;
  const auto clear = [&](float* to) {
    for (long n = 0; n < N; n++) std::fill(to + n * O + o, to + n * O + until, 0.f);
  };
  clear(sums);
  float* own = sums;
  if constexpr (adds_sums<X>) clear(own = scratch<float, Use::sums>(N * O));
  long added = 0;
  for_each_eight(i, end, [&](auto count, long first, long run) {
    constexpr int K = count, steps = (K + F::together - 1) / F::together;
    added += K;
    const bool ends_sum = added % inputs_per_sum == 0 || added == end - i;
    for_each_four(N, [&](auto rows, long n) {
      typename F::Factor factors[rows * steps];
      for (int k = 0; k < rows; k++)
        for (int step = 0; step < steps; step++) {
          const X* from = x + (n + k) * I + first + step * F::together * run;
          factors[k * steps + step] = F::factor(from[0], K == 1 ? X(0) : from[run]);
        }
      const auto add = [&](auto ends) {
        add_weight_rows<F, K, rows, ends>(w + first * O, run * O, O, o, until, factors, own + n * O, sums + n * O);
      };
      if constexpr (adds_sums<X>)
        if (ends_sum) return add(std::true_type());
      add(std::false_type());
    });
  });
}

// y = x W. A task is a part of the inputs and, if there are more threads than parts, a slice of the outputs.
template <class X>
void gemv_in_out(Phase& phase, const X* w, const X* x, long N, long I, long O, X* y) {
  using F = RowsOf<X>;
  constexpr long least = 16 * F::outputs;
  const long parts = parts_of(I), slices = std::clamp(phase.team.size() / parts, 1l, std::max(O / least, 1l));
  const long width = (O / slices + F::outputs - 1) / F::outputs * F::outputs;
  float* partial = phase.team.memory<float>(parts * N * O);
  phase.add(parts * slices, I / parts * width, [=](long task) {
    const long part = task / slices, o = task % slices * width;
    if (o < O)
      add_inputs(w, x, N, I, O, part * I / parts, (part + 1) * I / parts, o, std::min(o + width, O),
                 partial + part * N * O);
  });
  constexpr long piece = 32 * F::outputs;
  phase.add_after((N * O + piece - 1) / piece, parts * piece, [=](long task) {
    for (long o = task * piece; o < std::min(N * O, (task + 1) * piece); o += F::outputs) {
      f32x16 totals[F::planes] = {};
      for (long part = 0; part < parts; part++)
        for (int plane = 0; plane < F::planes; plane++)
          totals[plane] += load<f32x16>(partial + part * N * O + o + 16 * plane);
      F::store_sums(y + o, totals);
    }
  });
}

}  // namespace
