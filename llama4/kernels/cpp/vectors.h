// Registers of sixteen floats: how numbers of fewer bits get into them and out again, and what else all kernels share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "team.h"

namespace {

using f32 = float __attribute__((vector_size(64), aligned(4), may_alias));
using i32 = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using u32 = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using f32x4 = float __attribute__((vector_size(16), aligned(4), may_alias));
using u32x4 = uint32_t __attribute__((vector_size(16), aligned(4), may_alias));
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
  f32 sixteen(long i) const;
  explicit operator bool() const { return numbers != nullptr; }
};

void assign(float& to, float x) { to = x; }
void assign(bf16& to, float x) {  // to the nearest, ties to even; what is not a number stays so
  auto bits = __builtin_bit_cast(uint32_t, x);
  to = x == x ? bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : bf16(0x7fc0);
}

float sum(f32 v) {
  using f32x8 = float __attribute__((vector_size(32)));
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[1]) + (b[2] + b[3]);
}

f32 multiply_add(f32 sums, f32 a, f32 b) { return sums + a * b; }
f32 multiply_add(f32 sums, f32 a, const f32* b) { return sums + a * *b; }
#ifdef __AVX512BF16__
struct bf16s {
  __m512i bits;
};
f32 multiply_add(f32 sums, bf16s a, bf16s b) {  // two neighbours to a sum
  return (f32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a.bits, (__m512bh)b.bits);
}
f32 multiply_add(f32 sums, bf16s a, const bf16s* b) {  // GCC would load b into a register first
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a.bits), "m"(*b));
  return sums;
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

f32 Scales::sixteen(long i) const {
  return wide ? floats(static_cast<const float*>(numbers) + i) : floats(static_cast<const bf16*>(numbers) + i);
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

// Memory for one call, kept from call to call, aligned as registers are.
template <class T, int use>
T* scratch(long count) {
  thread_local std::vector<char> held;
  held.resize(count * sizeof(T) + 64);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held.data()) + 63) & ~uintptr_t(63));
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

f32 smaller(f32 a, f32 b) { return a < b ? a : b; }
f32 larger(f32 a, f32 b) { return a > b ? a : b; }

using Lanes = std::make_integer_sequence<int, 16>;

// The lanes of a whose number lacks the bit s, beside those of b, each in the half, quarter, ... that it had or next to
// it; and the others.
template <int s, class V, int... i>
V lower(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i & s ? 16 + (i ^ s) : i)...);
}
template <int s, class V, int... i>
V upper(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i & s ? 16 + i : i ^ s)...);
}

// Two vectors become one, in which each has half of the lanes: what two of its lanes add up to.
template <int s>
f32 merged(f32 a, f32 b) {
  return lower<s>(a, b, Lanes()) + upper<s>(a, b, Lanes());
}

// The sums of sixteen vectors, as one.
template <int s = 8>
f32 sums(f32* v) {
#pragma GCC unroll 8
  for (int i = 0; i < s; i++) v[i] = merged<s>(v[i], v[i + s]);
  if constexpr (s > 1) return sums<s / 2>(v);
  return v[0];
}

// Sixteen rows of sixteen words become columns: halves, quarters, ... change places.
template <int s = 8>
void transpose(u32* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & s)) {
      u32 a = rows[i], b = rows[i + s];
      rows[i] = lower<s>(a, b, Lanes()), rows[i + s] = upper<s>(a, b, Lanes());
    }
  if constexpr (s > 1) transpose<s / 2>(rows);
}

// Four words, four times; and sixteen from four places.
template <class V>
V four_times(const void* from) {
#ifdef __AVX512F__
  return (V)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#else
  const u32x4 v = load<u32x4>(from);
  return (V)__builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#endif
}
u32 joined(u32x4 a, u32x4 b, u32x4 c, u32x4 d) {
  const auto low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Each of four numbers in four lanes.
f32 each_four_times(f32x4 v) {
#ifdef __AVX512F__
  const i32 places = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (f32)_mm512_permutexvar_ps((__m512i)places, _mm512_castps128_ps512((__m128)v));
#else
  return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#endif
}

template <int s = 8>
float largest(f32 v) {
  v = larger(v, upper<s>(v, v, Lanes()));
  if constexpr (s > 1) return largest<s / 2>(v);
  return v[0];
}

// 2^x for x up to 0: 2^n 2^r with |r| <= 1/2, and 2^r by Taylor's series, which leaves 4e-5, enough for what is rounded
// to bfloat16, or 1e-7. The least is 2^-126.
template <bool coarse>
f32 power_of_two(f32 x) {
  x = larger(x, f32{} - 126.f);
  f32 shifted = x + 12582912.f, r = x - (shifted - 12582912.f);  // whose last bits are n
  f32 p = f32{} + (coarse ? 9.6181291e-3f : 1.5403530e-4f);
  if (!coarse) p = p * r + 1.3333558e-3f, p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f, p = p * r + 2.4022651e-1f, p = p * r + 6.9314718e-1f, p = p * r + 1.f;
  return (f32)((u32)p + ((u32)shifted << 23));
}

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

// e4m3: as bits of a float its exponent is too small by the difference of the biases, 127 - 7.
f32 from_e4m3(u32 codes) { return (f32)((codes & 0x80) << 24 | (codes & 0x7f) << 20) * 0x1p120f; }

// To the nearest number of e4m3: three bits of mantissa, from 2^-6 up, and below that steps of 2^-9.
f32 rounded_to_e4m3(f32 x) {
  u32 bits = (u32)x, magnitude = bits & 0x7fffffffu;
  u32 normal = magnitude + 0x7ffff + (magnitude >> 20 & 1) & 0xfff00000u;
  f32 small = (f32)magnitude + 0x1p14f * 1.5f - 0x1p14f * 1.5f;
  f32 y = (f32)magnitude < 0x1p-6f ? small : (f32)normal;
  return (f32)((u32)smaller(y, f32{} + 448.f) | (bits & 0x80000000u));
}

// A row in e4m3, after division by what makes its largest 448, the largest of e4m3; -> that.
template <class X, class To>
float to_e4m3(const X* x, long I, To* to) {
  f32 most{};
  for (long i = 0; i < I; i += 16) {
    f32 v = floats(x + i);
    most = larger(most, larger(v, -v));
  }
  const float scale = largest(most) > 0 ? largest(most) / 448 : 1;
  for (long i = 0; i < I; i += 16) keep(to + i, rounded_to_e4m3(floats(x + i) / scale));
  return scale;
}

}  // namespace
