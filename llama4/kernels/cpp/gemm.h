// Products of many rows, x [N, I] with W: sums of a tile of up to 24 rows by 16 outputs stay in registers; x is packed
// in tiles, W in panels.

#pragma once

#include "gemm_pack.h"
#include "gemv_in_out.h"

namespace {

// ---- tiles

template <int per_word>
f32x16 multiply_add_words(f32x16 sums, Word a, u32x16 b) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) return multiply_add(sums, bf16x32{_mm512_set1_epi32(a)}, bf16x32{(__m512i)b});
#endif
  return sums + __builtin_bit_cast(float, a) * (f32x16)b;
}

constexpr int tile_rows = 8;

// sums += a b, for rows of a and `vectors` times 16 columns of b, over `count` words, whose products are one sum.
template <int per_word, int vectors, int rows = tile_rows>
inline __attribute__((always_inline)) void add_tile(const Word* a, long a_row, const Word* b, long b_row, long count,
                                                    float* sums, long sums_row) {
  if constexpr (2 * rows * vectors > vectors_in_registers) {  // in two halves
    constexpr int own = vectors > 1 ? rows : rows / 2, columns = (vectors + 1) / 2, next = vectors > 1 ? 16 : 0;
    add_tile<per_word, columns, own>(a, a_row, b, b_row, count, sums, sums_row);
    return add_tile<per_word, columns, own>(a + (rows - own) * a_row, a_row, b + next, b_row, count,
                                            sums + (rows - own) * sums_row + next, sums_row);
  }
  f32x16 registers[rows][vectors] = {};
  for (long i = 0; i < count; i++) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++)
        registers[r][j] =
            multiply_add_words<per_word>(registers[r][j], a[r * a_row + i], load<u32x16>(b + i * b_row + 16 * j));
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) {
      float* to = sums + r * sums_row + 16 * j;
      store(to, load<f32x16>(to) + registers[r][j]);
    }
}

// The same for n columns, a multiple of 16, and any number of words.
template <int per_word>
void add_tiles(const Word* a, long a_row, const Word* b, long b_row, long count, float* sums, long sums_row, long n) {
  constexpr long longest = per_word == 1 ? 32 : 256;  // sums of pairs, which are rounded already, need not be short
  for (long j = 0; j < n; j += 32)
    for (long i = 0; i < count; i += longest) {
      const long own = std::min(longest, count - i);
      if (j + 16 < n) add_tile<per_word, 2>(a + i, a_row, b + i * b_row + j, b_row, own, sums + j, sums_row);
      else add_tile<per_word, 1>(a + i, a_row, b + i * b_row + j, b_row, own, sums + j, sums_row);
    }
}

// ---- the product

// The inputs of a word: two of them, or the same one twice.
struct WordInputs {
  long first, second;
};

// Lines of the cache to prefetch, so many at a time: of W's rows for a panel's words, in the order in which they are
// packed. A core waits for few lines at once, so they are spread over all the time that there is.
struct Prefetch {
  const char* w = nullptr;
  long row_bytes = 0, lines = 0;  // of a row that are wanted
  const WordInputs* inputs = nullptr;
  long words = 0, rows_of_word = 1, at_once = 0, line = 0;

  // All of it in so many steps.
  void spread(long steps) { at_once = (words * rows_of_word * lines + steps - 1) / steps; }
  INLINE void step() {
    for (long k = 0; k < at_once && words; k++) {
      const bool is_second = line >= lines;
      const long row = is_second ? inputs->second : inputs->first;
      __builtin_prefetch(w + row * row_bytes + 64 * (is_second ? line - lines : line), 0, 2);
      if (++line == rows_of_word * lines) line = 0, inputs++, words--;
    }
  }
};

constexpr int unrolled_words = 4;

// How often a tile goes through the words of a panel: as often as its sums, of rows by 16 times `vectors` outputs, fill
// the registers.
constexpr int passes(int rows, int vectors) { return (rows * vectors + rows_in_registers - 1) / rows_in_registers; }

// Columns of a panel, as words along the inputs: 16 of word i, from a column on.
struct PanelColumns {
  const Word* words;
  u32x16 read(long i, long column) const { return load<u32x16>(words + i * strip + column); }
  PanelColumns from(long i) const { return {words + i * strip}; }
  PanelColumns packed() const { return *this; }
};

// sums [rows, 16 vectors of 32] += a b, for rows of a tile and columns of a strip. The products are a sum of their own,
// which is added to what is there, or go on with that. With one vector a number of a is used once, from memory: with
// its product it is one instruction, so the front end of a core suffices even where it is shared with another process.
template <int per_word, int rows, int a_row, int vectors, class Columns>
INLINE void add_columns(const Word* a, const Columns& b, long count, bool goes_on, float* sums, Prefetch& ahead) {
  if constexpr (constexpr int parts = passes(rows, vectors); parts > 1) {
    constexpr int own = (rows + parts - 1) / parts;
    add_columns<per_word, own, a_row, vectors>(a, b, count, goes_on, sums, ahead);
    return add_columns<per_word, rows - own, a_row, vectors>(a + own, b.packed(), count, goes_on, sums + own * strip,
                                                             ahead);
  }
  f32x16 registers[rows][vectors];
#pragma GCC unroll 24
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) registers[r][j] = goes_on ? load<f32x16>(sums + r * strip + 16 * j) : f32x16{};
  const auto add = [&](long i) {
    u32x16 words[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) words[j] = b.read(i, 16 * j);
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++)
        registers[r][j] = multiply_add_words<per_word>(registers[r][j], a[i * a_row + r], words[j]);
  };
  long i = 0;
  for (; i + unrolled_words <= count; i += unrolled_words) {
    ahead.step();
#pragma GCC unroll 4
    for (int k = 0; k < unrolled_words; k++) add(i + k);
  }
  for (; i < count; i++) add(i);
#pragma GCC unroll 24
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) {
      float* to = sums + r * strip + 16 * j;
      store(to, goes_on ? registers[r][j] : load<f32x16>(to) + registers[r][j]);
    }
}

// The same for 32 columns and all rows of a tile, `at_once` words of them, and then the next.
template <int per_word, int rows = least_height, class Columns>
void add_packed(const Word* a, long height, const Columns& b, long count, long at_once, bool goes_on, float* sums,
                Prefetch& ahead) {
  if constexpr (rows < most_height)
    if (height > rows) return add_packed<per_word, rows + 2>(a, height, b, count, at_once, goes_on, sums, ahead);
  constexpr int a_row = packed_rows(rows);
  Prefetch own = ahead;  // in registers
  for (long i = 0; i < count; i += at_once) {
    const long n = std::min(at_once, count - i);
    const Columns columns = b.from(i);
    if constexpr (std::is_same_v<Columns, PanelColumns>) {
      for (int column = 0; column < strip; column += 16)
        add_columns<per_word, rows, a_row, 1>(a + i * a_row, PanelColumns{columns.words + column}, n, goes_on,
                                              sums + column, own);
    } else {
      add_columns<per_word, rows, a_row, 2>(a + i * a_row, columns, n, goes_on, sums, own);
    }
  }
  ahead = own;
}

// sums [rows, 32] += a b by AMX, for 16 or 32 rows of pairs; words behind the last whole tile go as without it.
inline void add_by_amx(const Word* a, long a_row, const Word* b, long count, long rows, float* sums, Prefetch& ahead) {
  for (long i = 0; i < count / unrolled_words * (strip / 16); i++) ahead.step();
  const long whole = count / 16 * 16;
  amx->add_pairs(a, a_row, b, whole, rows, sums);
  for (long r = 0; r < rows && whole < count; r += tile_rows)
    add_tile<2, 2>(a + r * a_row + whole, a_row, b + whole * strip, strip, count - whole, sums + r * strip, strip);
}

// Words along the inputs that are packed at once, of a part of the inputs, whose sums are added to the other parts'.
struct Panel {
  long begin, count, part;
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

// Words that are packed at once, and strips that a task has of them. With the tiles of x that meet them, what is packed
// lies in the cache of a core.
constexpr long panel_words = 512, panel_strips = 4, block_bytes = 512 << 10;
// Words of these that a tile meets before it turns to other columns: so many of its own lie in the nearest cache.
constexpr long tile_words = 256;
static_assert(panel_words % 256 == 0);  // whole steps of every format, however many numbers a word has
// Rows of W [I, O] come from distant places, so less of them.
constexpr long in_out_words = 256;
// With few rows of x memory is what takes time: it is read fastest by long pieces of few rows of W, though sums must
// wait in the cache for the next ones.
constexpr long few_rows = 192, few_words = 64, most_strips = 32, sums_bytes = 128 << 10;
static_assert(in_out_words % inputs_per_sum == 0 && few_words % inputs_per_sum == 0);

// y = x W. W comes in panels, of up to `most` strips: weights.pack(o, panel, to) packs a strip of a panel, outputs o to
// o + 31; weights.prefetch(o, strips, panel) names the memory that it is in. Or weights.columns(o, panel, to) is a
// strip that is packed as it is read, by the first tile, whose products do not wait for memory. Outputs and rows may
// have scales.
template <class X, class Weights>
void gemm(Phase& phase, const PackedInputs& x, long O, const Panel* panels, long num_panels, long most,
          const Weights& weights, Scales scales, const float* row_scales, X* y) {
  constexpr int per_word = numbers_per_word<X>;
  constexpr bool has_columns = requires { weights.columns(0l, *panels, nullptr); };
  const long strips = O / strip, tiles = x.tiles, tile_size = x.height * strip;
  const auto is_shorter = [](const Panel& a, const Panel& b) { return a.count < b.count; };
  const long depth = std::max_element(panels, panels + num_panels, is_shorter)->count;
  const long width = std::max(1l, std::min(most, strips / phase.team.size()));
  const long block = std::max(1l, block_bytes / (depth * x.height * 4));  // of tiles
  phase.add((strips + width - 1) / width, x.N * width * strip * x.count * per_word, [=](long task) {
    const long begin = task * width, count = std::min(width, strips - begin), size = count * tiles * tile_size;
    const bool is_kept = tiles > block;  // what is packed, for the next block
    const AmxScope scope(x.by_amx, 16);
    Word* w = scratch<Word, Use::panel>((is_kept ? count : 1) * depth * strip);
    const bool has_parts = panels[num_panels - 1].part > 0;
    float *sums = scratch<float, Use::sums>((1 + has_parts) * size), *totals = has_parts ? sums + size : sums;
    long steps = 0;  // of prefetching, for so many words of a strip
    for (long tile = 0; tile < tiles; tile++)
      steps += x.by_amx                   ? strip / 16
               : has_columns && tile == 0 ? passes(x.rows_of(tile), 2)
                                          : 2 * passes(x.rows_of(tile), 1);
    for (const Panel* panel = panels; panel != panels + num_panels; panel++) {
      const bool is_last = panel + 1 == panels + num_panels;
      const bool begins_part = panel == panels || panel[-1].part != panel->part;
      const bool ends_part = is_last || panel[1].part != panel->part;
      Prefetch ahead;
      if (const long next = is_last ? begin + width : begin; next < strips) {
        ahead = weights.prefetch(next * strip, std::min(width, strips - next), is_last ? *panels : panel[1]);
        ahead.spread(count * steps * std::max(panel->count / unrolled_words, 1l));
      }
      const auto multiply_tile = [&](long n, long tile, Word* b) {
        const long first = x.first_of(tile), rows = x.rows_of(tile), o = (begin + n) * strip;
        const long at = (n * tiles + tile) * tile_size;
        const Word* a = x.at(tile, panel->begin);
        const auto add = [&](const auto& columns) {
          constexpr long at_once = adds_sums<X> ? inputs_per_sum : tile_words;
          add_packed<per_word>(a, rows, columns, panel->count, at_once, !adds_sums<X>, sums + at, ahead);
        };
        if (begins_part) std::fill(sums + at, sums + at + tile_size, 0.f);
        if (x.by_amx) {
          add_by_amx(a, x.count, b, panel->count, rows, sums + at, ahead);
        } else if (has_columns && tile == 0) {
          if constexpr (has_columns) add(weights.columns(o, *panel, b));
        } else {
          add(PanelColumns{b});
        }
        for (long i = at; has_parts && ends_part && i < at + rows * strip; i += 16) {
          const f32x16 own = load<f32x16>(sums + i);
          store(totals + i, panel->part ? load<f32x16>(totals + i) + own : own);
        }
        if (is_last)
          store_tile(totals + at, rows, o, scales, row_scales ? row_scales + first : nullptr, O, y + first * O);
      };
      for (long first = 0; first < tiles; first += block)
        for (long n = 0; n < count; n++) {
          Word* b = w + (is_kept ? n * panel->count * strip : 0);
          if (first == 0 && (!has_columns || x.by_amx)) weights.pack((begin + n) * strip, *panel, b);
          for (long tile = first; tile < std::min(tiles, first + block); tile++) multiply_tile(n, tile, b);
        }
    }
  });
}

// W [I, O], and the inputs of its words.
template <class X>
struct WeightRows {
  const X* w;
  long O;
  const WordInputs* inputs;

  struct Columns {
    const X* w;
    long O;
    const WordInputs* inputs;
    Word* to;
    u32x16 read(long i, long column) const {
      const u32x16 words = words_of_rows(w + inputs[i].first * O + column, w + inputs[i].second * O + column);
      store(to + i * strip + column, words);
      return words;
    }
    Columns from(long i) const { return {w, O, inputs + i, to + i * strip}; }
    PanelColumns packed() const { return {to}; }
  };
  Columns columns(long o, const Panel& panel, Word* to) const { return {w + o, O, inputs + panel.begin, to}; }

  void pack(long o, const Panel& panel, Word* to) const {
    for (long i = 0; i < panel.count; i++)
      for (long column = 0; column < strip; column += 16) columns(o, panel, to).read(i, column);
  }
  Prefetch prefetch(long o, long strips, const Panel& panel) const {
    // W need not begin with a line of the cache; the end of 64 bytes is in the line that is not there yet.
    constexpr long bytes = sizeof(X);
    const char* from = (const char*)(w + o) + 63;
    return {from, O * bytes, strips * strip * bytes / 64, inputs + panel.begin, panel.count, RowsOf<X>::together};
  }
};

// y = x W for W [I, O], in the order of gemv_in_out, if that is asked for or AMX is not there.
template <class X>
void gemm_in_out(Phase& phase, const X* x, long N, long I, long O, const X* w, X* y, bool is_invariant) {
  using F = RowsOf<X>;
  const bool by_amx = goes_by_amx<X>(N, is_invariant), has_few = N < few_rows && !by_amx;
  const long parts = parts_of(I), longest = (has_few ? few_words : in_out_words) / F::together;
  WordInputs* inputs = phase.team.memory<WordInputs>(I);
  Panel* panels = phase.team.memory<Panel>(I / longest + parts);
  long words = 0, num_panels = 0;
  for (long part = 0; part < parts; part++) {
    const long begin = words;
    for_each_eight(part * I / parts, (part + 1) * I / parts, [&](auto count, long first, long run) {
      for (long k = 0; k < count; k += F::together)
        inputs[words++] = {first + k * run, first + (count == 1 ? 0 : k + F::together - 1) * run};
    });
    for (long k = begin; k < words; k += longest) panels[num_panels++] = {k, std::min(longest, words - k), part};
  }
  const auto read = [=](long n, long k, long count) {
    Word own[16] = {};
    for (long i = 0; i < count; i++) {
      const auto [first, second] = inputs[k + i];
      const X other = F::together == 2 && first == second ? X(0) : x[n * I + second];
      own[i] = __builtin_bit_cast(Word, F::factor(x[n * I + first], other));
    }
    return load<u32x16>(own);
  };
  const PackedInputs packed = pack_inputs(phase, N, words, by_amx, read);
  const long strips = has_few ? std::min(most_strips, sums_bytes / (N * strip * 4)) : panel_strips;
  gemm(phase, packed, O, panels, num_panels, strips, WeightRows<X>{w, O, inputs}, Scales{}, nullptr, y);
}

template <class PackHalf>
struct WeightColumns {
  PackHalf pack_half;
  void pack(long o, const Panel& panel, Word* to) const {
    for (long column = 0; column < strip; column += 16) pack_half(o + column, panel.begin, panel.count, to + column);
  }
  Prefetch prefetch(long, long, const Panel&) const { return {}; }
};

// y = x W^T for W [O, I], of which pack_half(o, first, count, to) packs half a strip of so many words from one on.
template <class X, class PackHalf>
void gemm_out_in(Phase& phase, const PackedInputs& x, long O, const PackHalf& pack_half, Scales scales,
                 const float* row_scales, X* y) {
  const long num_panels = (x.count + panel_words - 1) / panel_words;
  Panel* panels = phase.team.memory<Panel>(num_panels);
  for (long i = 0; i < num_panels; i++)
    panels[i] = {i * panel_words, std::min(panel_words, x.count - i * panel_words), 0};
  gemm(phase, x, O, panels, num_panels, panel_strips, WeightColumns<PackHalf>{pack_half}, scales, row_scales, y);
}

}  // namespace
