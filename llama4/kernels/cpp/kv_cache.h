// Keys and values in blocks of 256 tokens of one sequence (llama4/cache/).
//
// A block is the keys [K, 256], then the values [K, 256], of C numbers each in some format; then, if the format is
// quantized, their scales in bfloat16, [2, K, 256].
//
// To add a format: a struct here, and its name in CacheFormats.

#pragma once

#include "format_list.h"
#include "simd.h"

namespace {

constexpr long block_slots = 256;

// ---- formats of C numbers, a `multiple`: the bytes they take, how 16 of them are read, from c on, and how all are
// written, which gives their scale

template <class X>
struct Unquantized {
  static constexpr const char* name = "unquantized";
  static constexpr long multiple = 16;
  static constexpr bool scaled = false;
  static long bytes(long C) { return C * sizeof(X); }
  static f32x16 read(const char* row, long, long c) { return load_floats((const X*)row + c); }
  static float write(char* row, const X* x, long C) {
    std::copy(x, x + C, (X*)row);
    return 1;
  }
};

// scale(the number of the largest magnitude), rounded to bfloat16; NaN if one of them is NaN or infinite.
template <class X, class Scale>
float scale_for(const X* x, long C, const Scale& scale) {
  float most = 0, zeros = 0;
  for (long c = 0; c < C; c++) {
    const float number = upcast(x[c]);
    if (std::abs(number) > std::abs(most)) most = number;
    zeros += zero_or_nan(number);
  }
  bf16 rounded;
  assign(rounded, (most == 0 ? 1 : scale(most)) + zeros);
  return upcast(rounded);
}

inline void store_bytes(char* to, f32x16 integers) {
  auto whole = to_integers(integers);
  for (int i = 0; i < 16; i++) to[i] = (char)whole[i];
}

struct CacheInt8 {  // -127 to 127
  static constexpr const char* name = "int8";
  static constexpr long multiple = 16;
  static constexpr bool scaled = true;
  static long bytes(long C) { return C; }
  static f32x16 read(const char* row, long, long c) {
    return to_floats((i32x16)(widen((const uint8_t*)row + c) << 24) >> 24);
  }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_for(x, C, [](float most) { return std::abs(most) / 127; });
    for (long c = 0; c < C; c += 16)
      store_bytes(row + c, max(min(round_to_integer(load_floats(x + c) / scale), f32x16{} + 127.f), f32x16{} - 127.f));
    return scale;
  }
};

struct CacheFp8 {  // e4m3
  static constexpr const char* name = "fp8";
  static constexpr long multiple = 16;
  static constexpr bool scaled = true;
  static long bytes(long C) { return C; }
  static f32x16 read(const char* row, long, long c) { return from_e4m3(widen((const uint8_t*)row + c)); }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_for(x, C, [](float most) { return std::abs(most) / max_e4m3; });
    for (long c = 0; c < C; c += 16) {
      u32x16 bits = (u32x16)(round_to_e4m3(load_floats(x + c) / scale));
      u32x16 bytes = (u32x16)((f32x16)(bits & 0x7fffffff) * 0x1p-120f) >> 20 | (bits >> 24 & 0x80);
      for (int i = 0; i < 16; i++) row[c + i] = (char)bytes[i];
    }
    return scale;
  }
};

struct CacheInt4 {  // 0 to 15 for -8 to 7; byte i has number i in its low half and number i + C / 2 in its high half
  static constexpr const char* name = "int4";
  static constexpr long multiple = 32;
  static constexpr bool scaled = true;
  static long bytes(long C) { return C / 2; }
  static f32x16 read(const char* row, long C, long c) {
    const bool high = c >= C / 2;
    u32x16 both = widen((const uint8_t*)row + (high ? c - C / 2 : c));
    return to_floats((i32x16)(high ? both >> 4 : both & 15) - 8);
  }
  template <class X>
  static float write(char* row, const X* x, long C) {
    const float scale = scale_for(x, C, [](float most) { return most / -8; });
    for (long c = 0; c < C / 2; c += 16) {
      f32x16 values[2];
      for (int half = 0; half < 2; half++)
        values[half] =
            max(min(round_to_integer(load_floats(x + c + half * C / 2) / scale), f32x16{} + 7.f), f32x16{} - 8.f) + 8.f;
      store_bytes(row + c, values[0] + values[1] * 16.f);
    }
    return scale;
  }
};

template <class X>
using CacheFormats = FormatList<0, Unquantized<X>, CacheInt8, CacheFp8, CacheInt4>;

// ---- a head's keys, or values, of consecutive tokens

template <class F>
struct Head {
  const char* rows;
  const bf16* scales;
  long C, row_bytes;
  f32x16 read(long s, long c) const { return F::read(rows + s * row_bytes, C, c); }
  float scale(long s) const { return F::scaled ? upcast(scales[s]) : 1; }
};

// Of a block: `number` k for the keys of key head k, K + k for its values.
template <class F>
Head<F> head_of(const char* block, long number, long K, long C) {
  const long bytes = F::bytes(C);
  return {block + number * block_slots * bytes,
          (const bf16*)(block + 2 * K * block_slots * bytes) + number * block_slots, C, bytes};
}

template <class F, class X>
void write_head(char* block, long slot, long number, long K, long C, const X* x) {
  const Head<F> head = head_of<F>(block, number, K, C);
  const float scale = F::write(const_cast<char*>(head.rows) + slot * head.row_bytes, x, C);
  if (F::scaled) assign(const_cast<bf16*>(head.scales)[slot], scale);
}

}  // namespace
