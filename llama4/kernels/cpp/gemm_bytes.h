// y = x W^T for many rows of x, rounded to int8, and W in int8, int4 or blocks of GGUF: sums of a tile of 6 rows by 32
// outputs are of integers within a group of inputs, and of floats over the groups.
//
// Rows of x and strips of W are packed group by group. A group of a strip of 32 outputs: words of four inputs, one for
// each output, then a scale of each, and a minimum of each if the format has them. A group of a tile of rows: words of
// four inputs, one for each row, then of each row what its sums begin with, its scale and, for minima, its sum.

#pragma once

#include "gemm.h"
#include "gemv_blocks.h"
#include "gemv_bytes.h"

namespace {

constexpr int byte_tile_rows = vectors_in_registers > 16 ? 6 : 2, byte_tile_vectors = vectors_in_registers > 16 ? 2 : 1;

// In words of 32 bits.
struct ByteGroup {
  long words, of_strip, of_row;
  template <class F>
  INLINE explicit ByteGroup(const F& f)
      : words(input_group(f) / 4), of_strip((words + 1 + has_minimum<F>)*strip), of_row(words + 3) {}
};

// Rows of a tile of which `left` rows are left: an even number.
constexpr long rows_of_tile(long left) { return std::min<long>(byte_tile_rows, (left + 1) / 2 * 2); }

// Tiles one behind the other; for a row that is missing the last one again.
template <class F, class X>
const Word* pack_byte_rows(Team& team, const F& f, const X* x, long N) {
  const ByteGroup group(f);
  const long inputs = input_group(f), rounded = std::max(inputs, 32l), I = f.I, groups = I / inputs;
  Word* packed = team.memory<Word>((N + 1) / 2 * 2 * groups * group.of_row);
  team.for_each((N + byte_tile_rows - 1) / byte_tile_rows, byte_tile_rows * I, [=](long tile) {
    const long first = tile * byte_tile_rows, rows = rows_of_tile(N - first);
    for (long r = 0; r < rows; r++) {
      const X* row = x + std::min(first + r, N - 1) * I;
      for (long i = 0; i < I; i += rounded) {
        const Rounding rounding = rounding_of<int8_t>(row + i, rounded);
        int32_t sum = 0;
        for (long at = i; at < i + rounded; at += 32) {
          int8_t bytes[32];
          round_32<F>(row + at, rounding.factor, bytes);
          for (long k = 0; k < 32; k += 4) {
            Word* own = packed + (first * groups + (at + k) / inputs * rows) * group.of_row + r;
            own[(at + k) % inputs / 4 * rows] = word_at((const uint8_t*)bytes + k);
            for (int j = 0; j < 4; j++) sum += bytes[k + j];
            if ((at + k + 4) % inputs) continue;
            own += group.words * rows;
            own[0] = least_value<F> * sum;
            own[rows] = __builtin_bit_cast(Word, rounding.scale);
            own[2 * rows] = __builtin_bit_cast(Word, rounding.scale * float(sum));
            sum = 0;
          }
        }
      }
    }
  });
  return packed;
}

// Outputs o to o + 15, half of a strip.
inline void pack_bytes(const Int8Inputs<Int8>& f, Scales scales, long o, Word* to) {
  const ByteGroup group(f);
  for (long begin = 0; begin < f.I; begin += 4 * group.words, to += group.of_strip) {
    for (long word = 0; word < group.words; word += 16) {
      u32x16 words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) words[i] = load<u32x16>(f.at(o + i, begin / 16 + word / 4)) ^ 0x80808080u;
      pack_words(words, to + word * strip);
    }
    store(to + group.words * strip, scales.load(o));
  }
}

inline void pack_bytes(const Int8Inputs<Int4>& f, Scales, long o, Word* to) {
  const ByteGroup group(f);
  const uint8_t* w = f.at(o);
  for (long g = 0; g < f.I / f.group; g++, to += group.of_strip) {
    for (long word = 0; word < group.words; word += 8, w += Int4::step_bytes) {
      u32x16 codes[4][2];  // of four outputs each
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) read_nibbles(load<u32x16>(w + 64 * j), codes[j]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        u32x16 words[4] = {codes[0][half], codes[1][half], codes[2][half], codes[3][half]};
        transpose<2>(words);  // then one word of each output
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(to + (word + 4 * half + i) * strip, transpose_fours(words[i]));
      }
    }
    store(to + group.words * strip, f.scales_at(o, g));
  }
}

template <class F>
void pack_bytes(const F& f, Scales, long o, Word* to) {
  const ByteGroup group(f);
  constexpr int groups = step_weights<F> / F::group, sums = step_weights<F> / 32;
  for (long begin = 0; begin < f.I; begin += step_weights<F>, to += groups * group.of_strip) {
    const long left = std::min(f.I - begin, step_weights<F>);
    u32x16 words[F::vectors][16];
    float scales[groups][16], minima[sums][16];
    for (int i = 0; i < 16; i++) {
      const auto read = read_step(f, o + i, begin / step_weights<F>);
      for (int vector = 0; vector < F::vectors; vector++) words[vector][i] = integers_from_zero<F>(read.codes[vector]);
      for (int g = 0; g < groups; g++) scales[g][i] = read.scales[g];
      for (int g = 0; has_minimum<F> && g < sums; g++) minima[g][i] = read.minima[g];
    }
    for (int vector = 0; vector < F::vectors; vector++) {
      transpose(words[vector]);
      for (int word = 0; word < 16; word++) {
        const int place = F::place(vector, word / 4) + word % 4 * 4;
        if (place < left)
          store(to + place / F::group * group.of_strip + place % F::group / 4 * strip, words[vector][word]);
      }
    }
    for (int g = 0; g * F::group < left; g++) {
      Word* own = to + g * group.of_strip + group.words * strip;
      __builtin_memcpy(own, scales[g], sizeof scales[g]);
      if (has_minimum<F>) __builtin_memcpy(own + strip, minima[g], sizeof minima[g]);
    }
  }
}

// `rows` rows of a tile times 32 outputs.
template <class F, int rows>
__attribute__((noinline)) void multiply_byte_tile(const F f, const Word* x, const Word* w, long groups,
                                                  float (*y)[strip]) {
  const ByteGroup group(f);
  constexpr int vectors = byte_tile_vectors;
  const auto number = [](Word word) { return __builtin_bit_cast(float, word); };
  for (int column = 0; column < strip; column += 16 * vectors) {
    f32x16 totals[rows][vectors] = {};
    const Word *a = x, *b = w + column;
    for (long g = 0; g < groups; g++, a += group.of_row * rows, b += group.of_strip) {
      const Word *begin = a + group.words * rows, *scale = begin + rows, *sum = scale + rows;
      i32x16 sums[rows][vectors];
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[r][j] = (i32x16)(u32x16{} + begin[r]);
#pragma GCC unroll 4
      for (long k = 0; k < group.words; k++) {
        u32x16 weights[vectors];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) weights[j] = load<u32x16>(b + k * strip + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
          for (int j = 0; j < vectors; j++)
            sums[r][j] = multiply_add_bytes<value_range<F>>(sums[r][j], weights[j], u32x16{} + a[k * rows + r]);
      }
      const float* factors = (const float*)b + group.words * strip;
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) {
        const f32x16 own = load<f32x16>(factors + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) totals[r][j] += to_floats(sums[r][j]) * (own * number(scale[r]));
        if constexpr (has_minimum<F>) {
          const f32x16 minima = load<f32x16>(factors + strip + 16 * j);
#pragma GCC unroll 6
          for (int r = 0; r < rows; r++) totals[r][j] += minima * number(sum[r]);
        }
      }
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < vectors; j++) store(y[r] + column + 16 * j, totals[r][j]);
  }
}

// y = x W^T for rows that `pack_byte_rows` packed: a strip of W is packed, and used while it is in the caches.
template <class F, class X>
void gemm_bytes(Phase& phase, const Word* x, long N, const F& f, long O, Scales scales, X* y) {
  phase.add(O / strip, strip * f.I, [=](long task) {
    const ByteGroup group(f);
    const long groups = f.I / input_group(f), o = task * strip;
    Word* w = scratch<Word, Use::panel>(groups * group.of_strip);
    pack_bytes(f, scales, o, w), pack_bytes(f, scales, o + 16, w + 16);
    for (long n = 0; n < N; n += byte_tile_rows) {
      const Word* tile = x + n * groups * group.of_row;
      float sums[byte_tile_rows][strip];
      switch (rows_of_tile(N - n)) {
        case 2: multiply_byte_tile<F, 2>(f, tile, w, groups, sums); break;
        case 4: multiply_byte_tile<F, std::min(4, byte_tile_rows)>(f, tile, w, groups, sums); break;
        default: multiply_byte_tile<F, byte_tile_rows>(f, tile, w, groups, sums);
      }
      for (long r = 0; r < std::min<long>(byte_tile_rows, N - n); r++)
        for (int j = 0; j < strip; j += 16) store_floats(y + (n + r) * O + o + j, load<f32x16>(sums[r] + j));
    }
  });
}

}  // namespace
