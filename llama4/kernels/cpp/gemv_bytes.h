// y = x W^T for few rows of x, rounded to int8, and W in int8 or int4: sums are of integers within a group of inputs,
// and of floats over the groups. Of int4 a group of x is one of W.

#pragma once

#include "gemv.h"
#include "gemv_int4.h"
#include "int8_inputs.h"

namespace {

// Inputs that share a scale in x.
template <class F>
INLINE long input_group(const F& f) {
  if constexpr (is_block_format<F>) return F::group;
  else if constexpr (F::interleaved) return f.group;
  else return f.I % 128 ? 64 : 128;
}

// 32 inputs as bytes, in the order in which a format has them: a byte of int4 is two neighbours, so there those in even
// places come first. -> their sums
template <class F, class X>
INLINE i32x16 round_32(const X* x, float factor, int8_t* to) {
  const i32x16 first = round_sixteen(x, factor), second = round_sixteen(x + 16, factor);
  store_low(to, first), store_low(to + 16, second);
  if constexpr (F::interleaved) {
    const auto a = load<u8x16>(to), b = load<u8x16>(to + 16);
    store(to, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    store(to + 16, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  }
  return first + second;
}

// A group of inputs as bytes. -> their sum
template <class F, class X>
INLINE int32_t round_bytes(const X* x, long count, float factor, int8_t* to) {
  i32x16 sums{};
  long i = 0;
  for (; i + 32 <= count; i += 32) sums += round_32<F>(x + i, factor, to + i);
  if (i < count) {  // a group of sixteen
    const i32x16 integers = round_sixteen(x + i, factor);
    store_low(to + i, integers), sums += integers;
  }
  return horizontal_sum(sums);
}

// For each four rows (or those that are left): of the first `run` bytes of a row those of every row, then of the next
// ones; and of the first group the scale of every row, and what each lane of a sum begins with, then of the next group.
struct ByteInputs {
  const int8_t* bytes;
  const float* scales;
  const int32_t* begin;

  ByteInputs from_row(long n, long I, long groups) const {
    return {bytes + n * I, scales + n * groups, begin + n * groups};
  }
};

// `lanes` of a sum belong to the same output.
template <class F, int run, int lanes, class X>
ByteInputs arrange_bytes(Team& team, const X* x, long N, long I, long group) {
  const long groups = I / group;
  auto* bytes = team.memory<int8_t>(N * I);
  auto* scales = team.memory<float>(N * groups);
  auto* begin = team.memory<int32_t>(N * groups);
  team.for_each(N, 4 * I, [=](long n) {
    const long first = n / 4 * 4, rows = std::min(N - first, 4l), row = n - first;
    for (long g = 0; g < groups; g++) {
      const X* from = x + n * I + g * group;
      const Rounding rounding = rounding_of<int8_t>(from, group);
      i32x16 sums{};
      for (long i = 0; i < group; i += 32) {
        int8_t own[32];
        sums += round_32<F>(from + i, rounding.factor, own);
        for (int k = 0; k < 32; k += 16) {
          const long at = g * group + i + k;
          __builtin_memcpy(bytes + first * I + (at / run * rows + row) * run + at % run, own + k, 16);
        }
      }
      scales[first * groups + g * rows + row] = rounding.scale;
      begin[first * groups + g * rows + row] = least_value<F> / lanes * horizontal_sum(sums);
    }
  });
  return {bytes, scales, begin};
}

// Outputs [begin, end) of N rows, W in int8.
template <int N, bool prefetches, class Y>
void gemv_byte_outputs(const Int8Inputs<Int8>& f, Scales scales, const ByteInputs& x, long begin, long end, long O,
                       Y* y) {
  const long group = input_group(f);
  for (long first = begin; first < end; first += 16) {
    const long count = std::min(end - first, 16l);
    f32x16 results[N][16] = {};
    for (long i = 0; i < count; i++) {
      const uint8_t* w = f.at(first + i, 0);
      const int8_t* bytes = x.bytes;
      f32x16 totals[N] = {};
      for (long g = 0; g < f.I / group; g++) {
        i32x16 sums[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[n] = i32x16{} + x.begin[g * N + n];
        for (long k = 0; k < group; k += 64, w += 64, bytes += N * 64) {
          const u32x16 weights = load<u32x16>(w) ^ 0x80808080u;
          if (prefetches) __builtin_prefetch(w + prefetch_bytes, 0, 2);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sums[n] = multiply_add_bytes<255>(sums[n], weights, load<u32x16>(bytes + n * 64));
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) totals[n] += to_floats(sums[n]) * x.scales[g * N + n];
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) results[n][i] = totals[n];
    }
    for (int n = 0; n < N; n++) store_outputs(horizontal_sums(results[n]), scales, first, count, y + n * O);
  }
}

// The same, W in int4: `begin` and `end` are multiples of 16.
template <int N, bool prefetches, class Y>
void gemv_byte_outputs(const Int8Inputs<Int4>& f, Scales, const ByteInputs& x, long begin, long end, long O, Y* y) {
  const long group = input_group(f);
  for (long o = begin; o < end; o += Int4::interleave) {
    const uint8_t* w = f.at(o);
    const int8_t* bytes = x.bytes;
    f32x16 totals[N][4] = {};
    for (long g = 0; g < f.I / group; g++) {
      i32x16 sums[N][4];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[n][j] = i32x16{} + x.begin[g * N + n];
      for (long i = 0; i < group; i += Int4::step_inputs, w += Int4::step_bytes, bytes += N * Int4::step_inputs) {
        u32x16 low[N], high[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
          low[n] = broadcast_four<u32x16>(bytes + 16 * n), high[n] = broadcast_four<u32x16>(bytes + 16 * (N + n));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          u32x16 codes[2];
          read_nibbles(load<u32x16>(w + 64 * j), codes);
          if (prefetches) __builtin_prefetch(w + 64 * j + prefetch_bytes, 0, 2);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++)
            sums[n][j] =
                multiply_add_bytes<15>(multiply_add_bytes<15>(sums[n][j], codes[0], low[n]), codes[1], high[n]);
        }
      }
      float scales[16];
      store(scales, f.scales_at(o, g));
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const f32x16 own = repeat_each_four(load<f32x4>(scales + 4 * j));
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) totals[n][j] += to_floats(sums[n][j]) * (own * x.scales[g * N + n]);
      }
    }
    for (int n = 0; n < N; n++) store_floats(y + n * O + o, sum_fours(totals[n]));
  }
}

// y = x W^T for matrices with equally many inputs and groups.
template <class F, class X>
void gemv_bytes(Phase& phase, const Product<F, X>* products, long count, const X* x, long N) {
  constexpr int run = F::interleaved ? 16 : 64, lanes_of_output = F::interleaved ? 4 : 16;
  const long I = products->f.I, group = input_group(products->f);
  const auto inputs = arrange_bytes<F, run, lanes_of_output>(phase.team, x, N, I, group);
  add_products(phase, products, count, [=](const Product<F, X>& own, long begin, long end) {
    for_each_four(N, [&](auto rows, long n) {
      choose_prefetch<(rows > 1)>([&](auto prefetches) {
        gemv_byte_outputs<rows, prefetches>(own.f, own.scales, inputs.from_row(n, I, I / group), begin, end, own.O,
                                            own.y + n * own.O);
      });
    });
  });
}

}  // namespace
