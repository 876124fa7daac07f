// Products of many rows, x [N, I] with W: sums of a tile of 16 rows by 16 outputs stay in registers; x is packed in
// tiles, W in panels.
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

// sums += a b, for rows of a and `vectors` times 16 columns of b, over `count` words.
template <int per_word, int vectors, int rows = tile_rows>
inline __attribute__((always_inline)) void add_tile(const Word* a, long a_row, const Word* b, long b_row, long count,
                                                    float* sums, long sums_row) {
  if constexpr (2 * rows * vectors > vectors_in_registers) {  // in two halves
    constexpr int own = vectors > 1 ? rows : rows / 2, columns = (vectors + 1) / 2, next = vectors > 1 ? 16 : 0;
    add_tile<per_word, columns, own>(a, a_row, b, b_row, count, sums, sums_row);
    return add_tile<per_word, columns, own>(a + (rows - own) * a_row, a_row, b + next, b_row, count,
                                            sums + (rows - own) * sums_row + next, sums_row);
  }
  f32x16 registers[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) registers[r][j] = load<f32x16>(sums + r * sums_row + 16 * j);
  for (long i = 0; i < count; i++) {
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
  for (long i = first * per_word; i < (first + count) * per_word; i += blocks * F::inputs) {
    const long block = i / F::inputs;
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

constexpr int packed_rows = 16;

// x [N, count] in words: in tiles of 16 rows, [tiles, count, 16], with zeros behind the last row; for AMX as it is, and
// the last tile overlaps the one before.
struct Rows {
  const Word* words;
  long N, count;
  bool by_amx;

  // The first row of a tile of so many.
  long first_of(long tile, long most) const {
    const long first = tile * most;
    if (!by_amx || N - first >= most) return first;
    return N - (N - first > amx_rows ? most : amx_rows);
  }
  // Where a tile that begins with this row has this word.
  const Word* at(long first, long word) const { return words + first * count + word * (by_amx ? 1 : packed_rows); }
};

template <class X>
Rows pack_rows(Team& team, const Word* x, long N, long count, bool is_invariant = false) {
  if (numbers_per_word<X> == 2 && uses_amx(N) && !is_invariant) return {x, N, count, true};
  const long tiles = (N + packed_rows - 1) / packed_rows;
  Word* packed = team.memory<Word>(tiles * count * packed_rows);
  team.for_each(tiles, count * packed_rows, [=](long tile) {
    const long first = tile * packed_rows, rows = std::min(N - first, long(packed_rows));
    const Word* from = x + first * count;
    Word* to = packed + first * count;
    long k = 0;
    for (; k + 16 <= count; k += 16) {
      u32x16 words[16] = {};
      for (long r = 0; r < rows; r++) words[r] = load<u32x16>(from + r * count + k);
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) store(to + (k + i) * packed_rows, words[i]);
    }
    for (; k < count; k++)
      for (long r = 0; r < packed_rows; r++) to[k * packed_rows + r] = r < rows ? from[r * count + k] : 0;
  });
  return {packed, N, count, false};
}

// Rows of memory to prefetch, `lines` lines of each, so many at a time.
struct Prefetch {
  const char* row = nullptr;
  long stride = 0, lines = 0, rows = 0, at_once = 0, line = 0;

  // All of it in so many steps.
  void spread(long steps) { at_once = (rows * lines + steps - 1) / steps; }
  INLINE void step() {
    for (long k = 0; k < at_once && rows; k++) {
      __builtin_prefetch(row + 64 * line, 0, 2);
      if (++line == lines) line = 0, row += stride, rows--;
    }
  }
};

constexpr int unrolled_words = 4;

// sums [rows, 16 of 32] = a b, or are added to, for the first rows of a packed tile and 16 columns of a strip. A number
// of a is used once, from memory: with its product it is one instruction, so the front end of a core suffices even
// where it is shared with another process.
template <int per_word, int rows>
INLINE void add_columns(const Word* a, const Word* b, long count, bool is_first, float* sums, Prefetch& ahead) {
  constexpr int most = vectors_in_registers > 16 ? packed_rows : 6, parts = (rows + most - 1) / most;
  if constexpr (parts > 1) {
    constexpr int own = (rows + parts - 1) / parts;
    add_columns<per_word, own>(a, b, count, is_first, sums, ahead);
    return add_columns<per_word, rows - own>(a + own, b, count, is_first, sums + own * strip, ahead);
  }
  f32x16 registers[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) registers[r] = is_first ? f32x16{} : load<f32x16>(sums + r * strip);
  const auto add = [&](long i) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
      registers[r] = multiply_add_words<per_word>(registers[r], a[i * packed_rows + r], b + i * strip);
  };
  long i = 0;
  for (; i + unrolled_words <= count; i += unrolled_words) {
    ahead.step();
#pragma GCC unroll 4
    for (int k = 0; k < unrolled_words; k++) add(i + k);
  }
  for (; i < count; i++) add(i);
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) store(sums + r * strip, registers[r]);
}

// The same for 32 columns, and for any number of rows, in fours.
template <int per_word, int most = 4>
void add_packed(const Word* a, long rows, const Word* b, long count, bool is_first, float* sums, Prefetch& ahead) {
  if constexpr (most < packed_rows)
    if (rows > most) return add_packed<per_word, most + 4>(a, rows, b, count, is_first, sums, ahead);
  Prefetch own = ahead;  // in registers
  for (int column = 0; column < strip; column += 16)
    add_columns<per_word, most>(a, b + column, count, is_first, sums + column, own);
  ahead = own;
}

// sums [rows, 32] = a b by AMX, or are added to, for 16 or 32 rows of pairs; words behind the last whole tile go as
// without it.
inline void add_by_amx(const Word* a, long a_row, const Word* b, long count, bool is_first, long rows, float* sums,
                       Prefetch& ahead) {
  for (long i = 0; i < count / unrolled_words * (strip / 16); i++) ahead.step();
  if (is_first) std::fill(sums, sums + rows * strip, 0.f);
  const long whole = count / 16 * 16;
  amx->add_pairs(a, a_row, b, whole, rows, sums);
  for (long r = 0; r < rows && whole < count; r += tile_rows)
    add_tile<2, 2>(a + r * a_row + whole, a_row, b + whole * strip, strip, count - whole, sums + r * strip, strip);
}

// Words along the inputs that are packed at once. Sums of a part of the inputs are added to those of the others.
struct Panel {
  long begin, count;
  bool begins_part, ends_part, ends_first_part;
};

// y [rows, O] from output o on, 32 of them.
template <class X>
void store_tile(const float* sums, long rows, long o, Scales scales, const float* row_scales, long O, X* y) {
  for (int j = 0; j < strip; j += 16) {
    const f32x16 factors = scales ? scales.load(o + j) : f32x16{} + 1;
    for (long r = 0; r < rows; r++)
      store_floats(y + r * O + o + j,
                   load<f32x16>(sums + r * strip + j) * (factors * (row_scales ? row_scales[r] : 1)));
  }
}

// What is packed at once, as words along the inputs and bytes: with the tiles of x that meet it, it lies in the cache
// of a core. Rows of W [I, O] come from distant places, so less of them; with few rows of x, which use a panel for a
// short time, so much as lies in the nearest cache.
constexpr long panel_words = 512, panel_bytes = 256 << 10, block_bytes = 512 << 10;
constexpr long in_out_words = 256, in_out_bytes = 128 << 10;
constexpr long short_words = 128, short_bytes = 32 << 10;

// y = x W. W comes in panels, by as many strips as `bytes` hold: pack(o, strips, panel, to) packs a panel from output o
// on, which is in the memory that prefetch(o, strips, panel) names. Outputs and rows may have scales.
template <class X, class Pack, class PrefetchOf>
void gemm(Phase& phase, const Rows& x, long O, const Panel* panels, long num_panels, long bytes, const Pack& pack,
          const PrefetchOf& prefetch, Scales scales, const float* row_scales, X* y) {
  constexpr int per_word = numbers_per_word<X>;
  const long most = !x.by_amx ? packed_rows : x.N < 2 * amx_rows ? amx_rows : 2 * amx_rows;
  const long strips = O / strip, tiles = (x.N + most - 1) / most, tile_size = most * strip;
  const auto is_shorter = [](const Panel& a, const Panel& b) { return a.count < b.count; };
  const long depth = std::max_element(panels, panels + num_panels, is_shorter)->count;
  const long width = std::max(1l, std::min(bytes / (depth * strip * 4), strips / phase.team.size()));
  const long block = std::max(1l, block_bytes / (depth * most * 4));  // of tiles
  phase.add((strips + width - 1) / width, width * strip * x.count * per_word, [=](long task) {
    const long begin = task * width, count = std::min(width, strips - begin), size = count * tiles * tile_size;
    const AmxScope scope(x.by_amx, 16);
    Word* w = scratch<Word, Use::panel>(count * depth * strip);
    float *sums = scratch<float, Use::sums>(2 * size), *totals = sums + size;
    for (const Panel* panel = panels; panel != panels + num_panels; panel++) {
      const bool is_last = panel + 1 == panels + num_panels;
      pack(begin * strip, count, *panel, w);
      Prefetch ahead;
      if (const long next = is_last ? begin + width : begin; next < strips) {
        ahead = prefetch(next * strip, width, is_last ? *panels : panel[1]);
        ahead.spread(count * tiles * strip / 16 * std::max(panel->count / unrolled_words, 1l));
      }
      const auto multiply_tile = [&](long n, long tile) {
        const long first = x.first_of(tile, most), rows = std::min(x.N - first, most);
        const long at = (n * tiles + tile) * tile_size;
        const Word* b = w + n * panel->count * strip;
        if (x.by_amx)
          add_by_amx(x.at(first, panel->begin), x.count, b, panel->count, panel->begins_part, rows, sums + at, ahead);
        else
          add_packed<per_word>(x.at(first, panel->begin), rows, b, panel->count, panel->begins_part, sums + at, ahead);
        for (long i = at; i < at + rows * strip && panel->ends_part; i += 16) {
          const f32x16 own = load<f32x16>(sums + i);
          store(totals + i, panel->ends_first_part ? own : load<f32x16>(totals + i) + own);
        }
        if (is_last)
          store_tile(totals + at, rows, (begin + n) * strip, scales, row_scales ? row_scales + first : nullptr, O,
                     y + first * O);
      };
      for (long first = 0; first < tiles; first += block)
        for (long n = 0; n < count; n++)
          for (long tile = first; tile < std::min(tiles, first + block); tile++) multiply_tile(n, tile);
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
  const long parts = parts_of(I), longest = (is_short ? short_words : in_out_words) / F::together;
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
      panels[num_panels++] = {k, std::min(longest, words - k), k == begin, k + longest >= words, !part};
  }
  Word* of_x = phase.team.memory<Word>(N * words);
  phase.team.for_each(N, words, [=](long n) {
    for (long k = 0; k < words; k++) {
      const X *own = x + n * I,
              second = F::together == 2 && inputs[k].first == inputs[k].second ? X(0) : own[inputs[k].second];
      of_x[n * words + k] = __builtin_bit_cast(Word, F::factor(own[inputs[k].first], second));
    }
  });
  const auto pack = [=](long o, long strips, const Panel& panel, Word* to) {
    for (long i = 0; i < panel.count; i++) {
      const Inputs& own = inputs[panel.begin + i];
      pack_row(w + own.first * O + o, w + own.second * O + o, strips, panel.count, to + i * strip);
    }
  };
  const auto prefetch = [=](long o, long strips, const Panel& panel) {
    // W need not begin with a line of the cache; the end of 64 bytes is in the line that is not there yet.
    const char* row = (const char*)(w + inputs[panel.begin].first * O + o) + 63;
    return Prefetch{row, O * long(sizeof(X)), strips * strip * long(sizeof(X)) / 64, panel.count * F::together};
  };
  const Rows rows = pack_rows<X>(phase.team, of_x, N, words, is_invariant);
  gemm(phase, rows, O, panels, num_panels, is_short ? short_bytes : in_out_bytes, pack, prefetch, Scales{}, nullptr, y);
}

// y = x W^T for W [O, I], of which pack_half(o, first, count, to) packs half a strip of so many words from one on.
template <class X, class PackHalf>
void gemm_out_in(Phase& phase, const Rows& x, long O, const PackHalf& pack_half, Scales scales, const float* row_scales,
                 X* y) {
  const long num_panels = (x.count + panel_words - 1) / panel_words;
  Panel* panels = phase.team.memory<Panel>(num_panels);
  for (long i = 0; i < num_panels; i++) {
    const long begin = i * panel_words;
    const bool is_last = i + 1 == num_panels;
    panels[i] = {begin, std::min(panel_words, x.count - begin), i == 0, is_last, is_last};
  }
  const auto pack = [=](long o, long strips, const Panel& panel, Word* to) {
    for (long half = 0; half < 2 * strips; half++)
      pack_half(o + 16 * half, panel.begin, panel.count, to + half / 2 * strip * panel.count + 16 * (half % 2));
  };
  const auto prefetch = [](long, long, const Panel&) { return Prefetch{}; };
  gemm(phase, x, O, panels, num_panels, panel_bytes, pack, prefetch, scales, row_scales, y);
}

}  // namespace
