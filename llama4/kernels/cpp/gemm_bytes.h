// y = x W^T for many rows of x, rounded to int8, and W in int8, int4 or blocks of GGUF: sums of a tile of 6 rows by 32
// outputs are of integers within a group of inputs, and of floats over the groups.
//
// Rows of x and strips of W are packed group by group. A group of a strip of 32 outputs: words of four inputs, one for
// each output, then a scale of each, and a minimum of each if the format has them. A group of a tile of rows: of each
// row its words of four inputs, then what its sums begin with, its scale and, for minima, its sum.

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

// Most rows of a tile. AMX pays where a group has a line or half of one.
inline long most_byte_rows(const ByteGroup& group, long N) {
  return uses_amx(N) && group.words % 8 == 0 ? amx_rows : byte_tile_rows;
}

// Rows of a tile of which `left` rows are left: an even number; by AMX all of them.
inline long rows_of_tile(long left, long most) {
  return most == byte_tile_rows ? std::min(most, (left + 1) / 2 * 2) : most;
}

// Tiles one behind the other; for a row that is missing the last one again.
template <class F, class X>
const Word* pack_byte_rows(Phase& phase, const F& f, const X* x, long N) {
  const ByteGroup group(f);
  const long inputs = input_group(f), I = f.I, groups = I / inputs, most = most_byte_rows(group, N);
  const long tiles = (N + most - 1) / most;
  Word* packed = phase.team.memory<Word>(tiles * most * groups * group.of_row);
  phase.add_before(tiles, most * I, [=](long tile) {
    const long first = tile * most, rows = rows_of_tile(N - first, most);
    for (long r = 0; r < rows; r++) {
      const X* row = x + std::min(first + r, N - 1) * I;
      Word* own = packed + (first * groups + r) * group.of_row;
      for (long i = 0; i < I; i += inputs, own += rows * group.of_row) {
        const Rounding rounding = rounding_of<int8_t>(row + i, inputs);
        const int32_t sum = round_bytes<F>(row + i, inputs, rounding.factor, (int8_t*)own);
        own[group.words] = least_value<F> * sum;
        own[group.words + 1] = __builtin_bit_cast(Word, rounding.scale);
        own[group.words + 2] = __builtin_bit_cast(Word, rounding.scale * float(sum));
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

// The codes of a step of 16 rows of W, less the least one: calls put(vector, word, codes) for each word of a vector.
template <class F, class Put>
INLINE void words_of_step(const F& f, long o, long step, const Put& put) {
  if constexpr (is_large_blocks<F>) {  // as they lie, and then taken apart
    const auto block = [&](int i) { return f.row(o + i) + step * F::nbytes; };
    u32x16 bits[8]{};
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; pair++) {
      if constexpr (F::has_bits)
        if (pair == 0 || F::bits_at(0) != F::bits_at(1)) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; i++) bits[i] = halves_at(block(i) + F::bits_at(pair), block(i + 8) + F::bits_at(pair));
          transpose<4>(bits);
        }
      u32x16 nibbles[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) nibbles[i] = load<u32x16>(block(i) + F::nibbles_at + 64 * pair);
      transpose(nibbles);
#pragma GCC unroll 16
      for (int word = 0; word < 16; word++) {
        u32x16 codes[2], own = bits[word % 8];
        if constexpr (F::has_bits) own = own >> (F::bits_shift(pair) + word / 8 * 2);
        F::join(nibbles[word], own, codes);
        for (int i = 0; i < 2; i++) put(2 * pair + i, word, integers_from_zero<F>(codes[i]));
      }
    }
  } else {
    u32x16 words[F::vectors][16];
    for (int i = 0; i < 16; i++) {
      const auto read = read_step(f, o + i, step);
      for (int vector = 0; vector < F::vectors; vector++) words[vector][i] = integers_from_zero<F>(read.codes[vector]);
    }
    for (int vector = 0; vector < F::vectors; vector++) {
      transpose(words[vector]);
      for (int word = 0; word < 16; word++) put(vector, word, words[vector][word]);
    }
  }
}

template <class F>
__attribute__((flatten)) void pack_bytes(const F& f, Scales, long o, Word* to) {
  const ByteGroup group(f);
  constexpr int groups = step_weights<F> / F::group, factors = groups + has_minimum<F> * step_weights<F> / 32;
  for (long step = 0; step * step_weights<F> < f.I; step++, to += groups * group.of_strip) {
    const long left = f.I - step * step_weights<F>;
    words_of_step(f, o, step, [&](int vector, int word, u32x16 codes) {
      const int place = F::place(vector, word / 4) + word % 4 * 4;
      if (is_large_blocks<F> || place < left)
        store(to + place / F::group * group.of_strip + place % F::group / 4 * strip, codes);
    });
    float own[16][factors];  // scales, then minima
    for (int i = 0; i < 16; i++) {
      const auto read = read_step(f, o + i, step);
      __builtin_memcpy(own[i], &read.scales, sizeof read.scales);
      if constexpr (has_minimum<F>) __builtin_memcpy(own[i] + groups, &read.minima, sizeof read.minima);
    }
    for (int first = 0; first < factors; first += 4) {
      u32x16 fours[4];  // of outputs i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const auto at = [&](int k) { return load<u32x4>((const Word*)own[i + k] + first); };
        fours[i] = concat(at(0), at(4), at(8), at(12));
      }
      transpose<2>(fours);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const int g = (first + i) % groups, is_minimum = (first + i) / groups;
        if (is_large_blocks<F> || g * F::group < left)
          store(to + g * group.of_strip + (group.words + is_minimum) * strip, fours[i]);
      }
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
      const auto of_row = [=](int r, long k) { return a[r * group.of_row + k]; };
      i32x16 sums[rows][vectors];
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[r][j] = (i32x16)(u32x16{} + of_row(r, group.words));
#pragma GCC unroll 4
      for (long k = 0; k < group.words; k++) {
        u32x16 weights[vectors];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) weights[j] = load<u32x16>(b + k * strip + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
          for (int j = 0; j < vectors; j++)
            sums[r][j] = multiply_add_bytes<value_range<F>>(sums[r][j], weights[j], u32x16{} + of_row(r, k));
      }
      const float* factors = (const float*)b + group.words * strip;
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) {
        const f32x16 own = load<f32x16>(factors + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
          totals[r][j] += to_floats(sums[r][j]) * (own * number(of_row(r, group.words + 1)));
        if constexpr (has_minimum<F>) {
          const f32x16 minima = load<f32x16>(factors + strip + 16 * j);
#pragma GCC unroll 6
          for (int r = 0; r < rows; r++) totals[r][j] += minima * number(of_row(r, group.words + 2));
        }
      }
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < vectors; j++) store(y[r] + column + 16 * j, totals[r][j]);
  }
}

// The same by AMX for 16 rows, of which `rows` are wanted: to the same bits.
template <class F>
__attribute__((noinline)) void multiply_byte_tile_by_amx(const F f, const Word* x, const Word* w, long groups,
                                                         long rows, float (*y)[strip]) {
  const ByteGroup group(f);
  std::fill(y[0], y[rows], 0.f);
  for (long g = 0; g < groups; g++, x += group.of_row * amx_rows, w += group.of_strip) {
    alignas(64) int32_t sums[amx_rows][strip];
    amx->multiply_bytes(x, group.of_row, w, group.words, sums[0]);
    const auto* factors = (const float*)w + group.words * strip;
    for (long r = 0; r < rows; r++) {
      const Word* own = x + r * group.of_row + group.words;
      const auto *scale = (const float*)own + 1, *sum = (const float*)own + 2;
      for (int j = 0; j < strip; j += 16) {
        const auto products = (i32x16)(load<u32x16>(sums[r] + j) + own[0]);
        f32x16 total = load<f32x16>(y[r] + j) + to_floats(products) * (load<f32x16>(factors + j) * *scale);
        if constexpr (has_minimum<F>) total += load<f32x16>(factors + strip + j) * *sum;
        store(y[r] + j, total);
      }
    }
  }
}

// y = x W^T for rows that `pack_byte_rows` packed: a strip of W is packed, and used while it is in the caches.
template <class F, class X>
void gemm_bytes(Phase& phase, const Word* x, long N, const F& f, long O, Scales scales, X* y) {
  const ByteGroup group(f);
  const long groups = f.I / input_group(f), most = most_byte_rows(group, N), tiles = (N + most - 1) / most;
  phase.add(O / strip, tiles * strip * f.I, [=](long task) {
    const long o = task * strip;
    const AmxScope scope(most != byte_tile_rows, group.words % 16 ? 8 : 16);
    Word* w = scratch<Word, Use::panel>(groups * group.of_strip);
    pack_bytes(f, scales, o, w), pack_bytes(f, scales, o + 16, w + 16);
    for (long n = 0; n < N; n += most) {
      const Word* tile = x + n * groups * group.of_row;
      const long rows = std::min(most, N - n);
      float sums[amx_rows][strip];
      switch (rows_of_tile(N - n, most)) {
        case 2: multiply_byte_tile<F, 2>(f, tile, w, groups, sums); break;
        case 4: multiply_byte_tile<F, std::min(4, byte_tile_rows)>(f, tile, w, groups, sums); break;
        case amx_rows: multiply_byte_tile_by_amx(f, tile, w, groups, rows, sums); break;
        default: multiply_byte_tile<F, byte_tile_rows>(f, tile, w, groups, sums);
      }
      for (long r = 0; r < rows; r++)
        for (int j = 0; j < strip; j += 16) store_floats(y + (n + r) * O + o + j, load<f32x16>(sums[r] + j));
    }
  });
}

}  // namespace
