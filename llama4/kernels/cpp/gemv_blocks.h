// y = x W^T for blocks of GGUF: few rows in registers, and packing for many.
//
// What is multiplied is a plane: codes of a vector of a step as 16 floats or 32 bfloat16. A sum begins anew with each
// step, or part of one that has scales of its own, and is scaled when it is added to the others: the order does not
// depend on how many rows of x there are. Rows of x may be rounded to bytes first: then a plane is 64 bytes, and a sum
// is of integers.

#pragma once

#include "gemm.h"
#include "gemv.h"
#include "gguf_blocks.h"
#include "int8_inputs.h"

namespace {

// Values as floats: of each word of a vector one byte.
template <class F>
struct BlockFloats {
  using Plane = f32x16;
  using Number = float;
  using Sum = f32x16;
  static constexpr bool rounds = false;
  static constexpr int planes = 4, run = 1;  // of a vector; inputs that are neighbours in a plane, too
  static constexpr float excess = 0;
  static int place(int vector, int plane, int i) { return F::place(vector, i / 4) + i % 4 * 4 + plane; }
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
  using Sum = f32x16;
  static constexpr bool rounds = false;
  static constexpr int planes = 2, run = 8;
  static constexpr float excess = is_linear<F>() ? 128 - F::value(0) : 0;
  static int place(int vector, int plane, int i) { return F::place(vector, i / 8) + 8 * plane + i % 8; }
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

// Values as bytes from zero on, for rows of x as bytes.
template <class F>
struct BlockBytes {
  using Plane = u32x16;
  using Number = int8_t;
  using Sum = i32x16;
  static constexpr bool rounds = true;
  static constexpr int planes = 1, run = 16, excess = -least_value<F>;
  static int place(int vector, int, int i) { return F::place(vector, i / 16) + i % 16; }
  static INLINE void read(u32x16 codes, Plane* out) { *out = integers_from_zero<F>(codes); }
};

#ifdef __AVX2__
// Values of eight bits as integers of 16, and rows of x, which are bfloat16, as such: it takes longer to make floats of
// bytes than to multiply them.
template <class F>
struct BlockHalves {
  using Plane = u32x16;
  using Number = int16_t;
  using Sum = i32x16;
  static constexpr bool rounds = true;
  static constexpr int planes = 2, run = 1, excess = 0;
  static int place(int vector, int plane, int i) { return F::place(vector, i / 8) + i % 8 * 2 + plane; }
  static INLINE void read(u32x16 codes, Plane* out) { split_bytes(codes, out); }
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
#ifdef __AVX2__
template <>
struct BlockValuesFor<Q8_0, bf16> {
  using Values = BlockHalves<Q8_0>;
};
#endif
template <class F, class X>
using BlockValues = std::conditional_t<has_int8_inputs<F>, BlockBytes<F>, typename BlockValuesFor<F, X>::Values>;

template <class F, class V>
INLINE auto multiply_add_plane(typename V::Sum sums, typename V::Plane w, const typename V::Plane* x) {
  if constexpr (std::is_same_v<typename V::Number, int8_t>)
    return multiply_add_bytes<value_range<F>>(sums, w, load<u32x16>(x));
  else if constexpr (V::rounds) return multiply_add_halves(sums, w, load<u32x16>(x));
  else return multiply_add(sums, w, x);
}

INLINE i32x16 lane_sums(const u32x16* plane) {  // of the four bytes of each
  return multiply_add_bytes<1>(i32x16{}, u32x16{} + 0x01010101u, load<u32x16>(plane));
}
INLINE f32x16 lane_sums(const f32x16* plane) { return load<f32x16>(plane); }
#ifdef __AVX512BF16__
INLINE f32x16 lane_sums(const bf16x32* plane) {  // of the two numbers of each
  const u32x16 pairs = load<u32x16>(plane);
  return (f32x16)(pairs << 16) + (f32x16)(pairs & 0xffff0000u);
}
#endif

// Rows of x: for each four rows (or those that are left) of each step each plane of every row; with zeros behind the
// last input.
template <class F, class V>
struct BlockInputs {
  using Scales = Floats<step_weights<F> / F::group>;
  using Sums = Floats<step_weights<F> / 32>;
  const typename V::Plane* planes;
  const typename V::Sum* begin;  // of each part of each step of every row: what sums begin with, to cancel the excess
  const Sums* sums;              // of each step of every row: those of 32 inputs
  const Scales* scales;          // of each step of every row: of the groups of inputs, if they are rounded

  BlockInputs from_row(long n, long steps) const {
    const long at = n * steps;
    return {planes + at * F::vectors * V::planes, begin + at * F::parts, sums + at, scales + at};
  }
};

template <class F, class V, class X>
BlockInputs<F, V> arrange_block_inputs(Team& team, const X* x, long N, long I) {
  using Number = typename V::Number;
  using Sum = typename V::Sum;
  using Inputs = BlockInputs<F, V>;
  constexpr long step_inputs = step_weights<F>, planes_of_part = F::vectors / F::parts * V::planes;
  constexpr int numbers_of_plane = 64 / sizeof(Number);
  const long steps = (I + step_inputs - 1) / step_inputs;
  auto* numbers = team.memory<Number>(N * steps * step_inputs);
  auto* begin = team.memory<Sum>(V::excess ? N * steps * F::parts : 0);
  auto* sums = team.memory<typename Inputs::Sums>(F::has_minimum ? N * steps : 0);
  auto* scales = team.memory<typename Inputs::Scales>(V::rounds ? N * steps : 0);
  team.for_each((N + 3) / 4, 4 * I, [=](long fours) {
    const long n = 4 * fours, rows = std::min(N - n, 4l);
    for (long step = 0; step < steps; step++) {
      const long at = n * steps + rows * step, count = std::min(I - step * step_inputs, step_inputs);
      Number in_order[4][step_inputs];
      float own_scales[4][step_inputs / F::group];
      for (long row = 0; row < rows; row++) {
        const X* from = x + (n + row) * I + step * step_inputs;
        if constexpr (V::rounds) {
          round_inputs<F::group>(from, count, in_order[row], own_scales[row]);
          __builtin_memcpy(scales + at + row, own_scales[row], sizeof own_scales[row]);
        } else {
          take_inputs(from, count, in_order[row]);
        }
      }
      auto* to = numbers + at * step_inputs;
      for (int plane = 0; plane < F::vectors * V::planes; plane++)
        for (long row = 0; row < rows; row++)
          for (int i = 0; i < numbers_of_plane; i += V::run, to += V::run)
            __builtin_memcpy(to, in_order[row] + V::place(plane / V::planes, plane % V::planes, i),
                             V::run * sizeof(Number));
      const auto* own = (const typename V::Plane*)(numbers + at * step_inputs);
      for (int part = 0; part < F::parts && (V::excess || F::has_minimum); part++)
        for (long row = 0; row < rows; row++) {
          Sum total{};
          for (long plane = part * planes_of_part; plane < (part + 1) * planes_of_part; plane++)
            total += lane_sums(own + plane * rows + row);
          if (V::excess) store(begin + at * F::parts + part * rows + row, total * -V::excess);
          for (int quarter = 0; F::has_minimum && quarter < 4; quarter++) {
            float* sum = (float*)(sums + at + row) + F::place(part, quarter) / 32;
            if (F::place(part, quarter) % 32 == 0) *sum = 0;
            for (int i = 0; i < 4; i++) *sum += total[4 * quarter + i];
          }
        }
      static_assert(!F::has_minimum || F::group == 32);
      for (long row = 0; row < rows && F::has_minimum && V::rounds; row++)
        for (int g = 0; g < step_inputs / 32; g++) ((float*)(sums + at + row))[g] *= own_scales[row][g];
    }
  });
  return {(const typename V::Plane*)numbers, begin, sums, scales};
}

// The scale of each lane of a part: four lanes have a quarter.
template <class F>
INLINE f32x16 scales_of(Floats<step_weights<F> / F::group> groups, int part) {
#ifdef __AVX512F__
  static constexpr auto places = [] {
    std::array<std::array<int32_t, 16>, F::parts> all{};
    for (int part = 0; part < F::parts; part++)
      for (int i = 0; i < 16; i++) all[part][i] = F::place(part, i / 4) / F::group;
    return all;
  }();
  __m512 wide;
  if constexpr (sizeof groups == 16) wide = _mm512_castps128_ps512((__m128)groups);
  else if constexpr (sizeof groups == 32) wide = _mm512_castps256_ps512((__m256)groups);
  else wide = (__m512)groups;
  return (f32x16)_mm512_permutexvar_ps(_mm512_loadu_si512(places[part].data()), wide);
#else
  f32x4 own;
  for (int quarter = 0; quarter < 4; quarter++) own[quarter] = groups[F::place(part, quarter) / F::group];
  return repeat_each_four(own);
#endif
}

// Totals of a row of x: two, where registers suffice, so that a sum need not wait for the last.
template <class F>
constexpr int totals_of = vectors_in_registers > 16 ? std::min(F::parts, 2) : 1;

// Adds a step of a row of W times N rows of x to their totals, of which the lanes, and those of `minima`, add up to the
// dot product.
template <class F, class V, int N, bool whole>
INLINE void add_step(const F& f, const uint8_t* row, long step, const BlockInputs<F, V>& x, f32x16 (*totals)[N],
                     Floats<step_weights<F> / 32>* minima) {
  constexpr int vectors_of_part = F::vectors / F::parts;
  const auto read = f.template read<whole>(row, step);
#pragma GCC unroll 4
  for (int part = 0; part < F::parts; part++) {
    typename V::Sum sums[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      sums[n] = V::excess ? load<typename V::Sum>(x.begin + (step * F::parts + part) * N + n) : typename V::Sum{};
#pragma GCC unroll 2
    for (int i = 0; i < vectors_of_part; i++) {
      const int vector = part * vectors_of_part + i;
      typename V::Plane w[V::planes];
      V::read(read.codes[vector], w);
#pragma GCC unroll 4
      for (int plane = 0; plane < V::planes; plane++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
          sums[n] = multiply_add_plane<F, V>(sums[n], w[plane],
                                             x.planes + ((step * F::vectors + vector) * V::planes + plane) * N + n);
    }
    f32x16* own = totals[part % totals_of<F>];
    if constexpr (V::rounds) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
        own[n] += to_floats(sums[n]) * scales_of<F>(read.scales * x.scales[step * N + n], part);
    } else {
      const f32x16 scales = scales_of<F>(read.scales, part);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) own[n] += sums[n] * scales;
    }
  }
  if constexpr (F::has_minimum)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) minima[n] += read.minima * x.sums[step * N + n];
}

// Adds `count` <= 16 rows of W times N rows of x to results, of which the lanes add up to the dot product.
template <class F, class V, int N>
__attribute__((noinline)) void add_block_rows(const F f, const BlockInputs<F, V> x, long first, long count,
                                              f32x16 (*results)[16]) {
  constexpr long step_bytes = F::nbytes * step_weights<F> / F::multiple, lines = (step_bytes + 63) / 64;
  const long whole = f.I / step_weights<F>;
  for (long i = 0; i < count; i++) {
    const uint8_t* row = f.row(first + i);
    f32x16 totals[totals_of<F>][N] = {};
    Floats<step_weights<F> / 32> minima[N] = {};
    for (long step = 0; step < whole; step++) {
      const uint8_t* ahead = row + step * step_bytes + prefetch_bytes;
      for (long line = 0; line < lines; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
      add_step<F, V, N, true>(f, row, step, x, totals, minima);
    }
    if constexpr (F::multiple < step_weights<F>)
      if (f.I % step_weights<F>) add_step<F, V, N, false>(f, row, whole, x, totals, minima);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      results[n][i] = totals[0][n];
      if constexpr (totals_of<F> == 2) results[n][i] += totals[1][n];
      if constexpr (F::has_minimum) results[n][i] += with_zeros(minima[n]);
    }
  }
}

// Outputs [begin, end), 16 at a time.
template <class F, class V, int N, class Y>
void gemv_block_outputs(const F& f, const BlockInputs<F, V>& x, long begin, long end, long O, Y* y) {
  for (long first = begin; first < end; first += 16) {
    const long count = std::min(end - first, 16l);
    f32x16 results[N][16] = {};
    add_block_rows<F, V, N>(f, x, first, count, results);
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
  using V = BlockValues<F, X>;
  const long I = products->f.I, steps = (I + step_weights<F> - 1) / step_weights<F>;
  const auto inputs = arrange_block_inputs<F, V>(phase.team, x, N, I);
  add_products(phase, products, count, [=](const Product<F, X>& own, long begin, long end) {
    for_each_four(N, [&](auto rows, long n) {
      gemv_block_outputs<F, V, rows>(own.f, inputs.from_row(n, steps), begin, end, own.O, own.y + n * own.O);
    });
  });
}

// The weights of a step in order, sixteen at a time.
template <class F>
INLINE void read_weights(const F& f, long o, long step, f32x16* out) {
  const auto read = read_step(f, o, step);
  int8_t bytes[step_weights<F>];
  for (int vector = 0; vector < F::vectors; vector++) store(bytes + 64 * vector, integers_of<F>(read.codes[vector]));
#pragma GCC unroll 4
  for (int vector = 0; vector < F::vectors; vector++)
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      const int place = F::place(vector, quarter);
      const u32x16 words = widen((const uint8_t*)bytes + 64 * vector + 16 * quarter);
      f32x16 values = to_floats((i32x16)(words << 24) >> 24) * read.scales[place / F::group];
      if constexpr (F::has_minimum) values = values + read.minima[place / 32];
      out[place / 16] = values;
    }
}

// Row o of W, in float32.
template <class F>
void read_row(const F& f, long o, float* to) {
  f32x16 weights[step_weights<F> / 16];
  for (long i = 0; i < f.I; i += 16) {
    if (i % step_weights<F> == 0) read_weights(f, o, i / step_weights<F>, weights);
    store(to + i, weights[i % step_weights<F> / 16]);
  }
}

// Half a strip, outputs o to o + 15, for a product of many rows; inputs in order.
template <class X, class F>
void pack_blocks(const F& f, long o, long first, long count, Word* to) {
  constexpr int per_word = numbers_per_word<X>;
  const long end = (first + count) * per_word;
  f32x16 w[16][step_weights<F> / 16];
  for (long begin = first * per_word; begin < end; begin += step_weights<F>) {
    const long left = std::min(end - begin, step_weights<F>);
    for (int i = 0; i < 16; i++) read_weights(f, o + i, begin / step_weights<F>, w[i]);
    for (int k = 0; k < left / 16; k += per_word, to += 16 * strip) {
      u32x16 words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) words[i] = words_of<per_word>(w[i] + k);
      pack_words(words, to);
    }
  }
}

}  // namespace
