// Rows of x and of W, of any format, as words of 32 bits: a float, or, where the machine multiplies them so, two
// bfloat16 that are neighbours along the inputs and whose products go to the same sum.

#pragma once

#include "amx.h"
#include "formats.h"

namespace {

using Word = uint32_t;
template <class X>
constexpr int numbers_per_word =
#ifdef __AVX512BF16__
    std::is_same_v<X, bf16> ? 2 : 1;
#else
    1;
#endif

// What words consist of, for rows of a dtype.
template <class X>
using WordNumber = std::conditional_t<numbers_per_word<X> == 2, bf16, float>;

template <int per_word>
u32x16 words_of(const f32x16* planes) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) return (u32x16)_mm512_cvtne2ps_pbh((__m512)planes[1], (__m512)planes[0]);
#endif
  return (u32x16)planes[0];
}

// 16 words, of which number k is lane i of vector k.
template <int per_word>
u32x16 words_across(const f32x16* vectors) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) {
    using u16x32 = uint16_t __attribute__((vector_size(64)));
    const auto all = (u16x32)words_of<2>(vectors);
    return (u32x16)__builtin_shufflevector(all, all, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                           25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
#endif
  return words_of<1>(vectors);
}

// 16 words of consecutive numbers.
template <class X>
u32x16 load_words(const X* numbers) {
  if constexpr (sizeof(X) * numbers_per_word<X> == sizeof(Word)) return load<u32x16>(numbers);
  return (u32x16)load_floats(numbers);
}

// ---- W: a strip is 32 outputs, as [I, 32] in words along the inputs

constexpr long strip = 32;

// 16 words of consecutive outputs, from one row of W [I, O], or from two.
template <class X>
u32x16 words_of_rows(const X* row, [[maybe_unused]] const X* other) {
#ifdef __AVX512BF16__
  if constexpr (numbers_per_word<X> == 2) {
    const auto read = [](const X* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); };
    return (u32x16)_mm512_or_si512(read(row), _mm512_slli_epi32(read(other), 16));
  }
#endif
  return (u32x16)load_floats(row);
}

// 16 words of each of 16 outputs, as 16 rows of half a strip.
inline void pack_words(u32x16* words, Word* to) {
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) store(to + i * strip, words[i]);
}

// Half a strip, outputs o to o + 15, of W [O, I] in the dtype of the rows: `count` words from word `first` on.
template <class X>
void pack_dense(const X* w, long I, long o, long first, long count, Word* to) {
  constexpr long per_word = numbers_per_word<X>;
  for (long i = first * per_word; i < (first + count) * per_word; i += 16 * per_word, to += 16 * strip) {
    u32x16 words[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) words[k] = load_words(w + (o + k) * I + i);
    pack_words(words, to);
  }
}

// Half a strip of W [O, I] in another format. The inputs come in the order of the planes.
template <class X, class F>
void pack_format(const F& f, long o, long first, long count, Word* to) {
  constexpr int blocks = F::planes == 1 ? 2 : 1, planes = blocks * F::planes, per_word = numbers_per_word<X>;
  f32x16 w[16][planes];
  for (long input = first * per_word; input < (first + count) * per_word; input += blocks * F::inputs) {
    const long block = input / F::inputs;
    for (int i = 0; i < 16; i++)
      for (int b = 0; b < blocks; b++) f.read(o + i, block + b, w[i] + b);
    for (int plane = 0; plane < planes; plane += per_word, to += 16 * strip) {
      u32x16 words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) words[i] = words_of<per_word>(w[i] + plane);
      pack_words(words, to);
    }
  }
}

// Half a strip, outputs o to o + 15, of interleaved int4; inputs in order.
template <class X>
void pack_int4(const Int4& f, long o, long first, long count, Word* to) {
  constexpr int per_word = numbers_per_word<X>;
  const uint8_t* w = f.at(o) + first * per_word / Int4::step_inputs * Int4::step_bytes;
  for (long i = first * per_word; i < (first + count) * per_word; i += Int4::step_inputs, w += Int4::step_bytes) {
    const f32x16 scales = f.scales_at(o, i / f.group);
    u32x16 words[4];  // of four outputs each; then one word of each output
    for (int j = 0; j < 4; j++) words[j] = load<u32x16>(w + 64 * j);
    transpose<2>(words);
    for (const u32x16 own : words)
#pragma GCC unroll 8
      for (int place = 0; place < 8; place += per_word, to += strip) {
        f32x16 numbers[per_word];
        for (int k = 0; k < per_word; k++) numbers[k] = read_int4(transpose_fours(own), place + k) * scales;
        store(to, words_across<per_word>(numbers));
      }
  }
}

// ---- x

// x [count] in the order in which a format's planes have the inputs.
template <class F, class X>
const WordNumber<X>* arrange_planes(Team& team, const X* x, long count) {
  constexpr int plane_inputs = F::inputs / F::planes;
  auto* to = team.memory<WordNumber<X>>(count);
  team.for_each(count / F::inputs, F::inputs, [=](long block) {
    const long from = block * F::inputs;
    for (int plane = 0; plane < F::planes; plane++)
      for (int lane = 0; lane < plane_inputs; lane++)
        assign(to[from + plane * plane_inputs + lane], upcast(x[from + F::place(plane, lane)]));
  });
  return to;
}

// Rows of a tile: an even number, of which the last may be computed in vain.
constexpr int least_height = 10, most_height = 24;
// Rows whose sums registers have place for; a higher tile is computed in parts.
constexpr int rows_in_registers = vectors_in_registers > 16 ? most_height : 6;

// Words that a tile has of each input: as many rows as make whole vectors.
constexpr long packed_rows(long rows) { return rows <= 16 ? 16 : 24; }

// x [N, count] in words: in tiles of about as many rows, [count, packed_rows] each, with zeros behind the last row; for
// AMX as it is, where the last tile overlaps the one before.
struct PackedInputs {
  const Word* words;
  long N, count, tiles, height;  // rows of the highest tile
  bool by_amx;

  PackedInputs() = default;
  PackedInputs(const Word* words, long N, long count, bool by_amx) : words(words), N(N), count(count), by_amx(by_amx) {
    const long most = by_amx ? amx_height(N) : most_height;
    tiles = (N + most - 1) / most;
    height = by_amx ? most : std::max<long>((N + 2 * tiles - 1) / (2 * tiles) * 2, least_height);
  }

  // The first row of a tile.
  long first_of(long tile) const {
    if (!by_amx) return tile * ((N + 1) / 2) / tiles * 2;
    const long first = tile * height;
    if (N - first >= height) return first;
    return N - (N - first > amx_rows ? height : amx_rows);
  }
  long rows_of(long tile) const {
    const long first = first_of(tile);
    return std::min(N, by_amx ? first + height : first_of(tile + 1)) - first;
  }
  // Where a tile has this word, from `words` on.
  long offset(long tile, long word) const {
    if (by_amx) return first_of(tile) * count + word;
    return tile * count * packed_rows(height) + word * packed_rows(rows_of(tile));
  }
  const Word* at(long tile, long word) const { return words + offset(tile, word); }
};

template <class X>
bool goes_by_amx(long N, bool is_invariant = false) {
  return numbers_per_word<X> == 2 && uses_amx(N) && !is_invariant;
}

// Rows of `count` words: read(n, k, words) gives words k to k + 15 of row n, or as many as there are.
template <class Read>
PackedInputs pack_inputs(Phase& phase, long N, long count, bool by_amx, const Read& read) {
  if (by_amx) {
    Word* packed = phase.team.memory<Word>(N * count);
    phase.add_before(N, count, [=](long n) {
      for (long k = 0; k < count; k += 16) {
        const u32x16 words = read(n, k, std::min(16l, count - k));
        __builtin_memcpy(packed + n * count + k, &words, std::min(16l, count - k) * sizeof(Word));
      }
    });
    return {packed, N, count, true};
  }
  PackedInputs inputs(nullptr, N, count, false);
  Word* packed = phase.team.memory<Word>(inputs.tiles * packed_rows(inputs.height) * count);
  inputs.words = packed;
  phase.add_before(inputs.tiles, inputs.height * count, [=](long tile) {
    const long first = inputs.first_of(tile), rows = inputs.rows_of(tile), own = packed_rows(rows);
    for (long k = 0; k < count; k += 16)
      for (long begin = 0; begin < own; begin += 16) {
        const long some = std::min(16l, count - k), end = std::min(rows, begin + 16);
        u32x16 words[16] = {};
        for (long r = begin; r < end; r++) words[r - begin] = read(first + r, k, some);
        transpose(words);
        Word* to = packed + inputs.offset(tile, k) + begin;
#pragma GCC unroll 16
        for (long i = 0; i < 16; i++)
          if (i >= some) break;
          else if (begin + 16 <= own) store(to + i * own, words[i]);
          else __builtin_memcpy(to + i * own, &words[i], 8 * sizeof(Word));
      }
  });
  return inputs;
}

// Rows of I numbers in order, a multiple of what 16 words have.
template <class X, class Number>
PackedInputs pack_rows(Phase& phase, const Number* x, long N, long I) {
  constexpr long per_word = numbers_per_word<X>;
  const bool by_amx = goes_by_amx<X>(N);
  if (by_amx && std::is_same_v<Number, WordNumber<X>>) return {(const Word*)x, N, I / per_word, true};
  return pack_inputs(phase, N, I / per_word, by_amx,
                     [=](long n, long k, long) { return load_words(x + n * I + k * per_word); });
}

}  // namespace
