// y = x W^T for blocks of GGUF: few rows in registers, and packing for many.
//
// What is multiplied is a plane: codes of a half of a step as 16 floats or 32 bfloat16. A sum begins anew with each
// step, or half of one that has scales of its own, and is scaled when it is added to the others: the order does not
// depend on how many rows of x there are.

#pragma once

#include "gemm.h"
#include "gemv.h"
#include "gguf_blocks.h"

namespace {

// Values as floats: of each word of a half one byte.
template <class F>
struct BlockFloats {
  using Plane = f32x16;
  using Number = float;
  static constexpr int planes = 4, run = 1;  // of a half; inputs that are neighbours in a plane, too
  static constexpr float excess = 0;
  static int place(int half, int plane, int i) { return F::place(half, i / 4) + i % 4 * 4 + plane; }
  static INLINE void read(u32x16 codes, Plane* out) {
#ifdef __AVX512F__
    if constexpr (F::codes <= 32) {
      const float* table = code_tables<F>.floats;
#pragma GCC unroll 4
      for (int plane = 0; plane < planes; plane++) {
        const __m512i places = (__m512i)(codes >> 8 * plane);  // other bits than the lowest do not count
        if constexpr (F::codes == 16) out[plane] = (f32x16)_mm512_permutexvar_ps(places, _mm512_load_ps(table));
        else
          out[plane] =
              (f32x16)_mm512_permutex2var_ps(_mm512_load_ps(table), places, _mm512_load_ps(table + F::codes - 16));
      }
      return;
    }
#endif
    const u32x16 bytes = integers_of<F>(codes);
#pragma GCC unroll 4
    for (int plane = 0; plane < planes; plane++) out[plane] = to_floats((i32x16)(bytes << (24 - 8 * plane)) >> 24);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// Values as bfloat16. Codes that are integers but for an offset are the last bits of numbers from 128 on, which are too
// large by `excess`.
template <class F>
struct BlockPairs {
  using Plane = bf16x32;
  using Number = bf16;
  static constexpr int planes = 2, run = 8;
  static constexpr float excess = is_linear<F>() ? 128 - F::value(0) : 0;
  static int place(int half, int plane, int i) { return F::place(half, i / 8) + 8 * plane + i % 8; }
  static INLINE void read(u32x16 codes, Plane* out) {
    const __m512i bytes = (__m512i)codes;
    if constexpr (is_linear<F>()) {
      BytePairs::join(_mm512_set1_epi8(0x43), bytes, out);
    } else if constexpr (F::codes == 16) {
      const CodeTables<F>& tables = code_tables<F>;
      BytePairs::join((__m512i)look_up16(codes, tables.high), (__m512i)look_up16(codes, tables.low), out);
    } else {
      Int8Pairs::convert(bytes, out);
    }
  }
};
#endif

template <class F, class X>
struct BlockValuesFor {
  using Values = BlockFloats<F>;
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <class F>
struct BlockValuesFor<F, bf16> {
  using Values = BlockPairs<F>;
};
#endif

INLINE f32x16 lane_sums(const f32x16* plane) { return load<f32x16>(plane); }
#ifdef __AVX512BF16__
INLINE f32x16 lane_sums(const bf16x32* plane) {  // of the two numbers of each
  const u32x16 pairs = load<u32x16>(plane);
  return (f32x16)(pairs << 16) + (f32x16)(pairs & 0xffff0000u);
}
#endif

// Rows of x: for each four rows (or those that are left) of each step each plane of every row; with zeros behind the
// last input.
template <class V>
struct BlockInputs {
  const typename V::Plane* planes;
  const f32x16* begin;  // of each part of each step of every row: what sums begin with, to cancel the excess
  const f32x4* sums;    // of each step of every row: those of its four times 32 inputs
};

template <class F, class V, class X>
BlockInputs<V> arrange_block_inputs(Team& team, const X* x, long N, long I) {
  using Number = typename V::Number;
  constexpr int parts = F::parts, planes = 2 * V::planes, lanes_of_plane = 64 / sizeof(Number);
  const long steps = (I + step_weights - 1) / step_weights, tail = steps * step_weights - I;
  auto* numbers = team.memory<Number>(N * steps * step_weights);
  auto* begin = team.memory<f32x16>(V::excess ? N * steps * parts : 0);
  auto* sums = team.memory<f32x4>(F::has_minimum ? N * steps : 0);
  team.for_each((N + 3) / 4, 4 * I, [=](long fours) {
    const long n = 4 * fours, rows = std::min(N - n, 4l);
    for (long step = 0; step < steps; step++) {
      const bool whole = !tail || step + 1 < steps;
      auto* to = numbers + (n * steps + rows * step) * step_weights;
      for (int plane = 0; plane < planes; plane++)
        for (long row = 0; row < rows; row++)
          for (int i = 0; i < lanes_of_plane; i += V::run, to += V::run) {
            const int place = V::place(plane / V::planes, plane % V::planes, i);
            const X* from = x + (n + row) * I + step * step_weights + place;
            if (!whole && place >= step_weights - tail) std::fill(to, to + V::run, Number());
            else if constexpr (std::is_same_v<X, Number>) __builtin_memcpy(to, from, V::run * sizeof(X));
            else
              for (int k = 0; k < V::run; k++) assign(to[k], upcast(from[k]));
          }
      const auto* own = (const typename V::Plane*)(numbers + (n * steps + rows * step) * step_weights);
      for (int part = 0; part < parts && (V::excess || F::has_minimum); part++)
        for (long row = 0; row < rows; row++) {
          f32x16 total{};
          for (int plane = part * V::planes; plane < (parts == 1 ? planes : (part + 1) * V::planes); plane++)
            total += lane_sums(own + plane * rows + row);
          const long at = n * steps + rows * step;
          if (V::excess) store(begin + at * parts + part * rows + row, total * -V::excess);
          for (int quarter = 0; F::has_minimum && quarter < 4; quarter++) {
            float* sum = (float*)(sums + at + row) + F::place(part, quarter) / 32;
            if (F::place(part, quarter) % 32 == 0) *sum = 0;
            for (int i = 0; i < 4; i++) *sum += total[4 * quarter + i];
          }
        }
    }
  });
  return {(const typename V::Plane*)numbers, begin, sums};
}

// The scale of each lane of a part: four lanes have a quarter.
template <class F, class Step>
INLINE f32x16 scales_of(const Step& s, int part) {
  if constexpr (F::group == 16) return repeat_each_four(s.scales[part]);
#ifdef __AVX512F__
  constexpr auto places = [](int half) {
    std::array<int32_t, 16> all{};
    for (int i = 0; i < 16; i++) all[i] = F::place(half, i / 4) / 32;
    return all;
  };
  alignas(64) static constexpr std::array<int32_t, 16> both[2] = {places(0), places(1)};
  return (f32x16)_mm512_permutexvar_ps(_mm512_load_si512(both[part].data()),
                                       _mm512_castps128_ps512((__m128)s.scales[0]));
#else
  f32x4 own;
  for (int quarter = 0; quarter < 4; quarter++) own[quarter] = s.scales[0][F::place(part, quarter) / 32];
  return repeat_each_four(own);
#endif
}

// Adds a step of a row of W times N rows of x to their totals, of which the lanes, and those of `minima`, add up to the
// dot product.
template <class F, class V, int N, bool whole>
INLINE void add_step(const F& f, const uint8_t* row, long step, const BlockInputs<V>& x, f32x16* totals,
                     f32x4* minima) {
  const auto read = f.template read<whole>(row, step);
  f32x16 sums[N];
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const int part = F::parts == 2 ? half : 0;
    const long at = (step * F::parts + part) * N;
    if (half == part)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[n] = V::excess ? load<f32x16>(x.begin + at + n) : f32x16{};
    typename V::Plane w[V::planes];
    V::read(read.halves[half], w);
#pragma GCC unroll 4
    for (int plane = 0; plane < V::planes; plane++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
        sums[n] = multiply_add(sums[n], w[plane], x.planes + ((2 * step + half) * V::planes + plane) * N + n);
    if (half == 1 || F::parts == 2) {
      const f32x16 scales = scales_of<F>(read, part);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) totals[n] += sums[n] * scales;
    }
  }
  if constexpr (F::has_minimum)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) minima[n] += read.minima * load<f32x4>(x.sums + step * N + n);
}

// Outputs [begin, end), 16 at a time.
template <class F, class V, int N, class Y>
void gemv_block_outputs(const F& f, const BlockInputs<V>& x, long begin, long end, long O, Y* y) {
  const long whole = f.I / step_weights, row_bytes = f.row(1) - f.row(0);
  constexpr long lines =
      (step_weights / F::multiple * F::nbytes + F::nbytes * (step_weights % F::multiple) / F::multiple + 63) / 64;
  for (long first = begin; first < end; first += 16) {
    const long count = std::min(end - first, 16l);
    f32x16 results[N][16] = {};
    for (long i = 0; i < count; i++) {
      const uint8_t* row = f.row(first + i);
      f32x16 totals[N] = {};
      f32x4 minima[N] = {};
      for (long step = 0; step < whole; step++) {
        const uint8_t* ahead = row + step * row_bytes / std::max(whole, 1l) + prefetch_bytes;
        for (long line = 0; line < lines; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
        add_step<F, V, N, true>(f, row, step, x, totals, minima);
      }
      if (f.I % step_weights) add_step<F, V, N, false>(f, row, whole, x, totals, minima);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        results[n][i] = totals[n];
        if constexpr (F::has_minimum) results[n][i] += (f32x16)concat((u32x4)minima[n], u32x4{}, u32x4{}, u32x4{});
      }
    }
    for (int n = 0; n < N; n++) {
      const f32x16 all = horizontal_sums(results[n]);
      Y* to = y + n * O + first;
      if (count == 16) store_floats(to, all);
      for (long i = 0; count < 16 && i < count; i++) assign(to[i], all[i]);
    }
  }
}

// y = x W^T for matrices with equally many inputs.
template <class F, class X>
void gemv_blocks(Phase& phase, const Product<F, X>* products, long count, const X* x, long N) {
  using V = typename BlockValuesFor<F, X>::Values;
  const long I = products->f.I, steps = (I + step_weights - 1) / step_weights;
  const auto inputs = arrange_block_inputs<F, V>(phase.team, x, N, I);
  add_products(phase, products, count, [=](const Product<F, X>& own, long begin, long end) {
    for_each_four(N, [&](auto rows, long n) {
      const BlockInputs<V> four{inputs.planes + n * steps * 2 * V::planes, inputs.begin + n * steps * F::parts,
                                inputs.sums + n * steps};
      gemv_block_outputs<F, V, rows>(own.f, four, begin, end, own.O, own.y + n * own.O);
    });
  });
}

// The weights of a step in order, sixteen at a time.
template <class F>
INLINE void read_weights(const F& f, long o, long step, f32x16* out) {
  const uint8_t* row = f.row(o);
  const auto read =
      f.I - step * step_weights >= step_weights ? f.template read<true>(row, step) : f.template read<false>(row, step);
  int8_t bytes[step_weights];
  for (int half = 0; half < 2; half++) store(bytes + 64 * half, integers_of<F>(read.halves[half]));
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      const int place = F::place(half, quarter), group = place / F::group;
      const u32x16 words = widen((const uint8_t*)bytes + 64 * half + 16 * quarter);
      f32x16 values = to_floats((i32x16)(words << 24) >> 24) * read.scales[group / 4][group % 4];
      if constexpr (F::has_minimum) values = values + read.minima[place / 32];
      out[place / 16] = values;
    }
}

// Row o of W, in float32.
template <class F>
void read_row(const F& f, long o, float* to) {
  f32x16 weights[step_weights / 16];
  for (long step = 0; step * step_weights < f.I; step++) {
    read_weights(f, o, step, weights);
    for (long i = step * step_weights; i < std::min(f.I, (step + 1) * step_weights); i += 16)
      store(to + i, weights[i % step_weights / 16]);
  }
}

// Half a strip, outputs o to o + 15, for a product of many rows; inputs in order.
template <class X, class F>
void pack_blocks(const F& f, long o, Word* to) {
  constexpr int per_word = numbers_per_word<X>;
  f32x16 w[16][step_weights / 16];
  for (long step = 0; step * step_weights < f.I; step++) {
    const long left = std::min(f.I - step * step_weights, step_weights);
    for (int i = 0; i < 16; i++) read_weights(f, o + i, step, w[i]);
    for (int k = 0; k < left / 16; k += per_word, to += 16 * strip) {
      u32x16 words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) words[i] = words_of<per_word>(w[i] + k);
      pack_words(words, to);
    }
  }
}

}  // namespace
