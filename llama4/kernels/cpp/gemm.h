// Products of many rows, x [N, I] with W: sums of a tile of 8 rows by 32 outputs stay in registers, W is packed in
// panels.
//
// Operands are words of 32 bits: a float, or, where the machine multiplies them so, two bfloat16 that are neighbours
// along the inputs and whose products go to the same sum.

#pragma once

#include "amx.h"
#include "formats.h"
#include "gemv_in_out.h"

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
f32x16 multiply_add_words(f32x16 sums, Word a, const Word* b) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) return multiply_add(sums, bf16x32{_mm512_set1_epi32(a)}, bf16x32{_mm512_loadu_si512(b)});
#endif
  return sums + __builtin_bit_cast(float, a) * load<f32x16>(b);
}

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

// ---- tiles

constexpr int tile_rows = 8;

// Memory to prefetch during a tile: `each` lines per word, each line `row` bytes behind the last.
struct Prefetch {
  const char* line = nullptr;
  long row = 0, each = 0;
};

// sums += a b, for rows of a and `vectors` times 16 columns of b, over `count` words.
template <int per_word, int vectors, int rows = tile_rows>
inline __attribute__((always_inline)) void add_tile(const Word* a, long a_row, const Word* b, long b_row, long count,
                                                    float* sums, long sums_row, Prefetch ahead = {}) {
  if constexpr (2 * rows * vectors > vectors_in_registers) {  // in two halves
    constexpr int own = vectors > 1 ? rows : rows / 2, columns = (vectors + 1) / 2, next = vectors > 1 ? 16 : 0;
    add_tile<per_word, columns, own>(a, a_row, b, b_row, count, sums, sums_row, ahead);
    return add_tile<per_word, columns, own>(a + (rows - own) * a_row, a_row, b + next, b_row, count,
                                            sums + (rows - own) * sums_row + next, sums_row);
  }
  f32x16 registers[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) registers[r][j] = load<f32x16>(sums + r * sums_row + 16 * j);
  for (long i = 0; i < count; i++) {
    for (long k = 0; k < ahead.each; k++) __builtin_prefetch(ahead.line + (i * ahead.each + k) * ahead.row, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++)
        registers[r][j] = multiply_add_words<per_word>(registers[r][j], a[r * a_row + i], b + i * b_row + 16 * j);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) store(sums + r * sums_row + 16 * j, registers[r][j]);
}

// The same for n columns, a multiple of 16.
template <int per_word>
void add_tiles(const Word* a, long a_row, const Word* b, long b_row, long count, float* sums, long sums_row, long n) {
  for (long j = 0; j < n; j += 32)
    if (j + 16 < n) add_tile<per_word, 2>(a, a_row, b + j, b_row, count, sums + j, sums_row);
    else add_tile<per_word, 1>(a, a_row, b + j, b_row, count, sums + j, sums_row);
}

// ---- packing: a strip is 32 outputs of W, as [I, 32] in words along the inputs

constexpr long strip = 32;

// One word row of several strips, from one row of W [I, O], or from two.
template <class X>
void pack_row(const X* row, [[maybe_unused]] const X* other, long strips, long words, Word* to) {
  for (long n = 0; n < strips; n++, row += strip, other += strip, to += words * strip) {
#ifdef __AVX512BF16__
    if constexpr (numbers_per_word<X> == 2) {
      using u16x32 = uint16_t __attribute__((vector_size(64), aligned(2), may_alias));
      u16x32 a = load<u16x32>(row), b = load<u16x32>(other);
      store(to, __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10,
                                        42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
      store(to + 16, __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24,
                                             56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
      continue;
    }
#endif
    store(to, load_floats(row)), store(to + 16, load_floats(row + 16));
  }
}

// 16 words of each of 16 outputs, as 16 rows of half a strip.
inline void pack_words(u32x16* words, Word* to) {
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) store(to + i * strip, words[i]);
}

// Half a strip, outputs o to o + 15, of W [O, I] in the dtype of the rows.
template <class X>
void pack_dense(const X* w, long I, long o, Word* to) {
  constexpr long step = 16 * numbers_per_word<X>;
  for (long i = 0; i < I; i += step, to += 16 * strip) {
    u32x16 words[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) words[k] = load_words(w + (o + k) * I + i);
    pack_words(words, to);
  }
}

// Half a strip of W [O, I] in another format. The inputs come in the order of the planes.
template <class X, class F>
void pack_format(const F& f, long o, Word* to) {
  constexpr int blocks = F::planes == 1 ? 2 : 1, planes = blocks * F::planes, per_word = numbers_per_word<X>;
  f32x16 w[16][planes];
  for (long block = 0; block < f.I / F::inputs; block += blocks) {
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
void pack_int4(const Int4& f, long o, Word* to) {
  constexpr int per_word = numbers_per_word<X>;
  const uint8_t* w = f.at(o);
  for (long i = 0; i < f.I; i += Int4::step_inputs, w += Int4::step_bytes) {
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

// x [count] as words, in the order in which a format's planes have the inputs.
template <class F, class X>
const Word* arrange_words(Team& team, const X* x, long count) {
  if (F::planes == 1 && std::is_same_v<X, WordNumber<X>>) return (const Word*)x;
  constexpr int plane_inputs = F::inputs / F::planes;
  auto* to = team.memory<WordNumber<X>>(count);
  team.for_each((count + F::inputs - 1) / F::inputs, F::inputs, [=](long block) {
    const long from = block * F::inputs;
    if (count - from < F::inputs) {  // of a dense matrix [I, O], whose inputs may be any number
      for (long i = from; i < count; i++) assign(to[i], upcast(x[i]));
      return;
    }
    for (int plane = 0; plane < F::planes; plane++)
      for (int lane = 0; lane < plane_inputs; lane++)
        assign(to[from + plane * plane_inputs + lane], upcast(x[from + F::place(plane, lane)]));
  });
  return (const Word*)to;
}

// ---- the product

// sums [rows, 32] += a b by AMX, for 16 or 32 rows of pairs; words behind the last whole tile go as without it.
inline void add_by_amx(const Word* a, long a_row, const Word* b, long count, long rows, float* sums, Prefetch ahead) {
  for (long i = 0; i < count * ahead.each; i++) __builtin_prefetch(ahead.line + i * ahead.row, 0, 2);
  const long whole = count / 16 * 16;
  amx->add_pairs(a, a_row, b, whole, rows, sums);
  for (long r = 0; r < rows && whole < count; r += tile_rows)
    add_tile<2, 2>(a + r * a_row + whole, a_row, b + whole * strip, strip, count - whole, sums + r * strip, strip);
}

constexpr long large_panel = 256 << 10, small_panel = 32 << 10;  // bytes

// Words along the inputs that are packed at once, and whether their products are the last of a part of the inputs,
// whose sums are added to those of the other parts.
struct Panel {
  long begin, words;
  bool ends_part;
};

// y = x W for at least 8 rows of x, in words. W comes in panels, by as many strips as `bytes` hold: pack(o, strips, k,
// deep, to) packs `deep` words from word k on, from output o on; prefetch(o, strips, panel, tile, tiles) says which
// part of the next panel to prefetch during a tile of this one. Outputs and rows may have scales.
template <class X, class Pack, class PrefetchOf>
void gemm(Phase& phase, const Word* x, long N, long words, long O, const Panel* panels, long num_panels, long bytes,
          const Pack& pack, const PrefetchOf& prefetch, Scales scales, const float* row_scales, X* y,
          bool is_invariant = false) {
  constexpr int per_word = numbers_per_word<X>;
  const bool by_amx = per_word == 2 && uses_amx(N) && !is_invariant;
  const long most = !by_amx ? tile_rows : N < 2 * amx_rows ? amx_rows : 2 * amx_rows;
  const long half = by_amx ? amx_rows : tile_rows / 2;
  const long strips = O / strip, tiles = (N + most - 1) / most;
  const auto is_shorter = [](const Panel& a, const Panel& b) { return a.words < b.words; };
  const long depth = std::max_element(panels, panels + num_panels, is_shorter)->words;
  const long width = std::max(1l, std::min(bytes / (depth * strip * 4), strips / phase.team.size()));
  phase.add((strips + width - 1) / width, width * strip * words * per_word, [=](long task) {
    const long begin = task * width, count = std::min(width, strips - begin), size = count * tiles * most * strip;
    const AmxScope scope(by_amx, 16);
    Word* w = scratch<Word, Use::panel>(count * depth * strip);
    float *sums = scratch<float, Use::sums>(2 * size), *totals = sums + size;
    std::fill(sums, sums + 2 * size, 0.f);
    for (const Panel* panel = panels; panel != panels + num_panels; panel++) {
      const bool is_last = panel + 1 == panels + num_panels;
      const long next_begin = is_last ? begin + width : begin;
      pack(begin * strip, count, panel->begin, panel->words, w);
      for (long n = 0; n < count; n++) {
        const long o = (begin + n) * strip;
        f32x16 factors[2] = {f32x16{} + 1, f32x16{} + 1};
        for (int j = 0; j < strip && scales; j++) factors[j / 16][j % 16] = scales[o + j];
        const auto add = [&](long rows, long first, long tile) {
          const Word *a = x + first * words + panel->begin, *b = w + n * panel->words * strip;
          const long at = (n * tiles + tile) * most * strip;
          Prefetch ahead;
          if (next_begin < strips)
            ahead = prefetch(next_begin * strip, width, is_last ? panels : panel + 1, n * tiles + tile, count * tiles);
          if (by_amx) add_by_amx(a, words, b, panel->words, rows, sums + at, ahead);
          else if (rows == most) add_tile<per_word, 2>(a, words, b, strip, panel->words, sums + at, strip, ahead);
          else add_tile<per_word, 2, tile_rows / 2>(a, words, b, strip, panel->words, sums + at, strip, ahead);
          for (long i = at; i < at + rows * strip && panel->ends_part; i += 16) {
            store(totals + i, load<f32x16>(totals + i) + load<f32x16>(sums + i));
            store(sums + i, f32x16{});
          }
          for (long r = 0; r < rows && is_last; r++)
            for (int j = 0; j < 2; j++) {
              const float factor = row_scales ? row_scales[first + r] : 1;
              store_floats(y + (first + r) * O + o + 16 * j,
                           load<f32x16>(totals + at + r * strip + 16 * j) * (factors[j] * factor));
            }
        };
        for (long tile = 0; tile < tiles; tile++)  // the last may overlap the one before: each has sums of its own
          if (N - tile * most <= half) add(half, N - half, tile);
          else add(most, std::min(tile * most, N - most), tile);
      }
    }
  });
}

// y = x W for W [I, O], in the order of gemv_in_out, if that is asked for or AMX is not there. With few rows a panel is
// used few times, and is best where it is nearest; with many, sums that leave registers cost more.
template <class X>
void gemm_in_out(Phase& phase, const X* x, long N, long I, long O, const X* w, X* y, bool is_invariant) {
  using F = RowsOf<X>;
  struct Inputs {
    long first, second;  // of a word; the same one where it has one
  };
  const bool is_short = N < 192;
  const long parts = parts_of(I), longest = is_short ? 128 / F::together : I;
  Inputs* inputs = phase.team.memory<Inputs>(I);
  Panel* panels = phase.team.memory<Panel>(I / longest + parts);
  long words = 0, num_panels = 0;
  for (long part = 0; part < parts; part++) {
    const long begin = words;
    for_each_eight(part * I / parts, (part + 1) * I / parts, [&](auto count, long first, long run) {
      for (long k = 0; k < count; k += F::together)
        inputs[words++] = {first + k * run, first + (count == 1 ? 0 : k + F::together - 1) * run};
    });
    for (long k = begin; k < words; k += longest)
      panels[num_panels++] = {k, std::min(longest, words - k), k + longest >= words};
  }
  Word* of_x = phase.team.memory<Word>(N * words);
  phase.team.for_each(N, words, [=](long n) {
    for (long k = 0; k < words; k++) {
      const X *own = x + n * I,
              second = F::together == 2 && inputs[k].first == inputs[k].second ? X(0) : own[inputs[k].second];
      of_x[n * words + k] = __builtin_bit_cast(Word, F::factor(own[inputs[k].first], second));
    }
  });
  const auto pack = [=](long o, long strips, long k, long deep, Word* to) {
    for (long i = 0; i < deep; i++)
      pack_row(w + inputs[k + i].first * O + o, w + inputs[k + i].second * O + o, strips, deep, to + i * strip);
  };
  const auto prefetch = [=](long o, long strips, const Panel* next, long tile, long tiles) {  // spread over the tiles
    const long rows = next->words * F::together, lines = strips * strip * long(sizeof(X)) / 64;
    const long each = std::min(long(F::together), (lines * rows + tiles * next->words - 1) / (tiles * next->words));
    const long first = tile * next->words * each;
    // W need not begin with a line of the cache; the end of 64 bytes is in the line that is not there yet.
    const char* line = (const char*)(w + (inputs[next->begin].first + first % rows) * O + o) + first / rows * 64 + 63;
    return first / rows < lines ? Prefetch{line, O * long(sizeof(X)), each} : Prefetch{};
  };
  gemm(phase, of_x, N, words, O, panels, num_panels, is_short ? small_panel : large_panel, pack, prefetch, Scales{},
       nullptr, y, is_invariant);
}

// y = x W^T for W [O, I], of which pack_half(o, to) packs half a strip.
template <class X, class PackHalf>
void gemm_out_in(Phase& phase, const Word* x, long N, long I, long O, const PackHalf& pack_half, Scales scales,
                 const float* row_scales, X* y) {
  const long words = I / numbers_per_word<X>;
  const Panel* all = new (phase.team.memory<Panel>(1)) Panel{0, words, true};
  const auto pack = [=](long o, long strips, long, long, Word* to) {
    for (long half = 0; half < 2 * strips; half++)
      pack_half(o + 16 * half, to + half / 2 * strip * words + 16 * (half % 2));
  };
  const auto prefetch = [](long, long, const Panel*, long, long) { return Prefetch{}; };
  gemm(phase, x, N, words, O, all, 1, large_panel, pack, prefetch, scales, row_scales, y);
}

}  // namespace
