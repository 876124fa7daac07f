// Formats of a matrix W [O, I] whose rows are read in order: how a block of a row becomes vectors ("planes").
//
// A block is 64 bytes or fewer of a row, `inputs` numbers. read(o, block, planes) gives them as `planes` vectors of 16
// floats or 32 bfloat16. Input place(plane, lane) of the block stands in that lane of that plane; `run` inputs are
// neighbours there, too. Where a format is `grouped`, its scales are for groups of inputs, and it applies them itself.
//
// To add a quantized format (of GGUF's blocks see gguf_blocks.h): a struct here that says
//   name, multiple   as Python knows it, and of what its inputs are a multiple, whatever the dtype of x and the machine
//   rounds_inputs    whether rows of x are rounded to e4m3
//   interleaved      whether it is read by gemv_int4.h
// and its name in QuantizedFormats below; a faster way to read it for a dtype of x is a `FastestFor`.

#pragma once

#include "format_list.h"
#include "gguf_blocks.h"
#include "simd.h"

namespace {

// 16 numbers to a block, one plane, in order.
template <class W>
struct InOrder {
  using Plane = f32x16;
  static constexpr int planes = 1, inputs = 16, run = 16;
  static constexpr bool grouped = false, rounds_inputs = false, interleaved = false;
  static int place(int, int lane) { return lane; }
  const W* w;
  long I;
  const W* at(long o, long block) const { return w + o * I + 16 * block; }
};

struct Float32 : InOrder<float> {
  void read(long o, long block, Plane* out) const { out[0] = load<f32x16>(at(o, block)); }
};

struct Bfloat16 {
  using Plane = f32x16;
  static constexpr int planes = 2, inputs = 32, run = 1;
  static constexpr bool grouped = false;
  static int place(int plane, int lane) { return 2 * lane + plane; }
  const bf16* w;
  long I;
  const bf16* at(long o, long block) const { return w + o * I + 32 * block; }
  void read(long o, long block, Plane* out) const {
    u32x16 pairs = load<u32x16>(at(o, block));
    out[0] = (f32x16)(pairs << 16);
    out[1] = (f32x16)(pairs & 0xffff0000u);
  }
};

struct Int8 : InOrder<uint8_t> {
  static constexpr const char* name = "int8";
  static constexpr long multiple = 64;
  static constexpr int codes = 256;
  static constexpr int value(int code) { return int8_t(code); }
  void read(long o, long block, Plane* out) const {
    i32x16 values = (i32x16)(widen(at(o, block)) << 24) >> 24;
    out[0] = to_floats(values);
  }
};

// Beside rows of x as integers of 16 bits.
struct Int8Halves : Int8 {
  static constexpr int inputs = 64;
  static constexpr bool has_half_inputs = true;
};
template <class F>
constexpr bool has_half_inputs = requires { F::has_half_inputs; };

struct Fp8 : InOrder<uint8_t> {
  static constexpr const char* name = "fp8";
  static constexpr long multiple = 64;
  static constexpr bool rounds_inputs = true;
  void read(long o, long block, Plane* out) const { out[0] = from_e4m3(widen(at(o, block))); }
};

// Value number `place` of the eight in each of 16 words, -8 to 7; the first is in the lowest bits.
inline f32x16 read_int4(u32x16 words, int place) { return to_floats((i32x16)(words >> (4 * place) & 15) - 8); }

// Eight to a word, and a scale for every 32 inputs or a multiple of them. 16 outputs are interleaved: 32 inputs (16
// bytes) of each, then the next 32 of each; and a scale of each, then the next.
struct Int4 {
  static constexpr const char* name = "int4";
  static constexpr long multiple = 32;
  static constexpr int codes = 16;
  static constexpr int value(int code) { return code - 8; }
  static constexpr bool grouped = true, rounds_inputs = false, interleaved = true;
  static constexpr int interleave = 16, step_inputs = 32, step_bytes = interleave * step_inputs / 2;
  const uint8_t* w;
  long I;
  Scales scales;
  long group;
  const uint8_t* at(long o) const { return w + o / interleave * (I / step_inputs) * step_bytes; }
  f32x16 scales_at(long o, long g) const { return scales.load((o / interleave * (I / group) + g) * interleave); }
};

// ---- the same for products of bfloat16, where the machine has them

#ifdef __AVX512BF16__
struct Bfloat16Pairs : Bfloat16 {
  using Plane = bf16x32;
  static constexpr int planes = 1, run = 32;
  static int place(int, int lane) { return lane; }
  void read(long o, long block, Plane* out) const { out[0].bits = _mm512_loadu_si512(at(o, block)); }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The bfloat16 of 128 numbers, as tables of their high and of their low bytes.
struct ByteTables {
  alignas(64) uint8_t high[128], low[128];
  template <class Number>
  constexpr ByteTables(Number number) : high(), low() {
    for (int i = 0; i < 128; i++) {
      const auto bits = __builtin_bit_cast(uint32_t, float(number(i)));
      high[i] = bits >> 24, low[i] = bits >> 16;
    }
  }
};

struct BytePairs {  // a byte is a sign and an index into tables
  using Plane = bf16x32;
  static constexpr int planes = 2, inputs = 64, run = 8;
  static constexpr bool grouped = false;
  static int place(int plane, int lane) { return lane / 8 * 16 + 8 * plane + lane % 8; }
  const uint8_t* w;
  long I;
  const uint8_t* at(long o, long block) const { return w + o * I + 64 * block; }
  static __m512i look_up(const uint8_t* table, __m512i indices) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), indices, _mm512_load_si512(table + 64));
  }
  static __m512i with_sign_of(__m512i high, __m512i values) {
    return _mm512_ternarylogic_epi64(high, values, _mm512_set1_epi8(-128), 0xf8);
  }
  static void join(__m512i high, __m512i low, Plane* out) {
    out[0].bits = _mm512_unpacklo_epi8(low, high), out[1].bits = _mm512_unpackhi_epi8(low, high);
  }
};

struct Int8Pairs : BytePairs {
  void read(long o, long block, Plane* out) const { convert(_mm512_loadu_si512(at(o, block)), out); }
  static void convert(__m512i values, Plane* out) {
    static constexpr ByteTables integers([](int i) { return i; });
    __m512i magnitudes = _mm512_abs_epi8(values);
    __m512i high = with_sign_of(look_up(integers.high, magnitudes), values);
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitudes), _mm512_set1_epi8(0xc3));  // -128
    join(high, look_up(integers.low, magnitudes), out);
  }
};

struct Fp8Pairs : BytePairs {
  void read(long o, long block, Plane* out) const {
    static constexpr ByteTables e4m3(
        [](int i) { return (i < 8 ? i : 8 + i % 8) * 0x1p-10 * (1 << std::max(i / 8, 1)); });
    __m512i values = _mm512_loadu_si512(at(o, block));
    join(with_sign_of(look_up(e4m3.high, values), values), look_up(e4m3.low, values), out);
  }
};
#endif

// ---- the registered formats

using QuantizedFormats =
    FormatList<2, Int8, Fp8, Int4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, Iq4Nl, GgufMxfp4, Int4Zeros,
               Int8Inputs<Q8_0>, Int8Inputs<Q4_0>, Int8Inputs<Q4_1>, Int8Inputs<Q5_0>, Int8Inputs<Q5_1>,
               Int8Inputs<Q4_K>, Int8Inputs<Q5_K>, Int8Inputs<Q6_K>, Int8Inputs<Iq4Nl>, Int8Inputs<GgufMxfp4>,
               Int8Inputs<Int4Zeros>, Int8Inputs<Int8>, Int8Inputs<Int4>>;  // 0 and 1 are dense

// A format as it is read fastest for few rows of a dtype.
template <class F, class X>
struct FastestFor {
  using Format = F;
};
template <>
struct FastestFor<Float32, bf16> {
#ifdef __AVX512BF16__
  using Format = Bfloat16Pairs;
#else
  using Format = Bfloat16;
#endif
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <>
struct FastestFor<Int8, bf16> {
  using Format = Int8Pairs;
};
template <>
struct FastestFor<Fp8, bf16> {
  using Format = Fp8Pairs;
};
#elif defined(__AVX2__)
template <>
struct FastestFor<Int8, bf16> {
  using Format = Int8Halves;
};
#endif
template <class F, class X>
using Fastest = typename FastestFor<F, X>::Format;

}  // namespace
