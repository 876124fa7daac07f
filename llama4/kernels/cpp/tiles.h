// Products of many rows, tile by tile: sums of eight rows and 32 columns stay in registers.

#pragma once

#include "products.h"

namespace {

// What goes into a product is words of 32 bits: a float, or, where the machine multiplies them so, two bfloat16 whose
// products go to one sum.
using Word = uint32_t;
template <class X>
constexpr int numbers_per_word =
#ifdef __AVX512BF16__
    std::is_same_v<X, bf16> ? 2 : 1;
#else
    1;
#endif

template <int per_word>
f32 add_product(f32 sums, Word a, const Word* b) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) return multiply_add(sums, bf16s{_mm512_set1_epi32(a)}, bf16s{_mm512_loadu_si512(b)});
#endif
  return sums + __builtin_bit_cast(float, a) * load<f32>(b);
}

constexpr int rows_at_once = 8;

// Memory to be brought near while something else is computed: lines of a matrix in x out, so many from each word to the
// next, each `row` bytes behind the last.
struct Ahead {
  const char* line = nullptr;
  long row = 0, each = 0;
};

// Adds a b to sums: rows of a, columns of sixteen words of b, of which `wide` are in registers together.
template <int per_word, int wide, int rows = rows_at_once>
inline __attribute__((always_inline)) void add_tile(const Word* a, long a_row, const Word* b, long b_row, long count,
                                                    float* sums, long sums_row, Ahead ahead = {}) {
  f32 held[rows][wide];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < wide; j++) held[r][j] = load<f32>(sums + r * sums_row + 16 * j);
  for (long i = 0; i < count; i++) {
    for (long k = 0; k < ahead.each; k++) __builtin_prefetch(ahead.line + (i * ahead.each + k) * ahead.row, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
      for (int j = 0; j < wide; j++)
        held[r][j] = add_product<per_word>(held[r][j], a[r * a_row + i], b + i * b_row + 16 * j);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < wide; j++) store(sums + r * sums_row + 16 * j, held[r][j]);
}

template <int per_word>
void add_tiles(const Word* a, long a_row, const Word* b, long b_row, long count, float* sums, long sums_row, long n) {
  for (long j = 0; j < n; j += 32)
    if (j + 16 < n)
      add_tile<per_word, 2>(a, a_row, b + j, b_row, count, sums + j, sums_row);
    else
      add_tile<per_word, 1>(a, a_row, b + j, b_row, count, sums + j, sums_row);
}

// A strip of a matrix: 32 outputs, [I, 32] in words along the inputs.
constexpr long strip = 32;

// One row of words of several strips, from one row of a matrix in x out, or two.
template <class X>
void pack_rows(const X* row, long O, long strips, long words, Word* to) {
  for (long n = 0; n < strips; n++, row += strip, to += words * strip) {
#ifdef __AVX512BF16__
    if constexpr (numbers_per_word<X> == 2) {
      using u16 = uint16_t __attribute__((vector_size(64), aligned(2), may_alias));
      u16 a = load<u16>(row), b = load<u16>(row + O);
      store(to, __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
      store(to + 16, __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56,
                                             25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
      continue;
    }
#endif
    store(to, floats(row)), store(to + 16, floats(row + 16));
  }
}

template <int per_word>
u32 words_of(const f32* planes) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) return (u32)_mm512_cvtne2ps_pbh((__m512)planes[1], (__m512)planes[0]);
#endif
  return (u32)planes[0];
}

// Words of the first and the second number of each of two planes, of the third, ... where words held neighbours.
template <int per_word>
u32 side_by_side(u32 words) {
#ifdef __AVX512BF16__
  if constexpr (per_word == 2) {
    using u16 = uint16_t __attribute__((vector_size(64)));
    u16 v = (u16)words;
    return (u32)__builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                        26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
#endif
  return words;
}

// Half a strip from a matrix in out x in, outputs o to o + 15. The inputs come in the order of the planes.
template <class X, class F>
void pack_outputs(const F& f, long o, Word* to) {
  constexpr int blocks = F::planes == 1 ? 2 : 1, planes = blocks * F::planes, per_word = numbers_per_word<X>;
  f32 w[16][planes];
  for (long block = 0; block < f.I / F::inputs; block += blocks) {
    for (int i = 0; i < 16; i++) {
      for (int b = 0; b < blocks; b++) f.read(o + i, block + b, w[i] + b);
      if constexpr (F::grouped) {
        f32 scale = f.scale(o + i, block);
        for (int plane = 0; plane < planes; plane++) w[i][plane] *= scale;
      }
    }
    for (int plane = 0; plane < planes; plane += per_word, to += 16 * strip) {
      u32 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) rows[i] = words_of<per_word>(w[i] + plane);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) store(to + i * strip, rows[i]);
    }
  }
}

constexpr long large_panel = 256 << 10, small_panel = 32 << 10;

// y = x W for at least eight rows of x, in words. W comes in panels of `depth` words by so many strips as `bytes` hold:
// pack(o, strips, k, depth, to) fills one from output o and word k on, and next(o, strips, k, tile, tiles) says what of
// one to bring near during a tile of the panel before. Outputs and rows may be multiplied by scales.
template <class X, class Pack, class Next>
void many(const Word* x, long M, long I, long O, long depth, long bytes, const Pack& pack, const Next& next,
          Scales scales, const float* row_scales, X* y) {
  constexpr int per_word = numbers_per_word<X>, most = rows_at_once, half = most / 2;
  const long words = I / per_word, strips = O / strip, tiles = (M + most - 1) / most;
  const long at_once = std::max(1l, std::min(bytes / (depth * strip * 4), strips / omp_get_max_threads()));
#pragma omp parallel for schedule(static)
  for (long begin = 0; begin < strips; begin += at_once) {
    const long count = std::min(at_once, strips - begin);
    Word* w = scratch<Word, 10>(count * depth * strip);
    float* sums = scratch<float, 11>(count * tiles * most * strip);
    std::fill(sums, sums + count * tiles * most * strip, 0.f);
    for (long k = 0; k < words; k += depth) {
      const long deep = std::min(depth, words - k), after = k + depth < words ? begin : begin + at_once;
      pack(begin * strip, count, k, deep, w);
      for (long n = 0; n < count; n++) {
        const long o = (begin + n) * strip;
        f32 factors[2] = {f32{} + 1, f32{} + 1};
        for (int j = 0; j < strip && scales; j++) factors[j / 16][j % 16] = scales[o + j];
        const auto add = [&](auto rows, long first, long tile) {
          float* own = sums + (n * tiles + tile) * most * strip;
          add_tile<per_word, 2, rows>(
              x + first * words + k, words, w + n * deep * strip, strip, deep, own, strip,
              after < strips ? next(after * strip, at_once, after > begin ? 0 : k + depth, n * tiles + tile, count * tiles)
                             : Ahead{});
          for (long r = 0; r < rows && k + depth >= words; r++)
            for (int j = 0; j < 2; j++) {
              const float factor = row_scales ? row_scales[first + r] : 1;
              keep(y + (first + r) * O + o + 16 * j, load<f32>(own + r * strip + 16 * j) * (factors[j] * factor));
            }
        };
        for (long tile = 0; tile < tiles; tile++)  // the last may overlap the one before: each has sums of its own
          if (M - tile * most <= half)
            add(std::integral_constant<int, half>(), M - half, tile);
          else
            add(std::integral_constant<int, most>(), std::min(tile * most, M - most), tile);
      }
    }
  }
}

template <class X>
using Number = std::conditional_t<numbers_per_word<X> == 2, bf16, float>;

// Rows in words, in the order in which a format's planes have the inputs.
template <class F, class X>
const Word* in_words(const X* x, long count) {
  if (F::planes == 1 && std::is_same_v<X, Number<X>>) return (const Word*)x;
  Number<X>* to = scratch<Number<X>, 12>(count);
  constexpr int lanes = F::inputs / F::planes;
#pragma omp parallel for schedule(static)
  for (long from = 0; from < count; from += F::inputs)
    for (int plane = 0; plane < F::planes; plane++)
      for (int lane = 0; lane < lanes; lane++)
        assign(to[from + plane * lanes + lane], widened(x[from + F::place(plane, lane)]));
  return (const Word*)to;
}

// With few rows a panel is used few times, and is best where it is nearest; with many, sums that leave registers cost more.
template <class X>
void project_many(const X* x, long M, long I, long O, const X* w, X* y) {
  constexpr int per_word = numbers_per_word<X>;
  const bool is_short = M < 192;
  const long words = I / per_word, depth = is_short ? std::min(words, 128l / per_word) : words;
  const auto pack = [&](long o, long strips, long k, long deep, Word* to) {
    for (long i = 0; i < deep; i++) pack_rows(w + (k + i) * per_word * O + o, O, strips, deep, to + i * strip);
  };
  const auto next = [&](long o, long strips, long k, long tile, long tiles) {  // spread over the tiles
    const long rows = depth * per_word, lines = strips * strip * long(sizeof(X)) / 64;
    const long each = std::min(long(per_word), (lines * rows + tiles * depth - 1) / (tiles * depth));
    const long first = tile * depth * each;
    // A matrix in a file need not begin with a line of the cache: 64 bytes end in the line that is not there yet.
    const char* line = (const char*)(w + (k * per_word + first % rows) * O + o) + first / rows * 64 + 63;
    return first / rows < lines ? Ahead{line, O * long(sizeof(X)), each} : Ahead{};
  };
  many(in_words<Float32>(x, M * I), M, I, O, depth, is_short ? small_panel : large_panel, pack, next, Scales{}, nullptr, y);
}

template <class F, class X>
void linear_many(const F& f, const Word* x, long M, long O, Scales scales, const float* row_scales, X* y) {
  const long words = f.I / numbers_per_word<X>;
  const auto pack = [&](long o, long strips, long, long, Word* to) {
    for (long half = 0; half < 2 * strips; half++)
      pack_outputs<X>(f, o + 16 * half, to + half / 2 * strip * words + 16 * (half % 2));
  };
  const auto next = [](long, long, long, long, long) { return Ahead{}; };
  many(x, M, f.I, O, words, large_panel, pack, next, scales, row_scales, y);
}

// ---- several rows of float32: packing a matrix would take as long as using it, so it is read as it lies, once

constexpr long several = 40;

// Adds R rows of x, whose numbers lie side by side per input, times `count` rows of W, sixteen outputs of each, to sums
// [R, 16]. Every so many rows, from one of the first on, it brings near what comes.
template <int R>
void add_column(const float* x, const float* w, long O, long count, float* sums, const char* ahead, long first,
                long every) {
  f32 held[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) held[r] = load<f32>(sums + 16 * r);
  for (long i = 0; i < count; i++) {
    if (i == first) __builtin_prefetch(ahead + i * O * long(sizeof(*w)), 0, 2), first += every;
    f32 weights = load<f32>(w + i * O);
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) held[r] += x[i * R + r] * weights;
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) store(sums + 16 * r, held[r]);
}

// y = x W in tiles of R rows, the fewest that are enough, of at most 24: their sums, sixteen outputs each, fill the
// registers. W is read in panels of columns, some rows after the other, and the sums of a panel wait in the cache.
template <int R = rows_at_once + 2>
void project_several(const float* x, long M, long I, long O, const float* w, float* y) {
  constexpr long most = 24, depth = 32, width = 16;
  const long tiles = (M + most - 1) / most, columns = O / 16;
  if constexpr (R < most)
    if (M > tiles * R) return project_several<R + 2>(x, M, I, O, w, y);
  const long wide = std::clamp(columns / omp_get_max_threads(), 1l, width);
  float* rows = scratch<float, 12>(tiles * I * R);  // [tiles, I, R], zeros behind the last
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long begin = 0; begin < I; begin += depth)
      for (long m = 0; m < tiles * R; m++)
        for (long i = begin; i < std::min(I, begin + depth); i++)
          rows[(m / R * I + i) * R + m % R] = m < M ? x[m * I + i] : 0;
    float* sums = scratch<float, 11>(wide * tiles * R * 16);
#pragma omp for schedule(static) nowait
    for (long begin = 0; begin < columns; begin += wide) {
      const long count = std::min(wide, columns - begin);
      std::fill(sums, sums + count * tiles * R * 16, 0.f);
      for (long i = 0; i < I; i += depth)
        for (long n = 0; n < count; n++)
          for (long tile = 0; tile < tiles; tile++) {
            const float* own = w + i * O + (begin + n) * 16;
            const float* next = i + depth < I ? own + depth * O : own + wide * 16 - i * O;  // and the end of its line
            const bool is_last = i + depth >= I && begin + wide >= columns;
            add_column<R>(rows + (tile * I + i) * R, own, O, std::min(depth, I - i), sums + (n * tiles + tile) * R * 16,
                          (const char*)next + 63, is_last ? -1 : tile, tiles);
          }
      for (long n = 0; n < count; n++)
        for (long m = 0; m < M; m++) store(y + m * O + (begin + n) * 16, load<f32>(sums + (n * tiles * R + m) * 16));
    }
  }
}

}  // namespace
