// The formats of GGUF whose blocks are multiplied as they lie in the file (llama4/quantization/gguf_blocks.py), and one
// of our own like them: rows of W [O, I] are cut into blocks, and a block holds its scales and its values one after the
// other, in bytes.
//
// A row is read in steps: four blocks of 32 weights, or one of 256. A step has two or four vectors of 64 bytes, each
// byte the code of a weight, and value(code) is the integer that it stands for. Sixteen bytes side by side, a quarter
// of a vector, are codes of sixteen inputs side by side, from place(vector, quarter) on. A group of 16 or 32 inputs
// side by side shares a scale. Where a format has one part, all vectors have the same scales in the same places; else
// each is a part of its own. A weight is scale * value, or scale * value + minimum; a minimum is for 32 inputs.
//
// To add a format: a struct here, and its name in QuantizedFormats (formats.h). Beside what is said there it has
//   codes, value         how many codes there are, and the integer of each
//   vectors, group, parts, has_minimum   as above
//   place, row, read     as above; the last step of a row is not `whole` where four blocks are more than are left

#pragma once

#include <array>

#include "simd.h"

namespace {

template <int vectors, int group>
struct BlockStep {
  u32x16 codes[vectors];
  Floats<64 * vectors / group> scales;  // of groups in order
  Floats<64 * vectors / 32> minima;
};
template <class F>
constexpr long step_weights = 64 * F::vectors;

// ---- numbers of 16 bits, and small integers, as floats

INLINE f32x4 from_halves(u32x4 four) {  // in the first two words
#ifdef __F16C__
  return (f32x4)_mm_cvtph_ps((__m128i)four);
#else
#ifdef __aarch64__
  using half = __fp16;
#else
  using half = _Float16;
#endif
  f32x4 floats;
  for (int i = 0; i < 4; i++) floats[i] = float(__builtin_bit_cast(half, uint16_t(four[i / 2] >> 16 * (i % 2))));
  return floats;
#endif
}
INLINE f32x4 from_halves(uint64_t four) {
  using u64x2 = uint64_t __attribute__((vector_size(16)));
  return from_halves((u32x4)u64x2{four});
}
INLINE uint64_t half_at(const uint8_t* from) {
  uint16_t half;
  __builtin_memcpy(&half, from, 2);
  return half;
}
INLINE uint32_t word_at(const uint8_t* from) {
  uint32_t word;
  __builtin_memcpy(&word, from, 4);
  return word;
}
INLINE f32x16 from_unsigned_bytes(u32x4 sixteen) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)sixteen));
#else
  return to_floats((i32x16)widen((const uint8_t*)&sixteen));
#endif
}
INLINE f32x16 from_signed_bytes(u32x4 sixteen) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)sixteen));
#else
  return to_floats((i32x16)(widen((const uint8_t*)&sixteen) << 24) >> 24);
#endif
}

// ---- sixty-four bytes

// The bytes of a table of sixteen, of which codes are the places.
INLINE auto look_up16(auto codes, const uint8_t* table) {
  using V = decltype(codes);
  if constexpr (requires { codes.low; }) {
    return V{look_up16(codes.low, table), look_up16(codes.high, table)};
  } else {
#ifdef __AVX2__
    const __m128i own = _mm_loadu_si128((const __m128i*)table);
#endif
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return (V)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(own), (__m512i)codes);
#endif
#ifdef __AVX2__
    if constexpr (sizeof(V) == 32) return (V)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(own), (__m256i)codes);
#elif defined(__aarch64__)
    return (V)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)codes);
#else
    V found;
    for (size_t i = 0; i < sizeof(V); i++) ((uint8_t*)&found)[i] = table[((const uint8_t*)&codes)[i] & 15];
    return found;
#endif
  }
}

// The low halves of bytes, then the high ones.
INLINE void read_nibbles(u32x16 words, u32x16* codes) {
#ifdef __AVX512F__
  asm("" : "+v"(words));  // GCC would load them twice
#endif
  codes[0] = words & 0x0f0f0f0fu, codes[1] = words >> 4 & 0x0f0f0f0fu;
}

// Each byte less a number, without borrowing from its neighbour. Bytes are below 128.
INLINE u32x16 subtract_bytes(u32x16 bytes, uint32_t number) {
  return ((bytes | 0x80808080u) - number * 0x01010101u) ^ 0x80808080u;
}

// 32 bytes, and 32 others.
INLINE u32x16 halves_at(const uint8_t* a, const uint8_t* b) {
#ifdef __AVX512F__
  return (u32x16)_mm512_mask_loadu_epi64(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), 0xf0, b - 32);
#else
  return concat(load<u32x4>(a), load<u32x4>(a + 16), load<u32x4>(b), load<u32x4>(b + 16));
#endif
}

// 16 for each bit of four words of which only the lower halves count: of the first word's bit 0, then bit 1, and so on.
INLINE u32x16 sixteen_per_bit(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __AVX512BW__
  const uint64_t bits = (b << 16 | (a & 0xffff)) | uint64_t(d << 16 | (c & 0xffff)) << 32;
  return (u32x16)_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(16));
#else
  // Of each four bits one byte each: 0x204081 moves bit i to bit 8 i.
  const auto own = [](uint32_t word) {
    const u32x4 fours = {word & 15, word >> 4 & 15, word >> 8 & 15, word >> 12 & 15};
    return (fours * 0x204081u & 0x01010101u) << 4;
  };
  return concat(own(a), own(b), own(c), own(d));
#endif
}

// Eight words to both ends, shifted to the right: those of the lower end by `low`, of the upper one by `low` + 2.
INLINE u32x16 eight_twice(const uint8_t* from, int low) {
#ifdef __AVX512F__
  const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
  const __m512i upper = _mm512_mask_set1_epi32(_mm512_setzero_si512(), 0xff00, 2);
  return (u32x16)_mm512_srlv_epi32(words, _mm512_add_epi32(upper, _mm512_set1_epi32(low)));
#else
  const u32x4 first = load<u32x4>(from) >> low, last = load<u32x4>(from + 16) >> low;
  return concat(first, last, first >> 2, last >> 2);
#endif
}

// ---- blocks of 32

template <int bytes>
struct SmallBlocks {
  static constexpr long multiple = 32;
  static constexpr int vectors = 2, parts = 1, group = 32, nbytes = bytes;
  static constexpr bool rounds_inputs = false, interleaved = false, grouped = true, has_minimum = false;
  static constexpr int place(int vector, int quarter) { return 32 * quarter + 16 * vector; }
  const uint8_t* w;
  long I;
  const uint8_t* row(long o) const { return w + o * (I / 32) * bytes; }

 protected:
  // Four blocks; where fewer are left, the last one again: its inputs are zero then.
  template <bool whole>
  struct Four {
    const uint8_t* first;
    long step, last;
    const uint8_t* operator[](int i) const {
      if constexpr (whole) return first + (4 * step + i) * bytes;
      return first + std::min(4 * step + i, last) * bytes;
    }
    // A number in 16 bits of each.
    f32x4 halves(int at) const {
      return from_halves(half_at((*this)[0] + at) | half_at((*this)[1] + at) << 16 | half_at((*this)[2] + at) << 32 |
                         half_at((*this)[3] + at) << 48);
    }
    u32x16 sixteens(int at) const {
      return concat(load<u32x4>((*this)[0] + at), load<u32x4>((*this)[1] + at), load<u32x4>((*this)[2] + at),
                    load<u32x4>((*this)[3] + at));
    }
    void nibbles(int at, u32x16* codes) const { read_nibbles(sixteens(at), codes); }
    void fifth_bits(int at, u32x16* codes) const {
      const uint32_t a = word_at((*this)[0] + at), b = word_at((*this)[1] + at), c = word_at((*this)[2] + at),
                     d = word_at((*this)[3] + at);
      codes[0] |= sixteen_per_bit(a, b, c, d);
      codes[1] |= sixteen_per_bit(a >> 16, b >> 16, c >> 16, d >> 16);
    }
  };
  template <bool whole>
  Four<whole> four(const uint8_t* row, long step) const {
    return {row, step, I / 32 - 1};
  }
};

struct Q8_0 : SmallBlocks<34> {
  static constexpr const char* name = "q8_0";
  static constexpr int codes = 256, parts = 2;
  static constexpr int value(int code) { return int8_t(code); }
  static constexpr int place(int vector, int quarter) { return 64 * vector + 16 * quarter; }
  template <bool whole>
  BlockStep<2, 32> read(const uint8_t* row, long step) const {
    const auto blocks = four<whole>(row, step);
    BlockStep<2, 32> s;
    s.scales = blocks.halves(0);
    for (int i = 0; i < 2; i++) s.codes[i] = halves_at(blocks[2 * i] + 2, blocks[2 * i + 1] + 2);
    return s;
  }
};

// Nibbles behind a scale and what else a block begins with: a minimum, and as the last of it the values' fifth bits.
template <int header, bool minimum = false, bool fifth = false>
struct Nibbles : SmallBlocks<header + 16> {
  static constexpr int codes = fifth ? 32 : 16;
  static constexpr bool has_minimum = minimum;
  template <bool whole>
  BlockStep<2, 32> read(const uint8_t* row, long step) const {
    const auto blocks = this->template four<whole>(row, step);
    BlockStep<2, 32> s;
    blocks.nibbles(header, s.codes);
    if constexpr (fifth) blocks.fifth_bits(header - 4, s.codes);
    s.scales = blocks.halves(0);
    if constexpr (minimum) s.minima = blocks.halves(2);
    return s;
  }
};

struct Q4_0 : Nibbles<2> {
  static constexpr const char* name = "q4_0";
  static constexpr int value(int code) { return code - 8; }
};

struct Q4_1 : Nibbles<4, true> {
  static constexpr const char* name = "q4_1";
  static constexpr int value(int code) { return code; }
};

// A word that is a float but for its lowest byte, the value that stands for zero.
struct Int4Zeros : Nibbles<4, true> {
  static constexpr const char* name = "int4_zeros";
  static constexpr int value(int code) { return code; }
  template <bool whole>
  BlockStep<2, 32> read(const uint8_t* row, long step) const {
    const auto blocks = four<whole>(row, step);
    BlockStep<2, 32> s;
    blocks.nibbles(4, s.codes);
    const u32x4 heads = {word_at(blocks[0]), word_at(blocks[1]), word_at(blocks[2]), word_at(blocks[3])};
    s.scales = (f32x4)(heads & ~255u);
    s.minima = -s.scales * __builtin_convertvector((i32x4)(heads & 255u), f32x4);
    return s;
  }
};

struct Q5_0 : Nibbles<6, false, true> {
  static constexpr const char* name = "q5_0";
  static constexpr int value(int code) { return code - 16; }
};

struct Q5_1 : Nibbles<8, true, true> {
  static constexpr const char* name = "q5_1";
  static constexpr int value(int code) { return code; }
};

struct Iq4Nl : Nibbles<2> {
  static constexpr const char* name = "iq4_nl";
  static constexpr int value(int code) {
    constexpr int values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return values[code];
  }
};

struct GgufMxfp4 : Nibbles<1> {
  static constexpr const char* name = "gguf_mxfp4";
  static constexpr int value(int code) {  // twice e2m1
    constexpr int values[] = {0, 1, 2, 3, 4, 6, 8, 12};
    return code & 8 ? -values[code & 7] : values[code];
  }
  template <bool whole>
  BlockStep<2, 32> read(const uint8_t* row, long step) const {
    const auto blocks = four<whole>(row, step);
    BlockStep<2, 32> s;
    blocks.nibbles(1, s.codes);
    // 2^(e - 128), half of the block's power; the two smallest are not normal numbers
    const i32x4 e = {*blocks[0], *blocks[1], *blocks[2], *blocks[3]};
    const i32x4 normal = (e - 1) << 23, small = (e << 21) + (1 << 21);  // of 0: 1 << 21, of 1: 2 << 21
    s.scales = (f32x4)(e < 2 ? small : normal);
    return s;
  }
};

// ---- blocks of 256

// 128 bytes of nibbles, of which the low halves of 64 are a vector of a pair and the high ones the other, and for each
// pair 32 bytes with more bits of them. A format says where they are (`nibbles_at`, `bits_at`, or `has_bits` = false),
// how far bits lie from their lowest place (those of the first half of a vector; of the other two more: `bits_shift`),
// and what codes are of both (`join`).
template <int bytes>
struct LargeBlocks {
  static constexpr long multiple = 256;
  static constexpr int vectors = 4, parts = 4, group = 32, nbytes = bytes;
  static constexpr bool rounds_inputs = false, interleaved = false, grouped = true, has_minimum = false;
  static constexpr bool has_bits = true;
  const uint8_t* w;
  long I;
  const uint8_t* row(long o) const { return w + o * (I / 256) * bytes; }

  static constexpr int place(int vector, int quarter) { return 64 * vector + 16 * quarter; }
};

template <class F>
constexpr bool is_large_blocks = requires { F::nibbles_at; };

template <class F>
INLINE BlockStep<4, F::group> read_large(const uint8_t* block) {
  BlockStep<4, F::group> s;
  for (int pair = 0; pair < 2; pair++) {
    u32x16 bits{};
    if constexpr (F::has_bits) bits = eight_twice(block + F::bits_at(pair), F::bits_shift(pair));
    F::join(load<u32x16>(block + F::nibbles_at + 64 * pair), bits, s.codes + 2 * pair);
  }
  F::read_scales(block, s);
  return s;
}

// Groups of 32, of which two neighbours share bytes: the low halves are the first.
template <int bytes>
struct PairedGroups : LargeBlocks<bytes> {
  static constexpr bool has_minimum = true;
  static constexpr int value(int code) { return code; }
  static constexpr int place(int vector, int quarter) {
    return 128 * (vector / 2) + 64 * (quarter / 2) + 32 * (vector % 2) + 16 * (quarter % 2);
  }
  // Scales and minima of eight groups have six bits each: of groups 0 to 3 the low six of bytes 0 to 3 and 4 to 7; of
  // groups 4 to 7 the halves of bytes 8 to 11, and the two highest bits of those eight.
  static void read_scales(const uint8_t* block, BlockStep<4, 32>& s) {
    const u32x4 head = load<u32x4>(block);  // two scales, and those bytes
    const u32x4 low = __builtin_shufflevector(head, head, 1, 3, 2, 3) >> u32x4{0, 0, 0, 4};
    const u32x4 high = __builtin_shufflevector(head, head, 1, 1, 2, 2) >> 2;
    const u32x4 all =
        (low & u32x4{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f}) | (high & u32x4{0, 0x30303030, 0, 0x30303030});
    const f32x16 scaled = from_unsigned_bytes(all) * eight_of_each(from_halves(head));
    s.scales = low_half(scaled), s.minima = -high_half(scaled);
  }
};

struct Q4_K : PairedGroups<144> {
  static constexpr const char* name = "q4_k";
  static constexpr int codes = 16, nibbles_at = 16;
  static constexpr bool has_bits = false;
  static void join(u32x16 nibbles, u32x16, u32x16* codes) { read_nibbles(nibbles, codes); }
  template <bool>
  auto read(const uint8_t* row, long step) const {
    return read_large<Q4_K>(row + step * nbytes);
  }
};

struct Q5_K : PairedGroups<176> {
  static constexpr const char* name = "q5_k";
  static constexpr int codes = 32, nibbles_at = 48;
  static constexpr int bits_at(int) { return 16; }  // bit i of those 32 bytes is that of group i
  static constexpr int bits_shift(int pair) { return 4 * pair; }
  static void join(u32x16 nibbles, u32x16 bits, u32x16* codes) {
    read_nibbles(nibbles, codes);
    codes[0] |= bits << 4 & 0x10101010u, codes[1] |= bits << 3 & 0x10101010u;
  }
  template <bool>
  auto read(const uint8_t* row, long step) const {
    return read_large<Q5_K>(row + step * nbytes);
  }
};

struct Q6_K : LargeBlocks<210> {
  static constexpr const char* name = "q6_k";
  static constexpr int codes = 64, group = 16, nibbles_at = 0;
  static constexpr int value(int code) { return code - 32; }
  static constexpr int bits_at(int pair) { return 128 + 32 * pair; }  // two of each byte
  static constexpr int bits_shift(int) { return 0; }
  static void join(u32x16 nibbles, u32x16 bits, u32x16* codes) {
    read_nibbles(nibbles, codes);
    codes[0] |= bits << 4 & 0x30303030u, codes[1] |= bits & 0x30303030u;
  }
  static void read_scales(const uint8_t* block, BlockStep<4, 16>& s) {
    s.scales = from_signed_bytes(load<u32x4>(block + 192)) * from_halves(half_at(block + 208))[0];
  }
  template <bool>
  auto read(const uint8_t* row, long step) const {
    return read_large<Q6_K>(row + step * nbytes);
  }
};

// ---- integers of codes

template <class F>
constexpr bool is_block_format = requires { F::nbytes; };

template <class F>
constexpr bool has_minimum = [] {
  if constexpr (is_block_format<F>) return F::has_minimum;
  else return false;
}();

// Whether codes are the integers, but for an offset.
template <class F>
constexpr bool is_linear() {
  for (int code = 0; code < F::codes; code++)
    if (F::value(code) - F::value(0) != code) return false;
  return true;
}

// The least integer, and how far the others are above it.
template <class F>
constexpr int least_value = [] {
  int least = F::value(0);
  for (int code = 1; code < F::codes; code++) least = std::min(least, F::value(code));
  return least;
}();
template <class F>
constexpr int value_range = [] {
  int most = F::value(0);
  for (int code = 1; code < F::codes; code++) most = std::max(most, F::value(code));
  return most - least_value<F>;
}();

template <class F>
struct CodeTables {
  alignas(64) uint8_t bytes[F::codes], from_zero[F::codes];
  alignas(64) float floats[F::codes];
  alignas(64) uint8_t high[F::codes], low[F::codes];  // of a bfloat16
  constexpr CodeTables() : bytes(), from_zero(), floats(), high(), low() {
    for (int code = 0; code < F::codes; code++) {
      from_zero[code] = F::value(code) - least_value<F>;
      bytes[code] = uint8_t(F::value(code)), floats[code] = F::value(code);
      const auto bits = __builtin_bit_cast(uint32_t, floats[code]);
      high[code] = bits >> 24, low[code] = bits >> 16;
    }
  }
};
template <class F>
constexpr CodeTables<F> code_tables;

// Codes -> integers, as signed bytes.
template <class F>
INLINE u32x16 integers_of(u32x16 codes) {
  if constexpr (F::codes == 256 || (F::value(0) == 0 && is_linear<F>())) return codes;
  else if constexpr (F::codes == 16) return look_up16(codes, code_tables<F>.bytes);
  else return subtract_bytes(codes, -F::value(0));
}

// Codes -> integers less the least one, as unsigned bytes.
template <class F>
INLINE u32x16 integers_from_zero(u32x16 codes) {
  if constexpr (F::codes == 256) return codes ^ 0x80808080u;
  else if constexpr (is_linear<F>()) return codes;
  else return look_up16(codes, code_tables<F>.from_zero);
}

// A step of row o of W.
template <class F>
INLINE auto read_step(const F& f, long o, long step) {
  const bool whole = f.I - step * step_weights<F> >= step_weights<F>;
  return whole ? f.template read<true>(f.row(o), step) : f.template read<false>(f.row(o), step);
}

// ---- rows of x rounded to int8

// The same format for rows of x that are rounded to int8, with a scale for each group of inputs: products of
// integers.
template <class F>
struct Int8Inputs : F {
  static constexpr auto joined = [] {
    std::array<char, 24> name{};
    int n = 0;
    for (const char* from : {F::name, "_int8"})
      while (*from) name[n++] = *from++;
    return name;
  }();
  static constexpr const char* name = joined.data();
  static constexpr bool has_int8_inputs = true;
};

template <class F>
constexpr bool has_int8_inputs = requires { F::has_int8_inputs; };

}  // namespace
