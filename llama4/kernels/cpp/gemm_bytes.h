// y = x W^T for many rows of x, rounded to int8, and blocks of GGUF: sums of a tile of 6 rows by 32 outputs are of
// integers within a group of inputs, and of floats over the groups.
//
// Rows of x and strips of W are packed group by group. A group of a strip of 32 outputs: words of four inputs, one for
// each output, then a scale of each, and a minimum of each if the format has them. A group of a tile of rows: words of
// four inputs, one for each row, then of each row what its sums begin with, its scale and, for minima, its sum.

#pragma once

#include "gemm.h"
#include "gemv_blocks.h"

namespace {

constexpr int byte_tile_rows = vectors_in_registers > 16 ? 6 : 2, byte_tile_vectors = vectors_in_registers > 16 ? 2 : 1;

template <class F>
struct ByteGroup {
  static constexpr long words = F::group / 4;
  static constexpr long of_strip = (words + 1 + F::has_minimum) * strip;  // words of 32 bits
  static constexpr long of_row = words + 3;
};

// Rows of a tile of which `left` rows are left: an even number.
constexpr long rows_of_tile(long left) { return std::min<long>(byte_tile_rows, (left + 1) / 2 * 2); }

// Tiles one behind the other, with zeros for a row that is missing.
template <class F, class X>
const Word* pack_byte_rows(Team& team, const X* x, long N, long I) {
  using Group = ByteGroup<F>;
  const long groups = I / F::group;
  Word* packed = team.memory<Word>((N + 1) / 2 * 2 * groups * Group::of_row);
  team.for_each((N + byte_tile_rows - 1) / byte_tile_rows, byte_tile_rows * I, [=](long tile) {
    const long first = tile * byte_tile_rows, rows = rows_of_tile(N - first);
    for (long r = 0; r < rows; r++)
      for (long i = 0; i < I; i += step_weights<F>) {
        const long count = std::min(I - i, step_weights<F>);
        int8_t bytes[step_weights<F>] = {};
        float scales[step_weights<F> / 32] = {};
        if (first + r < N) round_inputs(x + (first + r) * I + i, count, bytes, scales);
        for (long at = 0; at < count; at += F::group) {
          Word* to = packed + (first * groups + (i + at) / F::group * rows) * Group::of_row + r;
          int32_t sum = 0;
          for (int k = 0; k < F::group; k++) sum += bytes[at + k];
          for (int k = 0; k < Group::words; k++) to[k * rows] = word_at((const uint8_t*)bytes + at + 4 * k);
          to += Group::words * rows;
          to[0] = least_value<F> * sum;
          to[rows] = __builtin_bit_cast(Word, scales[at / 32]);
          to[2 * rows] = __builtin_bit_cast(Word, scales[at / 32] * float(sum));
        }
      }
  });
  return packed;
}

// Outputs o to o + 15, half of a strip.
template <class F>
void pack_bytes(const F& f, long o, Word* to) {
  using Group = ByteGroup<F>;
  constexpr int groups = step_weights<F> / F::group, sums = step_weights<F> / 32;
  for (long begin = 0; begin < f.I; begin += step_weights<F>, to += groups * Group::of_strip) {
    const long left = std::min(f.I - begin, step_weights<F>);
    u32x16 words[F::vectors][16];
    float scales[groups][16], minima[sums][16];
    for (int i = 0; i < 16; i++) {
      const auto read = read_step(f, o + i, begin / step_weights<F>);
      for (int vector = 0; vector < F::vectors; vector++) words[vector][i] = integers_from_zero<F>(read.codes[vector]);
      for (int g = 0; g < groups; g++) scales[g][i] = read.scales[g];
      for (int g = 0; F::has_minimum && g < sums; g++) minima[g][i] = read.minima[g];
    }
    for (int vector = 0; vector < F::vectors; vector++) {
      transpose(words[vector]);
      for (int word = 0; word < 16; word++) {
        const int place = F::place(vector, word / 4) + word % 4 * 4;
        if (place < left)
          store(to + place / F::group * Group::of_strip + place % F::group / 4 * strip, words[vector][word]);
      }
    }
    for (int g = 0; g * F::group < left; g++) {
      Word* own = to + g * Group::of_strip + Group::words * strip;
      __builtin_memcpy(own, scales[g], sizeof scales[g]);
      if (F::has_minimum) __builtin_memcpy(own + strip, minima[g], sizeof minima[g]);
    }
  }
}

// `rows` rows of a tile times 32 outputs.
template <class F, int rows>
__attribute__((noinline)) void multiply_byte_tile(const Word* x, const Word* w, long groups, float (*y)[strip]) {
  using Group = ByteGroup<F>;
  constexpr int vectors = byte_tile_vectors;
  const auto number = [](Word word) { return __builtin_bit_cast(float, word); };
  for (int column = 0; column < strip; column += 16 * vectors) {
    f32x16 totals[rows][vectors] = {};
    const Word *a = x, *b = w + column;
    for (long g = 0; g < groups; g++, a += Group::of_row * rows, b += Group::of_strip) {
      const Word *begin = a + Group::words * rows, *scale = begin + rows, *sum = scale + rows;
      i32x16 sums[rows][vectors];
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[r][j] = (i32x16)(u32x16{} + begin[r]);
#pragma GCC unroll 8
      for (int k = 0; k < Group::words; k++) {
        u32x16 weights[vectors];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) weights[j] = load<u32x16>(b + k * strip + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
          for (int j = 0; j < vectors; j++)
            sums[r][j] = multiply_add_bytes<value_range<F>>(sums[r][j], weights[j], u32x16{} + a[k * rows + r]);
      }
      const float* factors = (const float*)b + Group::words * strip;
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) {
        const f32x16 own = load<f32x16>(factors + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) totals[r][j] += to_floats(sums[r][j]) * (own * number(scale[r]));
        if constexpr (F::has_minimum) {
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
void gemm_bytes(Phase& phase, const Word* x, long N, const F& f, long O, X* y) {
  using Group = ByteGroup<F>;
  phase.add(O / strip, strip * f.I, [=](long task) {
    const long groups = f.I / F::group, o = task * strip;
    Word* w = scratch<Word, Use::panel>(groups * Group::of_strip);
    pack_bytes(f, o, w), pack_bytes(f, o + 16, w + 16);
    for (long n = 0; n < N; n += byte_tile_rows) {
      const Word* tile = x + n * groups * Group::of_row;
      float sums[byte_tile_rows][strip];
      switch (rows_of_tile(N - n)) {
        case 2: multiply_byte_tile<F, 2>(tile, w, groups, sums); break;
        case 4: multiply_byte_tile<F, std::min(4, byte_tile_rows)>(tile, w, groups, sums); break;
        default: multiply_byte_tile<F, byte_tile_rows>(tile, w, groups, sums);
      }
      for (long r = 0; r < std::min<long>(byte_tile_rows, N - n); r++)
        for (int j = 0; j < strip; j += 16) store_floats(y + (n + r) * O + o + j, load<f32x16>(sums[r] + j));
    }
  });
}

}  // namespace
