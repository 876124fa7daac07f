// Numbers and vectors of 16 of them: conversions from and to narrower numbers, reductions, exponentials.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "threads.h"
#include "vector.h"

namespace {

// ---- one number

inline float upcast(bf16 x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline float upcast(float x) { return x; }

inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {  // to the nearest, ties to even; NaN stays NaN
  auto bits = __builtin_bit_cast(uint32_t, x);
  to = x == x ? bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : bf16(0x7fc0);
}

// ---- loads and stores

inline f32x16 load_floats(const float* from) { return load<f32x16>(from); }
inline f32x16 load_floats(const bf16* from) { return (f32x16)(widen(from) << 16); }

inline void store_floats(float* to, f32x16 values) { store(to, values); }
inline void store_floats(bf16* to, f32x16 values) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  const u32x16 bits = (u32x16)values, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_narrow(to, select(values != values, u32x16{} + 0x7fc0u, rounded));
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
inline f32x16 multiply_add(f32x16 sums, f32x16 a, const f32x16* b) { return sums + a * load<f32x16>(b); }
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

// For what several products share: GCC would load it again for each.
template <class V>
INLINE void keep_in_register([[maybe_unused]] V& v) {
#ifdef __AVX512F__
  if constexpr (requires { v.bits; }) asm("" : "+v"(v.bits));
  else asm("" : "+v"(v));
#endif
}

// Each sum gets the products of its four bytes of w, unsigned and at most `range`, with those of x, from -127 to 127.
template <int range, class S, class W>
INLINE S multiply_add_bytes(S sums, W w, W x) {
  if constexpr (requires { sums.low; }) {
    return {multiply_add_bytes<range>(sums.low, w.low, x.low), multiply_add_bytes<range>(sums.high, w.high, x.high)};
  } else {
#ifdef __AVX512VNNI__
    return (S)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (S)vusdotq_s32((int32x4_t)sums, (uint8x16_t)w, (int8x16_t)x);
#elif defined(__ARM_FEATURE_DOTPROD)
    const auto dot = [x](S sums, W w) { return (S)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)x); };
    if constexpr (range <= 127) return dot(sums, w);
    else return dot(sums, w & 0x7f7f7f7fu) - dot(S{}, w & 0x80808080u);  // the upper bit counts -128
#elif defined(__aarch64__)
    const auto products = [](uint8x8_t w, int8x8_t x) {
      return vpaddlq_s16(vmulq_s16((int16x8_t)vmovl_u8(w), vmovl_s8(x)));
    };
    const auto bytes = (uint8x16_t)w;
    const auto others = (int8x16_t)x;
    return sums + (S)vpaddq_s32(products(vget_low_u8(bytes), vget_low_s8(others)),
                                products(vget_high_u8(bytes), vget_high_s8(others)));
#else
    const auto add = [x](S sums, W w) {  // of w the upper bit alone, or the others: pairs are sums of 16 bits
#ifdef __AVX512BW__
      const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
      return sums + (S)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
      const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
      return sums + (S)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
      for (size_t i = 0; i < sizeof(S); i++) sums[i / 4] += ((const uint8_t*)&w)[i] * ((const int8_t*)&x)[i];
      return sums;
#endif
    };
    if constexpr (range <= 127) return add(sums, w);
    else return add(add(sums, w & 0x7f7f7f7fu), w & 0x80808080u);
#endif
  }
}

#ifdef __AVX2__
// Each sum gets the products of its two signed halves of w with those of x.
template <class S, class W>
INLINE S multiply_add_halves(S sums, W w, W x) {
  if constexpr (requires { sums.low; }) {
    return {multiply_add_halves(sums.low, w.low, x.low), multiply_add_halves(sums.high, w.high, x.high)};
  } else {
#ifdef __AVX512VNNI__
    return (S)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return sums + (S)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#else
    return sums + (S)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
  }
}

// 32 signed bytes as halves of words.
INLINE u32x16 widen_to_halves(const uint8_t* from) {
#ifdef __AVX512BW__
  return (u32x16)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#else
  const auto sixteen = [](const uint8_t* at) {
    return (u32x8)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
  };
  return {sixteen(from), sixteen(from + 16)};
#endif
}

// The signed bytes of words as halves of words: those in even places, then those in odd ones.
INLINE void split_bytes(u32x16 words, u32x16* halves) {
#ifdef __AVX512BW__
  halves[0] = (u32x16)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)words, 8), 8);
  halves[1] = (u32x16)_mm512_srai_epi16((__m512i)words, 8);
#else
  const auto even = [](u32x8 v) { return (u32x8)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)v, 8), 8); };
  const auto odd = [](u32x8 v) { return (u32x8)_mm256_srai_epi16((__m256i)v, 8); };
  halves[0] = {even(words.low), even(words.high)}, halves[1] = {odd(words.low), odd(words.high)};
#endif
}
#endif

// Calls run(rows, first row) for N rows, so many at a time (more do not fit into registers), then for those that are
// left. `rows` is an integral_constant.
template <int together, class Run>
void for_each_rows(long N, const Run& run) {
  const auto run_rest = [&]<int... k>(long n, std::integer_sequence<int, k...>) {
    (void)((N - n == k + 1 && (run(std::integral_constant<int, k + 1>(), n), true)) || ...);
  };
  long n = 0;
  for (; n + together <= N; n += together) run(std::integral_constant<int, together>(), n);
  run_rest(n, std::make_integer_sequence<int, together - 1>());
}
template <class Run>
void for_each_four(long N, const Run& run) {
  for_each_rows<4>(N, run);
}

// ---- shuffles and reductions

// Of NaN and a number both give b, whichever it is: what is to stay NaN is b.
inline f32x16 min(f32x16 a, f32x16 b) { return select(a < b, a, b); }
inline f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }

// Adds lanes i and i ^ s of a, and of b; the sums of both, half of the lanes each.
template <int s>
f32x16 fold(f32x16 a, f32x16 b) {
  return lower<s>(a, b) + upper<s>(a, b);
}

// Lane i is the sum of all lanes of v[i]. Overwrites v.
template <int s = 8>
f32x16 horizontal_sums(f32x16* v) {
#pragma GCC unroll 8
  for (int i = 0; i < s; i++) v[i] = fold<s>(v[i], v[i + s]);
  if constexpr (s > 1) return horizontal_sums<s / 2>(v);
  return v[0];
}

template <class V>
float horizontal_sum(V v) {
  if constexpr (lanes_of<V> == 4) return (v[0] + v[1]) + (v[2] + v[3]);
  else return horizontal_sum(low_half(v) + high_half(v));
}

template <int s = 8>
float horizontal_max(f32x16 v) {
  v = max(v, upper<s>(v, v));
  if constexpr (s > 1) return horizontal_max<s / 2>(v);
  return v[0];
}

// A 16 x 16 matrix of words becomes its transpose; with fewer rows, each square of as many columns.
template <int s = 8, int count = 2 * s>
void transpose(u32x16* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < count; i++)
    if (!(i & s)) {
      u32x16 a = rows[i], b = rows[i + s];
      rows[i] = lower<s>(a, b), rows[i + s] = upper<s>(a, b);
    }
  if constexpr (s > 1) transpose<s / 2, count>(rows);
}

// Lane 4 j + i is lane 4 i + j.
template <class V>
V transpose_fours(V v) {
#ifdef __AVX512F__
  return __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#else
  V to;
  for (int i = 0; i < lanes; i++) to[i] = v[i % 4 * 4 + i / 4];
  return to;
#endif
}

// ---- rounding and exponentials

// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
constexpr float round_magic = 12582912.f;
inline f32x16 round_to_integer(f32x16 x) { return x + round_magic - round_magic; }

// x + power_magic ends in the bits of n + 126, for n the integer nearest to x: shifted by 23 they are 2^(n - 1) for n
// from -125 to 128, and 0 for n = -126.
constexpr float power_magic = round_magic + 126;
inline f32x16 half_power(f32x16 shifted) { return (f32x16)((u32x16)shifted << 23); }

// 2^x for x <= 0, NaN of NaN. It is 2 2^r, by Taylor's series, times 2^(n - 1), with |r| <= 1/2. The former is above 1,
// so that no product is a subnormal number, over which processors take long: it is 0 below -125.5. Relative error 1e-7;
// coarse: 4e-5, enough for what is rounded to bfloat16.
template <bool coarse>
f32x16 exp2_nonpositive(f32x16 x) {
  x = max(f32x16{} - 126.f, x);
  const f32x16 shifted = x + power_magic, r = x - (shifted - power_magic);
  f32x16 p = f32x16{} + 2 * (coarse ? 9.6181291e-3f : 1.5403530e-4f);
  if (!coarse) p = p * r + 2 * 1.3333558e-3f, p = p * r + 2 * 9.6181291e-3f;
  p = p * r + 2 * 5.5504109e-2f, p = p * r + 2 * 2.4022651e-1f, p = p * r + 2 * 6.9314718e-1f, p = p * r + 2.f;
  return p * half_power(shifted);  // multiplied, not put together from bits, NaN stays NaN
}

// e^x, likewise from 2 e^r with |r| <= ln 2 / 2. Relative error 2e-8; zero below -87, infinite above float32's numbers.
inline f32x16 exp(f32x16 x) {
  x = min(f32x16{} + 89.f, max(f32x16{} - 87.5f, x));
  const f32x16 shifted = x * 1.44269504f + power_magic, n = shifted - power_magic;
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = f32x16{} + 2.f / 5040;
  p = p * r + 2.f / 720, p = p * r + 2.f / 120, p = p * r + 2.f / 24, p = p * r + 2.f / 6;
  p = p * r + 1.f, p = p * r + 2.f, p = p * r + 2.f;
  return p * half_power(shifted);
}

// ---- numbers

// 0 of a number, NaN of NaN and infinity: a sum of it tells whether all are numbers. `x * 0` GCC takes for 0.
template <class V>
V zero_or_nan(V x) {
  return x - x;
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
  f32x16 y = select((f32x16)magnitude < 0x1p-6f, small, (f32x16)normal);
  return (f32x16)((u32x16)min(y, f32x16{} + max_e4m3) | (bits & 0x80000000u));
}

// A row of I numbers, divided by a scale so that the largest magnitude is 448, and rounded to e4m3. -> the scale, which
// is NaN if one of them is NaN or infinite.
template <class X, class To>
float quantize_row_e4m3(const X* x, long I, To* to) {
  f32x16 most{}, zeros{};
  for (long i = 0; i < I; i += lanes) {
    f32x16 v = load_floats(x + i);
    most = max(most, max(v, -v));
    zeros += zero_or_nan(v);
  }
  const float scale = (horizontal_max(most) > 0 ? horizontal_max(most) / max_e4m3 : 1) + horizontal_sum(zeros);
  for (long i = 0; i < I; i += lanes) store_floats(to + i, round_to_e4m3(load_floats(x + i) / scale));
  return scale;
}

}  // namespace
