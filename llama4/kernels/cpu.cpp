// What decoding consists of, on a CPU. The first half is products of few rows with a matrix: they take as long as
// reading the matrix does, provided that every byte of it is read once, in order, by all cores, and turned into floats
// in registers. The second half is what stands between products, and a decoder layer put together of both.
//
// Two layouts. "out x in", y = x W^T, is that of Linear and of all packed weights: an output is the dot product of x
// with a row of W. "in x out", y = x W, is that of experts: a row of W, times one input, is added to all outputs.
//
// Shapes: M rows of x, I inputs, O outputs. A block is 64 bytes or fewer of a row of W; a format says how a block
// becomes planes, registers of 16 floats or 32 bfloat16, and which input stands at which place of a plane.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Numbers to read from which a second thread pays for being woken, and for waiting on others where cores are shared.
constexpr long worth_threads = 1 << 16;

using f32 = float __attribute__((vector_size(64), aligned(4), may_alias));
using i32 = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using u32 = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using bf16 = uint16_t;  // its bits

template <class V>
V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
void store(void* to, V values) {
  *static_cast<V*>(to) = values;
}

float widened(bf16 x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
float widened(float x) { return x; }

struct Scales {  // in bfloat16 or float32
  const void* numbers;
  int64_t wide;
  float operator[](long i) const {
    return wide ? static_cast<const float*>(numbers)[i] : widened(static_cast<const bf16*>(numbers)[i]);
  }
  explicit operator bool() const { return numbers != nullptr; }
};

void assign(float& to, float x) { to = x; }
void assign(bf16& to, float x) {  // to the nearest, ties to even; what is not a number stays so
  auto bits = __builtin_bit_cast(uint32_t, x);
  to = x == x ? bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : bf16(0x7fc0);
}

float sum(f32 v) {
  using f32x8 = float __attribute__((vector_size(32)));
  using f32x4 = float __attribute__((vector_size(16)));
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[1]) + (b[2] + b[3]);
}

f32 multiply_add(f32 sums, f32 a, f32 b) { return sums + a * b; }
#ifdef __AVX512BF16__
struct bf16s {
  __m512i bits;
};
f32 multiply_add(f32 sums, bf16s a, bf16s b) {  // two neighbours to a sum
  return (f32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a.bits, (__m512bh)b.bits);
}
#endif

// Sixteen numbers in float, and back.
f32 floats(const float* from) { return load<f32>(from); }
f32 floats(const bf16* from) {
#ifdef __AVX512F__
  return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  f32 v;
  for (int i = 0; i < 16; i++) v[i] = widened(from[i]);
  return v;
#endif
}
void keep(float* to, f32 values) { store(to, values); }
void keep(bf16* to, f32 values) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  for (int i = 0; i < 16; i++) assign(to[i], values[i]);
#endif
}

u32 bytes(const uint8_t* from) {
#ifdef __AVX512F__
  return (u32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  u32 v;
  for (int i = 0; i < 16; i++) v[i] = from[i];
  return v;
#endif
}

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

// e4m3: as bits of a float its exponent is too small by the difference of the biases, 127 - 7.
struct Float8 : InOrder<uint8_t> {
  void read(long o, long block, Plane* out) const {
    u32 codes = bytes(w + o * I + 16 * block);
    out[0] = (f32)((codes & 0x80) << 24 | (codes & 0x7f) << 20) * 0x1p120f;
  }
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

// Memory for one call, kept from call to call, aligned as registers are.
template <class T, int use>
T* scratch(long count) {
  thread_local std::vector<char> held;
  held.resize(count * sizeof(T) + 64);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held.data()) + 63) & ~uintptr_t(63));
}

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

// Calls part(rows of x, from which on) for M rows, at most four at a time: more do not fit into registers.
template <class Part>
void in_fours(long M, const Part& part) {
  for (long m = 0; m < M; m += 4) switch (M - m) {
      case 1: part(std::integral_constant<int, 1>(), m); break;
      case 2: part(std::integral_constant<int, 2>(), m); break;
      case 3: part(std::integral_constant<int, 3>(), m); break;
      default: part(std::integral_constant<int, 4>(), m);
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

// ---- dequantising, for products of many rows

// Rows [begin, end) of W as planes, one after the other: the places of the inputs are not in order.
template <class X>
void planes_of(const Int4& f, long begin, long end, X* out) {
#pragma omp parallel for schedule(static) if ((end - begin) * f.I > worth_threads)
  for (long o = begin; o < end; o++)
    for (long block = 0; block < f.I / Int4::inputs; block++) {
      f32 w[Int4::planes], scale = f.scale(o, block);
      f.read(o, block, w);
      X* to = out + (o - begin) * f.I + block * Int4::inputs;
      for (int plane = 0; plane < Int4::planes; plane++)
        keep(to + 16 * plane, w[plane] * scale);
    }
}

// ---- what stands between the products

f32 smaller(f32 a, f32 b) { return a < b ? a : b; }
f32 larger(f32 a, f32 b) { return a > b ? a : b; }

// e^x: 2^n e^r with |r| <= ln 2 / 2, and e^r by Taylor's series, which leaves 2e-8.
f32 exponential(f32 x) {
  u32 is_zero = (u32)(x < -87.f);  // so is e^-inf
  x = larger(smaller(x, f32{} + 88.f), f32{} - 87.f);
  f32 n = x * 1.44269504f + 12582912.f - 12582912.f;  // to the nearest whole number
  f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32 p = f32{} + 1.f / 5040;
  p = p * r + 1.f / 720, p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6;
  p = p * r + .5f, p = p * r + 1.f, p = p * r + 1.f;
  f32 power = (f32)((u32)__builtin_convertvector(n, i32) + 127 << 23);
  return (f32)((u32)(power * p) & ~is_zero);
}

float inverse_rms(float squares, long count, float eps) { return 1 / __builtin_sqrtf(squares / count + eps); }

template <class X, class W>
void rms_norm(const X* x, long N, long D, const W* weight, float eps, W* y) {
#pragma omp parallel for schedule(static) if (N * D > worth_threads)
  for (long n = 0; n < N; n++) {
    f32 squares[2] = {};
    for (long d = 0; d < D; d += 16) {
      f32 v = floats(x + n * D + d);
      squares[d / 16 % 2] += v * v;
    }
    float factor = inverse_rms(sum(squares[0] + squares[1]), D, eps);
    for (long d = 0; d < D; d += 16)
      keep(y + n * D + d, floats(x + n * D + d) * factor * floats(weight + d));
  }
}

// Heads [N, H, C]: consecutive pairs turned by unit complex numbers [N, C / 2], if any; then normalised, if eps is not
// negative; then multiplied by factors [N], if any.
template <class X>
void turn(const X* x, long stride, long N, long H, long C, const float* rotation, float eps, const float* factors,
          X* y) {
#pragma omp parallel for schedule(static) if (N * H * C > worth_threads)
  for (long n = 0; n < N; n++)
    for (long h = 0; h < H; h++) {
      const X* from = x + n * stride + h * C;
      float head[1024];
      f32 squares{};
      for (long c = 0; c < C; c += 16) {
        f32 v = floats(from + c);
        if (rotation) {
          f32 r = load<f32>(rotation + n * C + c);
          f32 re = __builtin_shufflevector(r, r, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
          f32 im = __builtin_shufflevector(r, r, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
          f32 other = __builtin_shufflevector(v, -v, 17, 0, 19, 2, 21, 4, 23, 6, 25, 8, 27, 10, 29, 12, 31, 14);
          v = v * re + other * im;
        }
        squares += v * v;
        store(head + c, v);
      }
      float factor = (eps < 0 ? 1 : inverse_rms(sum(squares), C, eps)) * (factors ? factors[n] : 1);
      for (long c = 0; c < C; c += 16) keep(y + (n * H + h) * C + c, load<f32>(head + c) * factor);
    }
}

// silu(gate) * up; rows of both lie `stride` apart.
template <class X>
void swiglu(const X* gate, const X* up, long N, long F, long stride, X* y) {
#pragma omp parallel for schedule(static) if (N * F > worth_threads)
  for (long n = 0; n < N; n++)
    for (long i = 0; i < F; i += 16) {
      f32 g = floats(gate + n * stride + i);
      keep(y + n * F + i, g / (exponential(-g) + 1.f) * floats(up + n * stride + i));
    }
}

// Q queries against n keys: sums of values [Q, C], weighted by e^(score - largest score), then that largest score and
// the sum of the weights. Scores are [Q, n], n rounded up to 16.
template <int Q, class KV>
void attend_block(const float* q, const KV* keys, const KV* values, long n, long C, float* scores, float* out,
                  long part) {
  const long width = (n + 15) / 16 * 16;
  for (long s = 0; s < n; s++) {
    f32 dots[Q] = {};
    for (long c = 0; c < C; c += 16) {
      f32 key = floats(keys + s * C + c);
#pragma GCC unroll 4
      for (int i = 0; i < Q; i++) dots[i] += key * load<f32>(q + i * C + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) scores[i * width + s] = sum(dots[i]);
  }
  for (int i = 0; i < Q; i++) {
    float* own = scores + i * width;
    const float most = *std::max_element(own, own + n);
    std::fill(own + n, own + width, -INFINITY);
    f32 total{};
    for (long s = 0; s < width; s += 16) {
      store(own + s, exponential(load<f32>(own + s) - most));
      total += load<f32>(own + s);
    }
    std::fill(out + i * part, out + i * part + C, 0.f);
    out[i * part + C] = most, out[i * part + C + 1] = sum(total);
  }
  for (long s = 0; s < n; s += 16)
    for (long c = 0; c < C; c += 16) {
      f32 sums[Q];
#pragma GCC unroll 4
      for (int i = 0; i < Q; i++) sums[i] = load<f32>(out + i * part + c);
      for (long t = s; t < std::min(n, s + 16); t++) {
        f32 value = floats(values + t * C + c);
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++) sums[i] += value * scores[i * width + t];
      }
#pragma GCC unroll 4
      for (int i = 0; i < Q; i++) store(out + i * part + c, sums[i]);
    }
}

// One query of every row and head against the keys of that row, softmax(q K^T / sqrt(C)) V. A task is a block of keys
// of a row and key head; what it leaves is put together with the other blocks' when all are done.
//
// Shapes: B rows, H query heads, K key heads, C head_dim (at most 1024); keys and values [B, K, slots, C], of which row
// b sees the first lengths[b].
template <class X, class KV>
void attend(const X* q, const KV* keys, const KV* values, const long* lengths, long B, long H, long K, long C,
            long row_stride, long head_stride, X* y) {
  constexpr long keys_at_once = 512;
  const long G = H / K, longest = *std::max_element(lengths, lengths + B);
  const long blocks = (longest + keys_at_once - 1) / keys_at_once, part = C + 16;
  float* wide = scratch<float, 2>(B * H * (blocks * part + C));
  float* parts = wide + B * H * C;
  for (long i = 0; i < B * H * C; i += 16) store(wide + i, floats(q + i) * (1 / __builtin_sqrtf(C)));
#pragma omp parallel if (B * K * longest * C > worth_threads)
  {
    float* scores = scratch<float, 3>(4 * keys_at_once);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < B * K * blocks; task++) {
      const long b = task / blocks / K, k = task / blocks % K, block = task % blocks, begin = block * keys_at_once;
      const long n = std::min(lengths[b] - begin, keys_at_once), from = b * row_stride + k * head_stride + begin * C;
      if (n > 0)
        in_fours(G, [&](auto queries, long first) {
          const long head = b * H + k * G + first;
          attend_block<queries>(wide + head * C, keys + from, values + from, n, C, scores,
                                parts + (head * blocks + block) * part, blocks * part);
        });
    }
#pragma omp for schedule(static)
    for (long head = 0; head < B * H; head++) {
      const float* own = parts + head * blocks * part;
      const long used = (lengths[head / H] + keys_at_once - 1) / keys_at_once;
      float most = own[C], total = 0;
      for (long i = 1; i < used; i++) most = std::max(most, own[i * part + C]);
      f32 sums[64] = {};
      for (long i = 0; i < used; i++) {
        const float factor = exponential(f32{} + (own[i * part + C] - most))[0];
        total += factor * own[i * part + C + 1];
        for (long c = 0; c < C; c += 16) sums[c / 16] += load<f32>(own + i * part + c) * factor;
      }
      for (long c = 0; c < C; c += 16) keep(y + head * C + c, sums[c / 16] / total);
    }
  }
}

// ---- one decoder layer for one new token per row: the steps of llama4/model.py, without the microseconds between them

// Kinds of a Matrix, as in llama4/decoding.py.
enum { OUT_IN, IN_OUT, INT8, FP8, INT4 };

// A matrix of any format, or, for experts, several that lie `step` bytes apart, and their scales `scale_step`.
struct Matrix {
  const char* w;
  Scales scales;
  int64_t kind, group, I, O, step, scale_step;
};

struct Layer {
  Matrix q, k, v, o, gate_up, down;
  Matrix gate, up, shared_down;                 // of the shared expert, or of the dense MLP
  const void *input_norm, *post_norm, *router;  // router: nullptr in a dense layer
  int64_t D, H, K, C, E, chosen;                // chosen: experts per token
  double eps, qk_eps;                           // qk_eps: negative without QK-norm
};

// To the nearest number of e4m3: three bits of mantissa, from 2^-6 up, and below that steps of 2^-9.
f32 rounded_to_e4m3(f32 x) {
  u32 bits = (u32)x, magnitude = bits & 0x7fffffffu;
  u32 normal = magnitude + 0x7ffff + (magnitude >> 20 & 1) & 0xfff00000u;
  f32 small = (f32)magnitude + 0x1p14f * 1.5f - 0x1p14f * 1.5f;
  f32 y = (f32)magnitude < 0x1p-6f ? small : (f32)normal;
  return (f32)((u32)smaller(y, f32{} + 448.f) | (bits & 0x80000000u));
}

// x with a scale per row, in e4m3, as floats again.
template <class X>
float* through_e4m3(const X* x, long M, long I) {
  float* out = scratch<float, 4>(M * I);
  for (long m = 0; m < M; m++) {
    f32 most{};
    for (long i = 0; i < I; i += 16) {
      f32 v = floats(x + m * I + i);
      most = larger(most, larger(v, -v));
    }
    float largest = 0;
    for (int lane = 0; lane < 16; lane++) largest = std::max(largest, most[lane]);
    const float scale = largest > 0 ? largest / 448 : 1;
    for (long i = 0; i < I; i += 16) store(out + m * I + i, rounded_to_e4m3(floats(x + m * I + i) / scale) * scale);
  }
  return out;
}

// The formats for rows of a dtype: without and with bits to unpack.
template <class X>
struct For;
template <>
struct For<float> {
  using Dense = Float32;
  using FourBits = Int4;
};
template <>
struct For<bf16> {
#ifdef __AVX512BF16__
  using Dense = Bfloat16Pairs;
  using FourBits = Int4Pairs;
#else
  using Dense = Bfloat16;
  using FourBits = Int4;
#endif
};
template <class X>
using InOut = std::conditional_t<std::is_same_v<X, float>, Float32, Bfloat16>;

template <class X>
void product(const Matrix& a, long expert, const X* x, long M, X* y) {
  const char* w = a.w + expert * a.step;
  const Scales s{static_cast<const char*>(a.scales.numbers) + expert * a.scale_step, a.scales.wide};
  switch (a.kind) {
    case OUT_IN: return out_in(typename For<X>::Dense{(const X*)w, a.I}, x, M, a.O, Scales{}, y);
    case IN_OUT: return in_out(InOut<X>{(const X*)w, a.O}, x, M, a.I, y);
    case INT8: return out_in(Int8{(const uint8_t*)w, a.I}, x, M, a.O, s, y);
    case FP8: return out_in(Float8{(const uint8_t*)w, a.I}, through_e4m3(x, M, a.I), M, a.O, s, y);
    case INT4: return out_in(typename For<X>::FourBits{(const uint8_t*)w, a.I, s, a.group}, x, M, a.O, Scales{}, y);
  }
}

template <class X>
void add(float* to, const X* from, long count) {
  for (long i = 0; i < count; i += 16) store(to + i, load<f32>(to + i) + floats(from + i));
}

// The k largest logits of a row, of equals the lowest index first.
void choose(const float* logits, long E, long k, long* experts, float* scores) {
  for (long i = 0; i < k; i++) {
    long best = -1;
    for (long e = 0; e < E; e++)
      if (std::find(experts, experts + i, e) == experts + i && (best < 0 || logits[e] > logits[best])) best = e;
    experts[i] = best, scores[i] = 1 / (1 + std::exp(-logits[best]));
  }
}

template <class X>
void decode(const Layer& layer, float* h, long M, const float* rotation, const float* temperature, const long* lengths,
            X* keys, X* values, long row_stride, long head_stride) {
  const long D = layer.D, H = layer.H, K = layer.K, C = layer.C, E = layer.router ? layer.E : 0, R = M * layer.chosen;
  const long width = std::max({H * C, D, layer.gate.O, E ? layer.gate_up.O : 0});
  X* work = scratch<X, 6>(M * (D + H * C + 2 * K * C + 3 * width));
  X *x = work, *q = x + M * D, *k = q + M * H * C, *v = k + M * K * C, *a = v + M * K * C, *b = a + M * width,
    *c = b + M * width;

  rms_norm(h, M, D, (const X*)layer.input_norm, layer.eps, x);
  product(layer.q, 0, x, M, q);
  product(layer.k, 0, x, M, k);
  product(layer.v, 0, x, M, v);
  if (rotation || layer.qk_eps >= 0 || temperature) {
    turn(q, H * C, M, H, C, rotation, layer.qk_eps, temperature, q);
    turn(k, K * C, M, K, C, rotation, layer.qk_eps, nullptr, k);
  }
  for (long m = 0; m < M; m++)
    for (long head = 0; head < K; head++) {
      const long slot = m * row_stride + head * head_stride + (lengths[m] - 1) * C, from = (m * K + head) * C;
      std::copy(k + from, k + from + C, keys + slot);
      std::copy(v + from, v + from + C, values + slot);
    }
  attend(q, keys, values, lengths, M, H, K, C, row_stride, head_stride, a);
  product(layer.o, 0, a, M, b);
  add(h, b, M * D);

  rms_norm(h, M, D, (const X*)layer.post_norm, layer.eps, x);
  if (E) {
    float* logits = scratch<float, 7>(M * E + R * 2);
    float* scores = logits + M * E;
    long* experts = scratch<long, 8>(R);
    out_in(typename For<X>::Dense{(const X*)layer.router, D}, x, M, E, Scales{}, logits);
    for (long m = 0; m < M; m++)
      choose(logits + m * E, E, layer.chosen, experts + m * layer.chosen, scores + m * layer.chosen);
    for (long e = 0; e < E; e++) {
      long count = 0;
      for (long i = 0; i < R; i++)
        if (experts[i] == e) {
          const X* from = x + i / layer.chosen * D;
          for (long d = 0; d < D; d += 16) keep(a + count * D + d, floats(from + d) * scores[i]);
          count++;
        }
      if (!count) continue;
      const long F = layer.gate_up.O / 2;
      product(layer.gate_up, e, a, count, b);
      swiglu(b, b + F, count, F, 2 * F, c);
      product(layer.down, e, c, count, a);
      for (long i = 0, row = 0; i < R; i++)
        if (experts[i] == e) add(h + i / layer.chosen * D, a + row++ * D, D);
    }
  }
  product(layer.gate, 0, x, M, a);
  product(layer.up, 0, x, M, b);
  swiglu(a, b, M, layer.gate.O, layer.gate.O, c);
  product(layer.shared_down, 0, c, M, a);
  add(h, a, M * D);
}

}  // namespace

// ---- what Python calls, once per dtype of x and y: f for float32, b for bfloat16

#define ENTRIES(X, suffix)                                                                                             \
  extern "C" void linear_##suffix(const X* x, long M, long I, long O, const X* w, X* y) {                              \
    out_in(For<X>::Dense{w, I}, x, M, O, Scales{}, y);                                                                 \
  }                                                                                                                    \
  extern "C" void project_##suffix(const X* x, long M, long I, long O, const X* w, X* y) {                             \
    in_out(InOut<X>{w, O}, x, M, I, y);                                                                                \
  }                                                                                                                    \
  extern "C" void linear_int8_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide, \
                                       X* y) {                                                                         \
    out_in(Int8{w, I}, x, M, O, Scales{s, wide}, y);                                                                   \
  }                                                                                                                    \
  extern "C" void linear_fp8_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide,  \
                                      X* y) {                                                                          \
    out_in(Float8{w, I}, x, M, O, Scales{s, wide}, y);                                                                 \
  }                                                                                                                    \
  extern "C" void linear_int4_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide, \
                                       long group, X* y) {                                                             \
    out_in(For<X>::FourBits{w, I, {s, wide}, group}, x, M, O, Scales{}, y);                                            \
  }                                                                                                                    \
  extern "C" void planes_int4_##suffix(long begin, long end, long I, const uint8_t* w, const void* s, long wide,       \
                                       long group, X* out) {                                                           \
    planes_of(Int4{w, I, {s, wide}, group}, begin, end, out);                                                          \
  }                                                                                                                    \
  extern "C" void rms_norm_##suffix(const float* x, long N, long D, const X* weight, const float* eps, X* y) {         \
    rms_norm(x, N, D, weight, *eps, y);                                                                                \
  }                                                                                                                    \
  extern "C" void turn_##suffix(const X* x, long stride, long N, long H, long C, const float* rotation,                \
                                const float* eps, const float* factors, X* y) {                                        \
    turn(x, stride, N, H, C, rotation, *eps, factors, y);                                                              \
  }                                                                                                                    \
  extern "C" void swiglu_##suffix(const X* gate, const X* up, long N, long F, long stride, X* y) {                     \
    swiglu(gate, up, N, F, stride, y);                                                                                 \
  }                                                                                                                    \
  extern "C" void attend_##suffix(const X* q, const X* keys, const X* values, const long* lengths, long B, long H,     \
                                  long K, long C, long row_stride, long head_stride, X* y) {                           \
    attend(q, keys, values, lengths, B, H, K, C, row_stride, head_stride, y);                                          \
  }                                                                                                                    \
  extern "C" void decode_##suffix(const Layer* layer, float* h, long M, const float* rotation,                         \
                                  const float* temperature, const long* lengths, X* keys, X* values, long row_stride,  \
                                  long head_stride) {                                                                  \
    decode(*layer, h, M, rotation, temperature, lengths, keys, values, row_stride, head_stride);                       \
  }
ENTRIES(float, f)
ENTRIES(bf16, b)
