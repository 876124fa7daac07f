// Keys and values as llama4/cache.py holds them: in blocks of 256 tokens of one sequence. A block is the keys [K, 256],
// then the values [K, 256], each of C numbers in some format; then, where that is of few bits, their scales in bfloat16,
// [2, K, 256].

#pragma once

#include "vectors.h"

namespace {

constexpr long slots = 256;

// Formats of C numbers: how many bytes they take, how sixteen of them are read, from c on, and how all are written, which
// gives their scale.

template <class X>
struct AsIs {
  static constexpr bool scaled = false;
  static long bytes(long C) { return C * sizeof(X); }
  static f32 read(const char* row, long, long c) { return floats((const X*)row + c); }
  static float write(char* row, const X* x, long C) {
    std::copy(x, x + C, (X*)row);
    return 1;
  }
};

// The number of the largest magnitude, and of what is given to it and comes back, rounded to bfloat16.
template <class X, class Scale>
float scale_of(const X* x, long C, const Scale& scale) {
  float most = 0;
  for (long c = 0; c < C; c++)
    if (std::abs(widened(x[c])) > std::abs(most)) most = widened(x[c]);
  bf16 rounded;
  assign(rounded, most == 0 ? 1 : scale(most));
  return widened(rounded);
}
f32 to_whole(f32 x) { return x + 12582912.f - 12582912.f; }
void store_bytes(char* to, f32 numbers) {
  auto whole = __builtin_convertvector(numbers, i32);
  for (int i = 0; i < 16; i++) to[i] = (char)whole[i];
}

struct EightBits {  // -127 to 127
  static constexpr bool scaled = true;
  static long bytes(long C) { return C; }
  static f32 read(const char* row, long, long c) {
    return __builtin_convertvector((i32)(::bytes((const uint8_t*)row + c) << 24) >> 24, f32);
  }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_of(x, C, [](float most) { return std::abs(most) / 127; });
    for (long c = 0; c < C; c += 16)
      store_bytes(row + c, larger(smaller(to_whole(floats(x + c) / scale), f32{} + 127.f), f32{} - 127.f));
    return scale;
  }
};

struct E4M3 {
  static constexpr bool scaled = true;
  static long bytes(long C) { return C; }
  static f32 read(const char* row, long, long c) { return from_e4m3(::bytes((const uint8_t*)row + c)); }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_of(x, C, [](float most) { return std::abs(most) / 448; });
    for (long c = 0; c < C; c += 16) {
      u32 bits = (u32)(rounded_to_e4m3(floats(x + c) / scale));
      u32 codes = (u32)((f32)(bits & 0x7fffffff) * 0x1p-120f) >> 20 | (bits >> 24 & 0x80);
      for (int i = 0; i < 16; i++) row[c + i] = (char)codes[i];
    }
    return scale;
  }
};

struct FourBits {  // 0 to 15 for -8 to 7; byte i holds number i, low, and number i + C / 2, high
  static constexpr bool scaled = true;
  static long bytes(long C) { return C / 2; }
  static f32 read(const char* row, long C, long c) {
    const bool high = c >= C / 2;
    u32 both = ::bytes((const uint8_t*)row + (high ? c - C / 2 : c));
    return __builtin_convertvector((i32)(high ? both >> 4 : both & 15) - 8, f32);
  }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_of(x, C, [](float most) { return most / -8; });
    for (long c = 0; c < C / 2; c += 16) {
      f32 codes[2];
      for (int half = 0; half < 2; half++)
        codes[half] = larger(smaller(to_whole(floats(x + c + half * C / 2) / scale), f32{} + 7.f), f32{} - 8.f) + 8.f;
      store_bytes(row + c, codes[0] + codes[1] * 16.f);
    }
    return scale;
  }
};

// Calls part(format) with what a number says, as in llama4/cache.py.
template <class X, class Part>
void with_format(long number, const Part& part) {
  switch (number) {
    case 0: return part(AsIs<X>());
    case 1: return part(EightBits());
    case 2: return part(E4M3());
    case 3: return part(FourBits());
  }
}

// The rows of one head: keys or values of consecutive tokens, `bytes` apart.
template <class F>
struct Head {
  const char* rows;
  const bf16* scales;
  long C, bytes;
  f32 read(long s, long c) const { return F::read(rows + s * bytes, C, c); }
  float scale(long s) const { return F::scaled ? widened(scales[s]) : 1; }
};

// Of a block; number k are the keys of key head k, number K + k its values.
template <class F>
Head<F> head_of(const char* block, long number, long K, long C) {
  const long bytes = F::bytes(C);
  return {block + number * slots * bytes, (const bf16*)(block + 2 * K * slots * bytes) + number * slots, C, bytes};
}

template <class F, class X>
void put(char* block, long slot, long number, long K, long C, const X* x) {
  const Head<F> head = head_of<F>(block, number, K, C);
  const float scale = F::write(const_cast<char*>(head.rows) + slot * head.bytes, x, C);
  if (F::scaled) assign(const_cast<bf16*>(head.scales)[slot], scale);
}

}  // namespace
