// Vectors of 16 lanes: conversions from and to narrower numbers, reductions, exponentials.
//
// Written with GCC's vector extensions, so that any machine runs them; AVX-512 where the compiler misses an
// instruction.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "threads.h"

namespace {

constexpr int lanes = 16;

using f32x16 = float __attribute__((vector_size(64), aligned(4), may_alias));
using i32x16 = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using u32x16 = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using f32x4 = float __attribute__((vector_size(16), aligned(4), may_alias));
using u32x4 = uint32_t __attribute__((vector_size(16), aligned(4), may_alias));
using bf16 = uint16_t;  // its bits

static_assert(sizeof(f32x16) == lanes * sizeof(float) && sizeof(float) == 4 && sizeof(long) == 8);

// ---- one number

inline float upcast(bf16 x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline float upcast(float x) { return x; }

inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {  // to the nearest, ties to even; NaN stays NaN
  auto bits = __builtin_bit_cast(uint32_t, x);
  to = x == x ? bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : bf16(0x7fc0);
}

// ---- loads and stores

template <class V>
V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
void store(void* to, V values) {
  *static_cast<V*>(to) = values;
}

inline f32x16 load_floats(const float* from) { return load<f32x16>(from); }
inline f32x16 load_floats(const bf16* from) {
#ifdef __AVX512F__
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  f32x16 v;
  for (int i = 0; i < lanes; i++) v[i] = upcast(from[i]);
  return v;
#endif
}

inline void store_floats(float* to, f32x16 values) { store(to, values); }
inline void store_floats(bf16* to, f32x16 values) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  for (int i = 0; i < lanes; i++) assign(to[i], values[i]);
#endif
}

inline u32x16 load_bytes(const uint8_t* from) {
#ifdef __AVX512F__
  return (u32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  u32x16 v;
  for (int i = 0; i < lanes; i++) v[i] = from[i];
  return v;
#endif
}

// Scales in bfloat16 or float32.
struct Scales {
  const void* numbers;
  int64_t is_float32;

  explicit operator bool() const { return numbers != nullptr; }
  float operator[](long i) const {
    return is_float32 ? static_cast<const float*>(numbers)[i] : upcast(static_cast<const bf16*>(numbers)[i]);
  }
  f32x16 load(long i) const {
    return is_float32 ? load_floats(static_cast<const float*>(numbers) + i)
                      : load_floats(static_cast<const bf16*>(numbers) + i);
  }
};

// ---- multiplication

inline f32x16 multiply_add(f32x16 sums, f32x16 a, f32x16 b) { return sums + a * b; }
inline f32x16 multiply_add(f32x16 sums, f32x16 a, const f32x16* b) { return sums + a * *b; }
#ifdef __AVX512BF16__
struct bf16x32 {
  __m512i bits;
};
inline f32x16 multiply_add(f32x16 sums, bf16x32 a, bf16x32 b) {  // each sum gets the products of two neighbours
  return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a.bits, (__m512bh)b.bits);
}
inline f32x16 multiply_add(f32x16 sums, bf16x32 a, const bf16x32* b) {  // GCC would load b into a register first
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a.bits), "m"(*b));
  return sums;
}
#endif

// Calls run(rows, first row) for N rows, four at a time (more do not fit into registers), then for the one to three
// that are left. `rows` is an integral_constant.
template <class Run>
void for_each_four(long N, const Run& run) {
  for (long n = 0; n < N; n += 4) switch (N - n) {
      case 1: run(std::integral_constant<int, 1>(), n); break;
      case 2: run(std::integral_constant<int, 2>(), n); break;
      case 3: run(std::integral_constant<int, 3>(), n); break;
      default: run(std::integral_constant<int, 4>(), n);
    }
}

// ---- shuffles and reductions

inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

using Lanes = std::make_integer_sequence<int, lanes>;

// Lanes of a and b alternate in runs of s: `lower` takes the even runs of both, `upper` the odd ones.
template <int s, class V, int... i>
V lower(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i & s ? lanes + (i ^ s) : i)...);
}
template <int s, class V, int... i>
V upper(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i & s ? lanes + i : i ^ s)...);
}

// Adds lanes i and i ^ s of a, and of b; the sums of both, half of the lanes each.
template <int s>
f32x16 fold(f32x16 a, f32x16 b) {
  return lower<s>(a, b, Lanes()) + upper<s>(a, b, Lanes());
}

// Lane i is the sum of all lanes of v[i]. Overwrites v.
template <int s = 8>
f32x16 horizontal_sums(f32x16* v) {
#pragma GCC unroll 8
  for (int i = 0; i < s; i++) v[i] = fold<s>(v[i], v[i + s]);
  if constexpr (s > 1) return horizontal_sums<s / 2>(v);
  return v[0];
}

inline float horizontal_sum(f32x16 v) {
  using f32x8 = float __attribute__((vector_size(32)));
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[1]) + (b[2] + b[3]);
}

template <int s = 8>
float horizontal_max(f32x16 v) {
  v = max(v, upper<s>(v, v, Lanes()));
  if constexpr (s > 1) return horizontal_max<s / 2>(v);
  return v[0];
}

// A 16 x 16 matrix of words becomes its transpose.
template <int s = 8>
void transpose(u32x16* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++)
    if (!(i & s)) {
      u32x16 a = rows[i], b = rows[i + s];
      rows[i] = lower<s>(a, b, Lanes()), rows[i + s] = upper<s>(a, b, Lanes());
    }
  if constexpr (s > 1) transpose<s / 2>(rows);
}

// Lanes 0 1 2 3 0 1 2 3 ... of four words.
template <class V>
V broadcast_four(const void* from) {
#ifdef __AVX512F__
  return (V)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#else
  const u32x4 v = load<u32x4>(from);
  return (V)__builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#endif
}

// Lanes 0 0 0 0 1 1 1 1 ... of four numbers.
inline f32x16 repeat_each_four(f32x4 v) {
#ifdef __AVX512F__
  const i32x16 places = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (f32x16)_mm512_permutexvar_ps((__m512i)places, _mm512_castps128_ps512((__m128)v));
#else
  return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#endif
}

inline u32x16 concat(u32x4 a, u32x4 b, u32x4 c, u32x4 d) {
  const auto low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// ---- rounding and exponentials

// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
constexpr float round_magic = 12582912.f;
inline f32x16 round_to_integer(f32x16 x) { return x + round_magic - round_magic; }

// 2^x for x <= 0, at least 2^-126: 2^n 2^r with |r| <= 1/2, and 2^r by Taylor's series. Relative error 1e-7; coarse:
// 4e-5, enough for what is rounded to bfloat16.
template <bool coarse>
f32x16 exp2_nonpositive(f32x16 x) {
  x = max(x, f32x16{} - 126.f);
  f32x16 shifted = x + round_magic, r = x - (shifted - round_magic);  // n is in the last bits of `shifted`
  f32x16 p = f32x16{} + (coarse ? 9.6181291e-3f : 1.5403530e-4f);
  if (!coarse) p = p * r + 1.3333558e-3f, p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f, p = p * r + 2.4022651e-1f, p = p * r + 6.9314718e-1f, p = p * r + 1.f;
  return (f32x16)((u32x16)p + ((u32x16)shifted << 23));
}

// e^x: 2^n e^r with |r| <= ln 2 / 2, and e^r by Taylor's series. Relative error 2e-8; zero below -87, e^88 above 88.
inline f32x16 exp(f32x16 x) {
  u32x16 is_zero = (u32x16)(x < -87.f);
  x = max(min(x, f32x16{} + 88.f), f32x16{} - 87.f);
  f32x16 n = round_to_integer(x * 1.44269504f);
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = f32x16{} + 1.f / 5040;
  p = p * r + 1.f / 720, p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6;
  p = p * r + .5f, p = p * r + 1.f, p = p * r + 1.f;
  f32x16 power = (f32x16)(((u32x16) __builtin_convertvector(n, i32x16) + 127) << 23);
  return (f32x16)((u32x16)(power * p) & ~is_zero);
}

// ---- FP8 e4m3: a sign, four bits of exponent, three of mantissa

constexpr float max_e4m3 = 448;

// As bits of a float the exponent is too small by the difference of the biases, 127 - 7.
inline f32x16 from_e4m3(u32x16 bytes) { return (f32x16)((bytes & 0x80) << 24 | (bytes & 0x7f) << 20) * 0x1p120f; }

// The nearest number of e4m3, ties to even, saturating. Normal numbers have three bits of mantissa; below 2^-6 the step
// is 2^-9.
inline f32x16 round_to_e4m3(f32x16 x) {
  u32x16 bits = (u32x16)x, magnitude = bits & 0x7fffffffu;
  u32x16 normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) & 0xfff00000u;
  f32x16 small = (f32x16)magnitude + 0x1p14f * 1.5f - 0x1p14f * 1.5f;
  f32x16 y = (f32x16)magnitude < 0x1p-6f ? small : (f32x16)normal;
  return (f32x16)((u32x16)min(y, f32x16{} + max_e4m3) | (bits & 0x80000000u));
}

// A row of I numbers, divided by a scale so that the largest magnitude is 448, and rounded to e4m3. -> the scale
template <class X, class To>
float quantize_row_e4m3(const X* x, long I, To* to) {
  f32x16 most{};
  for (long i = 0; i < I; i += lanes) {
    f32x16 v = load_floats(x + i);
    most = max(most, max(v, -v));
  }
  const float scale = horizontal_max(most) > 0 ? horizontal_max(most) / max_e4m3 : 1;
  for (long i = 0; i < I; i += lanes) store_floats(to + i, round_to_e4m3(load_floats(x + i) / scale));
  return scale;
}

}  // namespace
