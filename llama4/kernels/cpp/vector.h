// Vectors of 16 lanes in whatever registers the machine has: one of AVX-512, two of AVX2, four of NEON or SSE.
//
// Written with the vector extensions of GCC and clang. Where registers are shorter, a vector is a pair of halves down
// to a register: GCC takes vectors that are longer than a register apart through memory. What is written as a function
// here (select, to_floats, shuffle) is an operator or a builtin for registers alone.

#pragma once

#include <cstdint>

#ifdef __AVX512F__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int lanes = 16;

using bf16 = uint16_t;  // its bits

using f32x4 = float __attribute__((vector_size(16), aligned(4), may_alias));
using u32x4 = uint32_t __attribute__((vector_size(16), aligned(4), may_alias));
using i32x4 = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
using u8x16 = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));

template <class V>
constexpr int lanes_of = sizeof(V) / 4;

#ifdef __AVX512F__

constexpr int vectors_in_registers = 32;

using f32x16 = float __attribute__((vector_size(64), aligned(4), may_alias));
using i32x16 = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using u32x16 = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using f32x8 = float __attribute__((vector_size(32), aligned(4), may_alias));

#else

constexpr int vectors_in_registers = 8;

// Twice as many lanes as a half has.
template <class Half, class Number>
struct Pair {
  Half low, high;

  // The same bits as other numbers.
  template <class H, class N>
  INLINE explicit operator Pair<H, N>() const {
    return {(H)low, (H)high};
  }
  INLINE Number& operator[](int i) { return reinterpret_cast<Number*>(this)[i]; }
  INLINE Number operator[](int i) const { return reinterpret_cast<const Number*>(this)[i]; }

  INLINE Pair operator-() const { return {-low, -high}; }
  INLINE Pair operator~() const { return {~low, ~high}; }

  // clang-format off
#define OPERATOR(op)                                                                            \
  friend INLINE Pair operator op(Pair a, Pair b) { return {a.low op b.low, a.high op b.high}; } \
  friend INLINE Pair operator op(Pair a, Number b) { return {a.low op b, a.high op b}; }        \
  friend INLINE Pair operator op(Number a, Pair b) { return {a op b.low, a op b.high}; }        \
  INLINE Pair& operator op##=(Pair b) { return *this = *this op b; }                            \
  INLINE Pair& operator op##=(Number b) { return *this = *this op b; }
#define SHIFT(op) \
  friend INLINE Pair operator op(Pair a, int b) { return {a.low op b, a.high op b}; }
#define COMPARISON(op)                                                                               \
  friend INLINE auto operator op(Pair a, Pair b) { return truth(a.low op b.low, a.high op b.high); } \
  friend INLINE auto operator op(Pair a, Number b) { return truth(a.low op b, a.high op b); }
  OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(^)
  SHIFT(<<) SHIFT(>>)
  COMPARISON(<) COMPARISON(>) COMPARISON(!=)
#undef OPERATOR
#undef SHIFT
#undef COMPARISON

 private:
  template <class H>
  static INLINE Pair<H, int32_t> truth(H low, H high) {  // all bits of a lane, or none
    return {low, high};
  }
};
// clang-format on

#ifdef __AVX2__
using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
#else
using f32x8 = Pair<float __attribute__((vector_size(16))), float>;
using i32x8 = Pair<int32_t __attribute__((vector_size(16))), int32_t>;
using u32x8 = Pair<uint32_t __attribute__((vector_size(16))), uint32_t>;
#endif
using f32x16 = Pair<f32x8, float>;
using i32x16 = Pair<i32x8, int32_t>;
using u32x16 = Pair<u32x8, uint32_t>;

#endif

template <int count>
struct FloatsOf {
  using Type = f32x16;
};
template <>
struct FloatsOf<8> {
  using Type = f32x8;
};
template <>
struct FloatsOf<4> {
  using Type = f32x4;
};
template <int count>
using Floats = typename FloatsOf<count>::Type;

static_assert(sizeof(f32x16) == lanes * sizeof(float) && sizeof(float) == 4 && sizeof(long) == 8);

// ---- loads and stores

template <class V>
struct __attribute__((packed, may_alias)) Anywhere {  // in memory, however it is aligned
  V values;
};
template <class V>
INLINE V load(const void* from) {
  if constexpr (requires(V v) { v.low; }) {
    using Half = decltype(V::low);
    return {load<Half>(from), load<Half>(static_cast<const char*>(from) + sizeof(Half))};
  } else {
    return static_cast<const Anywhere<V>*>(from)->values;
  }
}
template <class V>
INLINE void store(void* to, V values) {
  if constexpr (requires { values.low; }) {
    store(to, values.low), store(static_cast<char*>(to) + sizeof values.low, values.high);
  } else {
    static_cast<Anywhere<V>*>(to)->values = values;
  }
}

// ---- what is an operator for one register

template <class Mask, class V>
INLINE V select(Mask mask, V a, V b) {
  if constexpr (requires { mask.low; }) return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  else return mask ? a : b;
}

// V is of as many lanes.
template <class V, class From>
INLINE V convert(From v) {
  if constexpr (requires { v.low; }) return {convert<decltype(V::low)>(v.low), convert<decltype(V::high)>(v.high)};
  else return __builtin_convertvector(v, V);
}
INLINE f32x16 to_floats(i32x16 v) { return convert<f32x16>(v); }
INLINE i32x16 to_integers(f32x16 v) { return convert<i32x16>(v); }

INLINE auto low_half(auto v) {
  if constexpr (requires { v.low; }) return v.low;
  else if constexpr (lanes_of<decltype(v)> == 16) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  else return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}
INLINE auto high_half(auto v) {
  if constexpr (requires { v.low; }) return v.high;
  else if constexpr (lanes_of<decltype(v)> == 16) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  else return __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

// Lane i is lane place(i) of a, or of b if that is `lanes` or more; places are within the same register.
template <auto place, class V, int... i>
INLINE V shuffle_register(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (place(i) >= lanes ? n + (place(i) - lanes) % n : place(i) % n)...);
}
template <auto place, class V>
INLINE V shuffle(V a, V b) {
  if constexpr (requires { a.low; }) return {shuffle<place>(a.low, b.low), shuffle<place>(a.high, b.high)};
  else return shuffle_register<place>(a, b, std::make_integer_sequence<int, lanes_of<V>>());
}

// Lanes of a and b alternate in runs of s: `lower` takes the even runs of both, `upper` the odd ones.
template <int s, class V>
INLINE V lower(V a, V b) {
  if constexpr (!requires { a.low; }) return shuffle<[](int i) { return i & s ? lanes + (i ^ s) : i; }>(a, b);
  else if constexpr (2 * s == lanes_of<V>) return {a.low, b.low};
  else return {lower<s>(a.low, b.low), lower<s>(a.high, b.high)};
}
template <int s, class V>
INLINE V upper(V a, V b) {
  if constexpr (!requires { a.low; }) return shuffle<[](int i) { return i & s ? lanes + i : i ^ s; }>(a, b);
  else if constexpr (2 * s == lanes_of<V>) return {a.high, b.high};
  else return {upper<s>(a.low, b.low), upper<s>(a.high, b.high)};
}

// ---- vectors from fewer or narrower numbers

// Lanes 0 1 2 3 0 1 2 3 ... of four words.
template <class V>
INLINE V broadcast_four(const void* from) {
#ifdef __AVX512F__
  return (V)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#else
  if constexpr (requires(V v) { v.low; }) {
    const auto half = broadcast_four<decltype(V::low)>(from);
    return {half, half};
  } else if constexpr (lanes_of<V> == 8) {
    const u32x4 v = load<u32x4>(from);
    return (V)__builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3);
  } else {
    return load<V>(from);
  }
#endif
}

// Lanes 0 0 0 0 1 1 1 1 ... of four numbers.
INLINE f32x16 repeat_each_four(f32x4 v) {
#ifdef __AVX512F__
  const i32x16 places = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (f32x16)_mm512_permutexvar_ps((__m512i)places, _mm512_castps128_ps512((__m128)v));
#elif defined(__AVX2__)
  return {__builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1), __builtin_shufflevector(v, v, 2, 2, 2, 2, 3, 3, 3, 3)};
#else
  return {{v[0] - f32x4{}, v[1] - f32x4{}}, {v[2] - f32x4{}, v[3] - f32x4{}}};
#endif
}

// Eight lanes of the first of four numbers, then eight of the second.
INLINE f32x16 eight_of_each(f32x4 v) {
#ifdef __AVX512F__
  const i32x16 places = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  return (f32x16)_mm512_permutexvar_ps((__m512i)places, _mm512_castps128_ps512((__m128)v));
#else
  return {v[0] - f32x8{}, v[1] - f32x8{}};
#endif
}

INLINE u32x16 concat(u32x4 a, u32x4 b, u32x4 c, u32x4 d) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const auto low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
#ifdef __AVX512F__
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return {low, high};
#else
  return {{a, b}, {c, d}};
#endif
}

// The same numbers, and zeros in the other lanes.
template <class V>
INLINE f32x16 with_zeros(V v) {
#ifdef __AVX512F__  // through memory it would be waited for: what is loaded was stored in two parts
  if constexpr (sizeof v == 16) return (f32x16)_mm512_zextps128_ps512((__m128)v);
  else return (f32x16)_mm512_zextps256_ps512((__m256)v);
#else
  f32x16 wide{};
  __builtin_memcpy(&wide, &v, sizeof v);
  return wide;
#endif
}

// 16 bytes, or 16 numbers of two bytes, as words.
INLINE u32x16 widen(const uint8_t* from) {
#ifdef __AVX512F__
  return (u32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  const auto eight = [](const uint8_t* at) { return (u32x8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)); };
  return {eight(from), eight(from + 8)};
#else
  using u8x4 = uint8_t __attribute__((vector_size(4)));
  const auto four = [](const uint8_t* at) { return __builtin_convertvector(load<u8x4>(at), u32x4); };
  return {{four(from), four(from + 4)}, {four(from + 8), four(from + 12)}};
#endif
}
INLINE u32x16 widen(const uint16_t* from) {
#ifdef __AVX512F__
  return (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  const auto eight = [](const uint16_t* at) {
    return (u32x8)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
  };
  return {eight(from), eight(from + 8)};
#else
  using u16x4 = uint16_t __attribute__((vector_size(8)));
  const auto four = [](const uint16_t* at) { return __builtin_convertvector(load<u16x4>(at), u32x4); };
  return {{four(from), four(from + 4)}, {four(from + 8), four(from + 12)}};
#endif
}

// The low bytes of 16 words.
INLINE void store_low(int8_t* to, i32x16 words) {
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)words));
#else
  for (int i = 0; i < 16; i++) to[i] = words[i];
#endif
}

// The low halves of 16 words.
INLINE void store_low(int16_t* to, i32x16 words) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
#else
  for (int i = 0; i < 16; i++) to[i] = words[i];
#endif
}

// The low halves of 16 words, of which the high halves are zero.
INLINE void store_narrow(uint16_t* to, u32x16 words) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__)
  const __m256i fours = _mm256_packus_epi32((__m256i)words.low, (__m256i)words.high);  // of low, high, low, high
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(fours, 0xd8));
#else
  using u16x4 = uint16_t __attribute__((vector_size(8)));
  const auto four = [](uint16_t* at, auto v) { store(at, __builtin_convertvector(v, u16x4)); };
  four(to, words.low.low), four(to + 4, words.low.high), four(to + 8, words.high.low), four(to + 12, words.high.high);
#endif
}

}  // namespace
