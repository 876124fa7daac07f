// y = x W^T for few rows of x in bfloat16 and W in int8, on a CPU without products of bfloat16: it takes longer to make
// floats of bytes than to multiply them. So inputs become integers of 16 bits, with a scale for each group, and sums
// are of integers within a group, and of floats over the groups: in the same order, however many rows of x there are.

#pragma once

#include "gemv.h"
#include "int8_inputs.h"

namespace {

#ifdef __AVX2__

constexpr int half_rows = vectors_in_registers > 16 ? 8 : 4;  // rows of x that meet a row of W at once
constexpr long half_inputs = 32;                              // in a vector

// Inputs that share a scale in x: the more, the fewer sums are scaled. A sum has room for 8,192.
inline long half_group(long I) { return I % 256 == 0 ? 256 : I % 128 == 0 ? 128 : 64; }

// For each half_rows rows of x (or those that are left): of the first 32 inputs those of every row, then of the next
// ones; and of the first group the scale of every row, then of the next.
struct HalfInputs {
  const int16_t* halves;
  const float* scales;

  HalfInputs from_row(long n, long I, long groups) const { return {halves + n * I, scales + n * groups}; }
};

inline HalfInputs arrange_halves(Team& team, const bf16* x, long N, long I, long group) {
  const long groups = I / group;
  auto* halves = team.memory<int16_t>(N * I);
  auto* scales = team.memory<float>(N * groups);
  team.for_each(N, 4 * I, [=](long n) {
    const long first = n / half_rows * half_rows, rows = std::min(N - first, long(half_rows)), row = n - first;
    for (long g = 0; g < groups; g++) {
      const bf16* from = x + n * I + g * group;
      int16_t* to = halves + first * I + g * group * rows + row * half_inputs;
      const Rounding rounding = rounding_of<int16_t>(from, group);
      for (long i = 0; i < group; i += half_inputs, to += rows * half_inputs)
        for (long k = 0; k < half_inputs; k += 16) store_low(to + k, round_sixteen(from + i + k, rounding.factor));
      scales[first * groups + g * rows + row] = rounding.scale;
    }
  });
  return {halves, scales};
}

// Rows of W that share what is read of N rows of x, where a core computes for longer than it reads.
template <int N>
constexpr int half_rows_together = N > 4 ? 2 : 1;

// R rows of W from w on times N rows of x: results from number i on, of which the lanes add up to the dot product.
template <int R, int N, bool prefetches>
INLINE void add_half_rows(const uint8_t* w, const HalfInputs& x, long I, long group, long i, f32x16 (*results)[16]) {
  const auto* halves = (const u32x16*)x.halves;
  f32x16 totals[R][N] = {};
  for (long g = 0; g < I / group; g++) {
    i32x16 sums[R][N] = {};
    for (long k = 0; k < group; k += 64) {
#pragma GCC unroll 2
      for (int r = 0; r < R && prefetches; r++) __builtin_prefetch(w + r * I + prefetch_bytes, 0, 2);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++, w += half_inputs, halves += N) {
        u32x16 weights[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) weights[r] = widen_to_halves(w + r * I);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          auto inputs = load<u32x16>(halves + n);
          if (R > 1) keep_in_register(inputs);
#pragma GCC unroll 2
          for (int r = 0; r < R; r++) sums[r][n] = multiply_add_halves(sums[r][n], weights[r], inputs);
        }
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) totals[r][n] += to_floats(sums[r][n]) * x.scales[g * N + n];
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) results[n][i + r] = totals[r][n];
}

// Outputs [begin, end) of N rows.
template <int N, bool prefetches>
void gemv_half_outputs(const Int8Halves& f, Scales scales, const HalfInputs& x, long group, long begin, long end,
                       long O, bf16* y) {
  for (long first = begin; first < end; first += 16) {
    const long count = std::min(end - first, 16l);
    f32x16 results[N][16] = {};
    const auto add = [&](auto together, long i) {
      add_half_rows<together, N, prefetches>(f.at(first + i, 0), x, f.I, group, i, results);
    };
    for_each_rows<half_rows_together<N>>(count, add);
    for (int n = 0; n < N; n++) store_outputs(horizontal_sums(results[n]), scales, first, count, y + n * O);
  }
}

// y = x W^T for matrices with equally many inputs.
inline void gemv_halves(Phase& phase, const Product<Int8Halves, bf16>* products, long count, const bf16* x, long N) {
  const long I = products->f.I, group = half_group(I);
  const auto inputs = arrange_halves(phase.team, x, N, I, group);
  add_products(phase, products, count, [=](const Product<Int8Halves, bf16>& own, long begin, long end) {
    for_each_rows<half_rows>(N, [&](auto rows, long n) {
      choose_prefetch<(rows > 1)>([&](auto prefetches) {
        gemv_half_outputs<rows, prefetches>(own.f, own.scales, inputs.from_row(n, I, I / group), group, begin, end,
                                            own.O, own.y + n * own.O);
      });
    });
  });
}

#endif

}  // namespace
