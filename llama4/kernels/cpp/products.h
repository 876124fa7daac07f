// Products of few rows with a matrix. They take as long as reading the matrix does, provided that every byte of it is
// read once, in order, by all cores, and turned into floats in registers: that is all this file is about.
//
// Two layouts. "out x in", y = x W^T, is that of Linear and of all packed weights: an output is the dot product of x
// with a row of W. "in x out", y = x W, is that of experts: a row of W, times one input, is added to all outputs.
//
// Shapes: M rows of x, I inputs, O outputs. A block is 64 bytes or fewer of a row of W; a format says how a block
// becomes planes, registers of 16 floats or 32 bfloat16, and which input stands at which place of a plane.

#pragma once

#include "vectors.h"

namespace {

// ---- formats of a matrix [O, I]; a grouped one has scales for the lanes of each block, others at most one per output

template <class W>
struct InOrder {  // sixteen at a time, one plane
  using Plane = f32;
  static constexpr int planes = 1, inputs = 16;
  static constexpr bool grouped = false;
  static int place(int, int lane) { return lane; }
  const W* w;
  long I;
};

struct Float32 : InOrder<float> {
  void read(long o, long block, Plane* out) const { out[0] = load<f32>(w + o * I + 16 * block); }
};

struct Bfloat16 {
  using Plane = f32;
  static constexpr int planes = 2, inputs = 32;
  static constexpr bool grouped = false;
  static int place(int plane, int lane) { return 2 * lane + plane; }
  const bf16* w;
  long I;
  void read(long o, long block, Plane* out) const {
    u32 pairs = load<u32>(w + o * I + 32 * block);
    out[0] = (f32)(pairs << 16);
    out[1] = (f32)(pairs & 0xffff0000u);
  }
};

struct Int8 : InOrder<uint8_t> {
  void read(long o, long block, Plane* out) const {
    i32 codes = (i32)(bytes(w + o * I + 16 * block) << 24) >> 24;
    out[0] = __builtin_convertvector(codes, f32);
  }
};

struct Float8 : InOrder<uint8_t> {
  void read(long o, long block, Plane* out) const { out[0] = from_e4m3(bytes(w + o * I + 16 * block)); }
};

struct Int4 {  // eight to a word, the first lowest; a scale for every 32, 64 or a multiple of 128
  using Plane = f32;
  static constexpr int planes = 8, inputs = 128;
  static constexpr bool grouped = true;
  static int place(int plane, int lane) { return 8 * lane + plane; }
  const uint8_t* w;
  long I;
  Scales scales;
  long group;
  void read(long o, long block, Plane* out) const {
    u32 words = load<u32>(w + (o * I + 128 * block) / 2);
#pragma GCC unroll 8
    for (int plane = 0; plane < 8; plane++)
      out[plane] = __builtin_convertvector((i32)(words >> (4 * plane) & 15) - 8, f32);
  }
  f32 scale(long o, long block) const {  // of each lane
    const long first = (o * I + 128 * block) / group;
    if (group >= 128) return f32{} + scales[first];
    float a = scales[first], b = scales[first + 1];
    if (group == 64) return f32{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
    float c = scales[first + 2], d = scales[first + 3];
    return f32{a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
  }
};

#ifdef __AVX512BF16__
struct Bfloat16Pairs : Bfloat16 {
  using Plane = bf16s;
  static constexpr int planes = 1;
  static int place(int, int lane) { return lane; }
  void read(long o, long block, Plane* out) const { out[0].bits = _mm512_loadu_si512(w + o * I + 32 * block); }
};

struct Int4Pairs : Int4 {
  using Plane = bf16s;
  static constexpr int planes = 4;
  static int place(int plane, int lane) { return 4 * lane + plane; }
  void read(long o, long block, Plane* out) const {
    // -8 to 7 in bfloat16, twice: the index is five bits wide, of which the fifth belongs to the next code
    alignas(64) static constexpr bf16 levels[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    __m512i table = _mm512_load_si512(levels), words = _mm512_loadu_si512(w + (o * I + 128 * block) / 2);
    out[0].bits = _mm512_permutexvar_epi16(words, table);
    out[1].bits = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
    out[2].bits = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
    out[3].bits = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
  }
};
#endif

// ---- out x in

// x in the order of the planes, in their precision.
template <class F, class X>
const typename F::Plane* arranged(const X* x, long M, long I) {
  constexpr int lanes = F::inputs / F::planes;
  using To = std::conditional_t<lanes == 32, bf16, float>;
  To* out = scratch<To, 0>(M * I);
  for (long from = 0; from < M * I; from += F::inputs)
    for (int plane = 0; plane < F::planes; plane++)
      for (int lane = 0; lane < lanes; lane++)
        if constexpr (std::is_same_v<X, To>)
          out[from + plane * lanes + lane] = x[from + F::place(plane, lane)];
        else
          assign(out[from + plane * lanes + lane], widened(x[from + F::place(plane, lane)]));
  return reinterpret_cast<const typename F::Plane*>(out);
}

// U blocks of a row of W against M rows of x, each block into sums of its own: a core adds faster than it waits for the
// last sum.
template <class F, int M, int U>
inline __attribute__((always_inline)) void add_blocks(const F& f, long o, long block, long blocks,
                                                      const typename F::Plane* x, f32 (*sums)[M]) {
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) {
    typename F::Plane w[F::planes];
    f.read(o, block + u, w);
    f32 scale{};
    if constexpr (F::grouped) scale = f.scale(o, block + u);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const typename F::Plane* inputs = x + (m * blocks + block + u) * F::planes;
      f32 part = F::grouped ? f32{} : sums[u][m];
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++) part = multiply_add(part, w[plane], inputs[plane]);
      sums[u][m] = F::grouped ? sums[u][m] + part * scale : part;
    }
  }
}

template <class F, int M, class Y>
void dot_products(const F& f, const typename F::Plane* x, long begin, long end, long O, Scales scales, Y* y) {
  constexpr int U = 4;
  const long blocks = f.I / F::inputs;
  for (long o = begin; o < end; o++) {  // one row after the other: several at once would read memory out of order
    f32 sums[U][M] = {};
    long block = 0;
    for (; block + U <= blocks; block += U) add_blocks<F, M, U>(f, o, block, blocks, x, sums);
    for (; block < blocks; block++) add_blocks<F, M, 1>(f, o, block, blocks, x, sums);
    for (int m = 0; m < M; m++) {
      float total = sum((sums[0][m] + sums[1][m]) + (sums[2][m] + sums[3][m]));
      assign(y[m * O + o], scales ? total * scales[o] : total);
    }
  }
}

template <class F, class X, class Y>
void out_in(const F& f, const X* x, long M, long O, Scales scales, Y* y) {
  constexpr long chunk = 32;  // rows of W, to be read from memory once and from the cache for further rows of x
  const auto* inputs = arranged<F>(x, M, f.I);
#pragma omp parallel for schedule(static) if (O * f.I > worth_threads)
  for (long c = 0; c < (O + chunk - 1) / chunk; c++)
    in_fours(M, [&](auto rows, long m) {
      const auto* from = inputs + m * (f.I / F::inputs) * F::planes;
      dot_products<F, rows>(f, from, c * chunk, std::min(O, (c + 1) * chunk), O, scales, y + m * O);
    });
}

// ---- in x out

// R rows of W, times M rows of x, added to sums [M, O]. Of bfloat16, sums of even and odd outputs lie apart by blocks.
template <class F, int R, int M>
void add_rows(const F& f, long i, const float* x, float* sums) {
  for (long block = 0; block < f.I / F::inputs; block++) {
    f32 held[M][F::planes];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++)
        held[m][plane] = load<f32>(sums + m * f.I + block * F::inputs + 16 * plane);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      f32 w[F::planes];
      f.read(i + r, block, w);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int plane = 0; plane < F::planes; plane++) held[m][plane] += w[plane] * x[m * R + r];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int plane = 0; plane < F::planes; plane++)
        store(sums + m * f.I + block * F::inputs + 16 * plane, held[m][plane]);
  }
}

// A format's rows are now inputs, of O numbers each: f.I is O.
template <class F, class X>
void in_out(const F& f, const X* x, long M, long I, X* y) {
  constexpr int R = 8, lanes = 16;
  const long O = f.I, most = omp_get_max_threads();
  float* all = scratch<float, 1>(most * M * O);
#pragma omp parallel if (O * I > worth_threads)
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    float* sums = all + thread * M * O;
    std::fill(sums, sums + M * O, 0.f);
    for (long i = thread * I / threads, end = (thread + 1) * I / threads; i < end;) {
      const int n = end - i >= R ? R : 1;
      in_fours(M, [&](auto rows, long m) {
        float factors[rows * R];
        for (int k = 0; k < rows; k++)
          for (int r = 0; r < n; r++) factors[k * n + r] = widened(x[(m + k) * I + i + r]);
        if (n == R)
          add_rows<F, R, rows>(f, i, factors, sums + m * O);
        else
          add_rows<F, 1, rows>(f, i, factors, sums + m * O);
      });
      i += n;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (long begin = 0; begin < M * O; begin += F::inputs)
      for (int plane = 0; plane < F::planes; plane++) {
        f32 total{};
        for (long t = 0; t < threads; t++) total += load<f32>(all + t * M * O + begin + lanes * plane);
        for (int lane = 0; lane < lanes; lane++) assign(y[begin + F::place(plane, lane)], total[lane]);
      }
  }
}

}  // namespace
