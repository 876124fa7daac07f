// y = x W^T for few rows and interleaved int4: a register has 16 bytes of each of four outputs, so that what is read of
// x serves four registers. A core reads memory the slower the more it reads beside it, even from the nearest cache.

#pragma once

#include "gemv.h"

namespace {

// Values as floats.
struct Int4Floats {
  using Plane = f32x16;
  using Number = float;
  static constexpr int planes = 8, plane_inputs = 4;
  static constexpr float excess = 0;
  static Plane broadcast(const Number* x) { return broadcast_four<f32x16>(x); }
  static Plane read(u32x16 words, int plane) { return read_int4(words, plane); }
};

#ifdef __AVX512BF16__
// Values as the last bits of bfloat16 from 128 to 143, which are too large by `excess`.
struct Int4Pairs {
  using Plane = bf16x32;
  using Number = bf16;
  static constexpr int planes = 4, plane_inputs = 8;
  static constexpr float excess = 136;
  static Plane broadcast(const Number* x) { return {broadcast_four<__m512i>(x)}; }
  static Plane read(u32x16 words, int plane) {
    const __m512i mantissa = _mm512_set1_epi16(15), one = _mm512_set1_epi16(0x4300);
    return {_mm512_ternarylogic_epi64(_mm512_srli_epi16((__m512i)words, 4 * plane), mantissa, one, 0xea)};  // a & b | c
  }
};
#endif

template <class X>
struct Int4For {
  using Values = Int4Floats;
};
#ifdef __AVX512BF16__
template <>
struct Int4For<bf16> {
  using Values = Int4Pairs;
};
#endif

// x in the order of the planes. For each four rows (or those that are left): of the first 32 inputs each plane of every
// row, then of the next 32.
template <class V, class X>
const typename V::Number* arrange_int4_inputs(Team& team, const X* x, long N, long I) {
  auto *first = team.memory<typename V::Number>(N * I), *to = first;
  for_each_four(N, [&](auto rows, long n) {
    for (long i = 0; i < I; i += Int4::step_inputs)
      for (int plane = 0; plane < V::planes; plane++)
        for (int row = 0; row < rows; row++, to += V::plane_inputs)
          for (int k = 0; k < V::plane_inputs; k++) {
            const X* from = x + (n + row) * I + i + k * V::planes + plane;
            if constexpr (std::is_same_v<X, typename V::Number>) to[k] = *from;
            else to[k] = upcast(*from);
          }
  });
  return first;
}

// What the sums of each group of inputs begin with, to cancel the excess: four lanes, which add up to -excess * sum(x
// of the group). For each four rows (or those that are left): of the first group for every row, then of the next.
template <class V, class X>
const f32x4* initial_sums(Team& team, const X* x, long N, long I, long group) {
  auto* to = team.memory<f32x4>(N * I / group);
  if (V::excess == 0) return std::fill_n(to, N * I / group, f32x4{}) - N * I / group;
  for_each_four(N, [&](auto rows, long n) {
    for (long i = 0; i < I; i += group)
      for (int row = 0; row < rows; row++, to++) {
        const X* from = x + (n + row) * I + i;
        f32x16 low{}, high{};
        for (long k = 0; k < group; k += Int4::step_inputs)
          low += load_floats(from + k), high += load_floats(from + k + 16);
        *to = f32x4{};
        for (int k = 0; k < 16; k++) (*to)[k / 8] -= V::excess * low[k], (*to)[2 + k / 8] -= V::excess * high[k];
      }
  });
  return to - N * I / group;
}

// Lane 4 j + i is the sum of lanes 4 i to 4 i + 3 of v[j], one of four vectors: that is output 4 j + i.
inline f32x16 sum_fours(const f32x16* v) {
  const f32x16 all = fold<2>(fold<1>(v[0], v[1]), fold<1>(v[2], v[3]));
  return transpose_fours(all);
}

// Outputs o to o + 15 of N rows.
template <class V, int N, class Y>
void gemv_int4_outputs(const Int4& f, long o, const typename V::Number* x, const f32x4* begin, long O, Y* y) {
  const uint8_t* w = f.at(o);
  f32x16 totals[N][4] = {};
  for (long g = 0; g < f.I / f.group; g++, begin += N) {
    f32x16 sums[N][4];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[n][j] = broadcast_four<f32x16>(begin + n);
    for (long i = 0; i < f.group; i += Int4::step_inputs, w += Int4::step_bytes, x += N * Int4::step_inputs) {
      u32x16 words[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        words[j] = load<u32x16>(w + 64 * j);
        __builtin_prefetch(w + 64 * j + prefetch_bytes, 0, 2);
#ifdef __AVX512F__
        asm("" : "+v"(words[j]));  // GCC would load them again for each plane
#endif
      }
#pragma GCC unroll 8
      for (int plane = 0; plane < V::planes; plane++) {
        typename V::Plane inputs[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) inputs[n] = V::broadcast(x + (plane * N + n) * V::plane_inputs);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const auto values = V::read(words[j], plane);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sums[n][j] = multiply_add(sums[n][j], values, inputs[n]);
        }
      }
    }
    float scales[16];
    store(scales, f.scales_at(o, g));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const f32x16 own = repeat_each_four(load<f32x4>(scales + 4 * j));
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) totals[n][j] += sums[n][j] * own;
    }
  }
  for (int n = 0; n < N; n++) store_floats(y + n * O + o, sum_fours(totals[n]));
}

// y = x W^T for matrices with equally many inputs and groups.
template <class X>
void gemv_int4(Phase& phase, const Product<Int4, X>* products, long count, const X* x, long N) {
  using V = typename Int4For<X>::Values;
  const long I = products->f.I, group = products->f.group;
  const auto* inputs = arrange_int4_inputs<V>(phase.team, x, N, I);
  const auto* begin_sums = initial_sums<V>(phase.team, x, N, I, group);
  add_products(phase, products, count, [=](const Product<Int4, X>& own, long begin, long end) {
    for_each_four(N, [&](auto rows, long n) {
      for (long o = begin; o < end; o += Int4::interleave)
        gemv_int4_outputs<V, rows>(own.f, o, inputs + n * I, begin_sums + n * (I / group), own.O, own.y + n * own.O);
    });
  });
}

}  // namespace
