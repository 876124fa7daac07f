// Products of few rows with a matrix. They take as long as reading the matrix does, provided that every byte of it is
// read once, in order, by all cores, and turned into floats in registers: that is all this file is about.
//
// Three layouts. "out x in", y = x W^T, is that of Linear and of packed weights: an output is the dot product of x with a
// row of W. Of those in four bits sixteen rows lie "in sixteens", piece by piece side by side. "in x out", y = x W, is that
// of experts: a row of W, times one input, is added to all outputs. A team multiplies; every thread of it may hand in a copy
// of x that is its own.
//
// Shapes: M rows of x, I inputs, O outputs. A block is 64 bytes or fewer of a row of W; a format says how a block
// becomes planes, registers of 16 floats or 32 bfloat16, and which input stands at which place of a plane; so many, a run,
// are neighbours there, too.

#pragma once

#include "vectors.h"

namespace {

// ---- formats of a matrix [O, I], which may have a scale per output; one that is grouped, a scale for every so many inputs

template <class W>
struct InOrder {  // sixteen at a time, one plane
  using Plane = f32;
  static constexpr int planes = 1, inputs = 16, run = 16;
  static constexpr bool grouped = false;
  static int place(int, int lane) { return lane; }
  const W* w;
  long I;
  const W* at(long o, long block) const { return w + o * I + 16 * block; }
};

struct Float32 : InOrder<float> {
  void read(long o, long block, Plane* out) const { out[0] = load<f32>(at(o, block)); }
};

struct Bfloat16 {
  using Plane = f32;
  static constexpr int planes = 2, inputs = 32, run = 1;
  static constexpr bool grouped = false;
  static int place(int plane, int lane) { return 2 * lane + plane; }
  const bf16* w;
  long I;
  const bf16* at(long o, long block) const { return w + o * I + 32 * block; }
  void read(long o, long block, Plane* out) const {
    u32 pairs = load<u32>(at(o, block));
    out[0] = (f32)(pairs << 16);
    out[1] = (f32)(pairs & 0xffff0000u);
  }
};

struct Int8 : InOrder<uint8_t> {
  void read(long o, long block, Plane* out) const {
    i32 codes = (i32)(bytes(at(o, block)) << 24) >> 24;
    out[0] = __builtin_convertvector(codes, f32);
  }
};

struct Float8 : InOrder<uint8_t> {
  void read(long o, long block, Plane* out) const { out[0] = from_e4m3(bytes(at(o, block))); }
};

// Of sixteen words the codes of that number, from -8 to 7.
f32 four_bits(u32 words, int number) {
  return __builtin_convertvector((i32)(words >> (4 * number) & 15) - 8, f32);
}

// Eight to a word, the first lowest; a scale for every 32, 64 or a multiple of 128. Sixteen outputs lie together: sixteen
// bytes of each, 32 inputs, then the next sixteen of each; and a scale of each, then the next.
struct Int4 {
  using Plane = f32;
  static constexpr int planes = 8, inputs = 128, run = 1;
  static constexpr bool grouped = true;
  static int place(int plane, int lane) { return 8 * lane + plane; }
  const uint8_t* w;
  long I;
  Scales scales;
  long group;
  const uint8_t* at(long o, long step) const { return w + (o / 16 * (I / 32) + step) * 256 + o % 16 * 16; }
  long scale_at(long o, long number) const { return (o / 16 * (I / group) + number) * 16 + o % 16; }
  void read(long o, long block, Plane* out) const {
    const auto* from = reinterpret_cast<const u32x4*>(at(o, 4 * block));
    const u32 words = joined(from[0], from[16], from[32], from[48]);
#pragma GCC unroll 8
    for (int plane = 0; plane < 8; plane++) out[plane] = four_bits(words, plane);
  }
  f32 scale(long o, long block) const {
    if (group >= 128) return scales[scale_at(o, block * 128 / group)] - f32{};
    f32x4 four;
    for (int i = 0; i < 4; i++) four[i] = scales[scale_at(o, (block * 128 + i * 32) / group)];
    return each_four_times(four);
  }
};

#ifdef __AVX512BF16__
struct Bfloat16Pairs : Bfloat16 {
  using Plane = bf16s;
  static constexpr int planes = 1, run = 32;
  static int place(int, int lane) { return lane; }
  void read(long o, long block, Plane* out) const { out[0].bits = _mm512_loadu_si512(at(o, block)); }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The numbers of 128 bytes in bfloat16: its high halves and its low ones.
struct Halves {
  alignas(64) uint8_t high[128], low[128];
  template <class Number>
  constexpr Halves(Number number) : high(), low() {
    for (int i = 0; i < 128; i++) {
      const auto bits = __builtin_bit_cast(uint32_t, float(number(i)));
      high[i] = bits >> 24, low[i] = bits >> 16;
    }
  }
};

struct BytePairs {  // a byte is a sign and what is looked up
  using Plane = bf16s;
  static constexpr int planes = 2, inputs = 64, run = 8;
  static constexpr bool grouped = false;
  static int place(int plane, int lane) { return lane / 8 * 16 + 8 * plane + lane % 8; }
  const uint8_t* w;
  long I;
  const uint8_t* at(long o, long block) const { return w + o * I + 64 * block; }
  static __m512i look_up(const uint8_t* table, __m512i places) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), places, _mm512_load_si512(table + 64));
  }
  static __m512i signed_as(__m512i high, __m512i codes) {
    return _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8(-128), 0xf8);
  }
  static void join(__m512i high, __m512i low, Plane* out) {
    out[0].bits = _mm512_unpacklo_epi8(low, high), out[1].bits = _mm512_unpackhi_epi8(low, high);
  }
};

struct Int8Pairs : BytePairs {
  void read(long o, long block, Plane* out) const {
    static constexpr Halves whole([](int i) { return i; });
    __m512i codes = _mm512_loadu_si512(at(o, block)), magnitudes = _mm512_abs_epi8(codes);
    __m512i high = signed_as(look_up(whole.high, magnitudes), codes);
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitudes), _mm512_set1_epi8(0xc3));  // -128
    join(high, look_up(whole.low, magnitudes), out);
  }
};

struct Float8Pairs : BytePairs {
  void read(long o, long block, Plane* out) const {
    static constexpr Halves e4m3([](int i) { return (i < 8 ? i : 8 + i % 8) * 0x1p-10 * (1 << std::max(i / 8, 1)); });
    __m512i codes = _mm512_loadu_si512(at(o, block));
    join(signed_as(look_up(e4m3.high, codes), codes), look_up(e4m3.low, codes), out);
  }
};
#endif

// ---- out x in

// x in the order of the planes, in their precision; of four rows, or those that are left, block by block, so that what
// is multiplied with one block of W lies together.
template <class F, class X>
const typename F::Plane* arranged(const X* x, long M, long I) {
  constexpr int lanes = F::inputs / F::planes;
  using To = std::conditional_t<lanes == 32, bf16, float>;
  To *first = scratch<To, 0>(M * I), *to = first;
  in_fours(M, [&](auto rows, long m) {
    for (long block = 0; block < I; block += F::inputs)
      for (int row = 0; row < rows; row++)
        for (int plane = 0; plane < F::planes; plane++)
          for (int lane = 0; lane < lanes; lane += F::run, to += F::run) {
            const X* from = x + (m + row) * I + block + F::place(plane, lane);
            if constexpr (std::is_same_v<X, To>)
              __builtin_memcpy(to, from, F::run * sizeof(To));
            else
              for (int i = 0; i < F::run; i++) assign(to[i], widened(from[i]));
          }
  });
  return reinterpret_cast<const typename F::Plane*>(first);
}

constexpr long far = 8192;  // bytes ahead
constexpr long chunk = 32;  // rows of W, to be read from memory once and from the cache for further rows of x

// Whether a core has so much to do with a number that it does not look far enough ahead by itself.
template <class F, int M>
constexpr bool is_busy = M > 1 || F::planes > 2;

// Blocks that are multiplied side by side, and the most of a row whose inputs stay in the nearest cache: whole sixteens.
// Where a block is one product, one at a time: a core that asks for more lines ahead than it can wait for is the slower.
template <class F, int M>
constexpr int blocks_at_once = M * F::planes == 1 ? 1 : 4;
template <class F, int M>
constexpr long most_blocks = std::max<long>(1024 / (M * F::planes * sizeof(typename F::Plane)), 1) * 16;

// U blocks of a row of W against M rows of x, each block into sums of its own: a core adds faster than it waits for the
// last sum. What will be wanted soon lies `ahead`.
template <int U, class F, int M>
inline __attribute__((always_inline)) void add_blocks(const F& f, long o, long block, const typename F::Plane* x,
                                                      long ahead, f32 (*sums)[M]) {
  typename F::Plane w[U][F::planes];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) {
    f.read(o, block + u, w[u]);
    if (is_busy<F, M>) __builtin_prefetch((const char*)f.at(o, block + u) + ahead, 0, 2);
  }
#pragma GCC unroll 8
  for (int plane = 0; plane < F::planes; plane++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const auto* inputs = x + ((block + u) * M + m) * F::planes + plane;
        if constexpr (M * F::planes == 1)  // an instruction more, for the same reason as one block at a time
          sums[u][m] = multiply_add(sums[u][m], w[u][plane], *inputs);
        else
          sums[u][m] = multiply_add(sums[u][m], w[u][plane], inputs);
      }
}

// Sixteen rows of W or fewer, some blocks of each, against M rows of x. They are read one after the other: several at once
// would be read at half the rate. Nothing stands between two rows that can stand before them: it would cost a tenth.
template <class F, int M>
__attribute__((noinline)) void add_rows(const F f, long first, long count, long from, long until,
                                        const typename F::Plane* x, long ahead, f32 (*lanes)[16]) {
  constexpr int U = blocks_at_once<F, M>;
  for (long i = 0; i < count; i++) {
    f32 sums[U][M] = {};
    long block = from;
    for (; block + U <= until; block += U) add_blocks<U, F, M>(f, first + i, block, x, ahead, sums);
    for (; U > 1 && block < until; block++) add_blocks<1, F, M>(f, first + i, block, x, ahead, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      f32 total = sums[0][m];
#pragma GCC unroll 4
      for (int u = 1; u < U; u++) total += sums[u][m];
      lanes[m][i] = total;
    }
  }
}

// Sixteen outputs at a time, and their rows in segments as long as each other, so that the same part of x stays in the
// nearest cache: to and fro, as it is there already. A processor that is busy is told what comes 8 KiB later: less far, it
// is the slower for it. With segments that is the next of the same row, or the same of the one sixteen rows later. What it
// is told of behind the matrix is not read.
template <class F, int M, class Y>
void dot_products(const F& f, const typename F::Plane* x, long begin, long end, long O, Scales scales,
                  const float* row_scales, Y* y) {
  constexpr long rows = 16, most = most_blocks<F, M>, U = blocks_at_once<F, M>;
  const long blocks = f.I / F::inputs, segments = std::max((blocks + most - 1) / most, 1l);
  const long segment = (blocks + segments * U - 1) / (segments * U) * U;
  const long row = (const char*)f.at(1, 0) - (const char*)f.at(0, 0), part = blocks ? segment * row / blocks : 0;
  for (long first = begin; first < end; first += rows) {
    const long count = std::min(end - first, rows);
    const bool back = first / rows % 2;
    f32 lanes[M][rows], more[M][rows];
    for (long n = 0; n < segments; n++) {
      const long from = (back ? segments - 1 - n : n) * segment, until = std::min(blocks, from + segment);
      const long ahead = segments == 1 ? far : n + 1 == segments ? rows * row : back ? -part : part;
      add_rows<F, M>(f, first, count, from, until, x, ahead, n ? more : lanes);
      for (int m = 0; m < M && n; m++)
        for (long i = 0; i < count; i++) lanes[m][i] += more[m][i];
    }
    for (int m = 0; m < M; m++) {
      for (long i = count; i < rows; i++) lanes[m][i] = f32{};
      f32 totals = sums(lanes[m]) * (row_scales ? row_scales[m] : 1);
      for (long i = 0; scales && i < count; i++) totals[i] *= scales[first + i];
      Y* to = y + m * O + first;
      if (count == rows) keep(to, totals);
      for (long i = 0; count < rows && i < count; i++) assign(to[i], totals[i]);
    }
  }
}

// A matrix, and where its products [M, O] go; outputs may be multiplied by scales.
template <class F, class Y>
struct Outputs {
  F f;
  long O;
  Scales scales;
  Y* y;
};

// Calls part(matrix, outputs from, until) for all outputs of several matrices, as if they were one.
template <class F, class Y, class Part>
void each_chunk(Shares& shares, const Outputs<F, Y>* all, long count, const Part& part) {
  const auto chunks = [&](long i) { return (all[i].O + chunk - 1) / chunk; };
  long total = 0;
  for (long i = 0; i < count; i++) total += chunks(i);
  shares.each(total, [&](long own) {
    long i = 0;
    while (own >= chunks(i)) own -= chunks(i++);
    part(all[i], own * chunk, std::min(all[i].O, (own + 1) * chunk));
  });
}

// y = x W^T for matrices of one format and as many inputs; rows, too, may be multiplied by scales.
template <class F, class X, class Y>
void out_in(Shares& shares, const Outputs<F, Y>* all, long count, const X* x, long M,
            const float* row_scales = nullptr) {
  const long blocks = all->f.I / F::inputs;
  const auto* inputs = arranged<F>(x, M, all->f.I);
  each_chunk(shares, all, count, [&](const Outputs<F, Y>& own, long begin, long end) {
    in_fours(M, [&](auto rows, long m) {
      dot_products<F, rows>(own.f, inputs + m * blocks * F::planes, begin, end, own.O, own.scales,
                            row_scales ? row_scales + m : nullptr, own.y + m * own.O);
    });
  });
}

// ---- four bits, in sixteens: a register has sixteen bytes of each of four outputs, and what is read of x serves four
// registers. A core reads memory the slower the more it reads beside it, however near that is.

struct Codes {
  using Plane = f32;
  using Number = float;
  static constexpr int planes = 8, numbers = 4;
  static constexpr float excess = 0;
  static Plane plane_of(const Number* x) { return four_times<f32>(x); }
  static Plane read(u32 words, int plane) { return four_bits(words, plane); }
};

#ifdef __AVX512BF16__
// Codes become mantissas of 128, and numbers too large by `excess`.
struct CodePairs {
  using Plane = bf16s;
  using Number = bf16;
  static constexpr int planes = 4, numbers = 8;
  static constexpr float excess = 136;
  static Plane plane_of(const Number* x) { return {four_times<__m512i>(x)}; }
  static Plane read(u32 words, int plane) {
    const __m512i mantissa = _mm512_set1_epi16(15), one = _mm512_set1_epi16(0x4300);
    return {_mm512_ternarylogic_epi64(_mm512_srli_epi16((__m512i)words, 4 * plane), mantissa, one, 0xea)};  // a & b | c
  }
};
#endif

constexpr long inputs_per_step = 32, step_bytes = 16 * inputs_per_step / 2;

// x in the order of the planes: of four rows, or those that are left, step by step, a plane of each row.
template <class C, class X>
const typename C::Number* in_steps(const X* x, long M, long I) {
  auto *first = scratch<typename C::Number, 0>(M * I), *to = first;
  in_fours(M, [&](auto rows, long m) {
    for (long i = 0; i < I; i += inputs_per_step)
      for (int plane = 0; plane < C::planes; plane++)
        for (int row = 0; row < rows; row++, to += C::numbers)
          for (int k = 0; k < C::numbers; k++) {
            const X* from = x + (m + row) * I + i + k * C::planes + plane;
            if constexpr (std::is_same_v<X, typename C::Number>)
              to[k] = *from;
            else
              to[k] = widened(*from);
          }
  });
  return first;
}

// What sums begin with, so that no number is too large: of four rows, or those that are left, group by group, four lanes
// of each row.
template <class C, class X>
const f32x4* beginnings(const X* x, long M, long I, long group) {
  auto* to = reinterpret_cast<f32x4*>(scratch<float, 17>(M * I / group * 4));
  if (C::excess == 0) return std::fill_n(to, M * I / group, f32x4{}) - M * I / group;
  in_fours(M, [&](auto rows, long m) {
    for (long i = 0; i < I; i += group)
      for (int row = 0; row < rows; row++, to++) {
        const X* from = x + (m + row) * I + i;
        f32 low{}, high{};
        for (long k = 0; k < group; k += inputs_per_step) low += floats(from + k), high += floats(from + k + 16);
        *to = f32x4{};
        for (int k = 0; k < 16; k++) (*to)[k / 8] -= C::excess * low[k], (*to)[2 + k / 8] -= C::excess * high[k];
      }
  });
  return to - M * I / group;
}

// The sums of four lanes each, of four registers: of the first quarters, then of the second, ...
f32 sums_of_fours(const f32* v) {
  const f32 all = merged<2>(merged<1>(v[0], v[1]), merged<1>(v[2], v[3]));
  return __builtin_shufflevector(all, all, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Sixteen outputs of M rows, from output o on.
template <class C, int M, class Y>
void sixteen_outputs(const Int4& f, long o, const typename C::Number* x, const f32x4* begin, long O, Y* y) {
  const uint8_t* w = f.at(o, 0);
  f32 totals[M][4] = {};
  for (long g = 0; g < f.I / f.group; g++, begin += M) {
    f32 sums[M][4];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[m][j] = four_times<f32>(begin + m);
    for (long i = 0; i < f.group; i += inputs_per_step, w += step_bytes, x += M * inputs_per_step) {
      u32 words[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        words[j] = load<u32>(w + 64 * j);
        __builtin_prefetch(w + 64 * j + far, 0, 2);
#ifdef __AVX512F__
        asm("" : "+v"(words[j]));  // GCC would load them for each plane
#endif
      }
#pragma GCC unroll 8
      for (int plane = 0; plane < C::planes; plane++) {
        typename C::Plane inputs[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) inputs[m] = C::plane_of(x + (plane * M + m) * C::numbers);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const auto numbers = C::read(words[j], plane);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) sums[m][j] = multiply_add(sums[m][j], numbers, inputs[m]);
        }
      }
    }
    float scales[16];
    store(scales, f.scales.sixteen(f.scale_at(o, g)));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const f32 own = each_four_times(load<f32x4>(scales + 4 * j));
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) totals[m][j] += sums[m][j] * own;
    }
  }
  for (int m = 0; m < M; m++) keep(y + m * O + o, sums_of_fours(totals[m]));
}

// y = x W^T for matrices with as many inputs, also to a scale.
template <class C, class X>
void in_sixteens(Shares& shares, const Outputs<Int4, X>* all, long count, const X* x, long M) {
  const long I = all->f.I, group = all->f.group;
  const auto* inputs = in_steps<C>(x, M, I);
  const auto* beginning = beginnings<C>(x, M, I, group);
  each_chunk(shares, all, count, [&](const Outputs<Int4, X>& own, long begin, long end) {
    in_fours(M, [&](auto rows, long m) {
      for (long o = begin; o < end; o += 16)
        sixteen_outputs<C, rows>(own.f, o, inputs + m * I, beginning + m * (I / group), own.O, own.y + m * own.O);
    });
  });
}

// ---- in x out: here a format reads a block of one row of W, or of `together` neighbours, whose products go to one sum

struct Float32Rows {
  using Number = float;
  using Plane = f32;
  using Factor = float;
  static constexpr int planes = 1, outputs = 16, together = 1;
  static void read(const float* a, const float*, Plane* out) { out[0] = load<f32>(a); }
  static Factor factor(float a, float) { return a; }
  static Plane all(Factor x) { return x - f32{}; }
  static void keep_sums(float* y, const f32* sums) { store(y, sums[0]); }
};

#ifdef __AVX512BF16__
struct Bfloat16Rows {
  using Number = bf16;
  using Plane = bf16s;
  using Factor = uint32_t;
  static constexpr int planes = 2, outputs = 32, together = 2;
  static void read(const bf16* a, const bf16* b, Plane* out) {
    __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    out[0].bits = _mm512_unpacklo_epi16(first, second), out[1].bits = _mm512_unpackhi_epi16(first, second);
  }
  static Factor factor(bf16 a, bf16 b) { return a | uint32_t(b) << 16; }
  static Plane all(Factor x) { return {_mm512_set1_epi32(x)}; }
  static void keep_sums(bf16* y, const f32* sums) {  // four outputs are in the one, the next four in the other
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[1], (__m512)sums[0]);
    _mm512_storeu_si512(y, _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), both));
  }
};
#else
struct Bfloat16Rows {
  using Number = bf16;
  using Plane = f32;
  using Factor = float;
  static constexpr int planes = 2, outputs = 32, together = 1;
  static void read(const bf16* a, const bf16*, Plane* out) { out[0] = floats(a), out[1] = floats(a + 16); }
  static Factor factor(bf16 a, bf16) { return widened(a); }
  static Plane all(Factor x) { return x - f32{}; }
  static void keep_sums(bf16* y, const f32* sums) { keep(y, sums[0]), keep(y + 16, sums[1]); }
};
#endif

// R rows of W, `apart` from each other, times M rows of factors, added to sums [M, O] in the order of the planes.
template <class F, int R, int M>
void add_rows(const typename F::Number* w, long apart, long O, const typename F::Factor* x, float* sums) {
  constexpr int steps = (R + F::together - 1) / F::together, soon = 2048 / sizeof(*w);
  for (long o = 0; o < O; o += F::outputs) {
    f32 held[M][F::planes];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++) held[m][plane] = load<f32>(sums + m * O + o + 16 * plane);
#pragma GCC unroll 8
    for (int step = 0; step < steps; step++) {
      const auto *row = w + step * F::together * apart + o, *other = R == 1 ? row : row + apart;
      __builtin_prefetch(row + soon, 0, 2);
      if (F::together == 2) __builtin_prefetch(other + soon, 0, 2);
      typename F::Plane planes[F::planes];
      F::read(row, other, planes);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int plane = 0; plane < F::planes; plane++)
          held[m][plane] = multiply_add(held[m][plane], planes[plane], F::all(x[m * steps + step]));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++) store(sums + m * O + o + 16 * plane, held[m][plane]);
  }
}

// y = x W, of which each thread adds up its share of inputs, always the same one, so that sums are the same, in its part
// of [threads, M, O]. It reads W in eight runs of rows side by side: a processor foresees each.
template <class F, class X>
void in_out(const X* w, const X* x, long M, long I, long O, float* parts) {
  constexpr long R = 8, longest = 16;
  const long thread = omp_get_thread_num(), threads = omp_get_num_threads(), end = (thread + 1) * I / threads;
  float* sums = parts + thread * M * O;
  std::fill(sums, sums + M * O, 0.f);
  const auto take = [&](auto width, long first, long run) {  // so many rows of W, a run apart
    constexpr int n = width, steps = (n + F::together - 1) / F::together;
    in_fours(M, [&](auto rows, long m) {
      typename F::Factor factors[rows * steps];
      for (int k = 0; k < rows; k++)
        for (int step = 0; step < steps; step++) {
          const X* own = x + (m + k) * I + first + step * F::together * run;
          factors[k * steps + step] = F::factor(own[0], n == 1 ? X(0) : own[run]);
        }
      add_rows<F, n, rows>(w + first * O, run * O, O, factors, sums + m * O);
    });
  };
  for (long i = thread * I / threads; i < end;) {
    const long run = std::min(longest, (end - i) / R);
    for (long k = 0; k < run; k++) take(std::integral_constant<int, R>(), i + k, run);
    for (long k = i; !run && k < end; k++) take(std::integral_constant<int, 1>(), k, 0);
    i = run ? i + R * run : end;
  }
}

// The sums of all threads' parts, some outputs by each.
template <class F, class X>
void total(const float* parts, long M, long O, X* y) {
  const long threads = omp_get_num_threads();
#pragma omp for schedule(static) nowait
  for (long o = 0; o < M * O; o += F::outputs) {
    f32 totals[F::planes] = {};
    for (long t = 0; t < threads; t++)
      for (int plane = 0; plane < F::planes; plane++) totals[plane] += load<f32>(parts + t * M * O + o + 16 * plane);
    F::keep_sums(y + o, totals);
  }
}

}  // namespace
