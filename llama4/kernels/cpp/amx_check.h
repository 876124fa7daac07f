// AMX's library is used if it computes what this one does: one product of each kind, exact in any order.

#pragma once

#include "gemm.h"

#ifdef __AVX512BF16__
namespace {

inline bool computes_the_same(const Amx& amx) {
  constexpr long rows = 2 * amx_rows, words = 32;
  Word pairs[(rows + strip) * words], bytes[(rows + strip) * words], *b = pairs + rows * words;
  for (long i = 0; i < (rows + strip) * words; i++) {
    bytes[i] = uint32_t(i) * 2654435761u;
    bf16 two[2];
    for (int k = 0; k < 2; k++) assign(two[k], float((2 * i + k) * 7 % 31 - 15));
    pairs[i] = Word(two[1]) << 16 | two[0];
  }
  bool is_same = true;
  for (long own : {amx_rows, rows}) {
    float sums[rows * strip], expected[rows * strip];
    for (long i = 0; i < own * strip; i++) sums[i] = expected[i] = float(i);
    for (long r = 0; r < own; r += tile_rows)
      add_tile<2, 2>(pairs + r * words, words, b, strip, words, expected + r * strip, strip);
    amx.begin(16), amx.add_pairs(pairs, words, b, words, own, sums), amx.end();
    is_same &= std::equal(sums, sums + own * strip, expected);
  }
  b = bytes + rows * words;
  for (long depth : {8, 16}) {
    int32_t sums[amx_rows * strip], expected[amx_rows * strip];
    for (long r = 0; r < amx_rows; r++)
      for (long j = 0; j < strip; j += 16) {
        i32x16 own{};
        for (long k = 0; k < words; k++)
          own = multiply_add_bytes<255>(own, load<u32x16>(b + k * strip + j), u32x16{} + bytes[r * words + k]);
        store(expected + r * strip + j, own);
      }
    amx.begin(depth), amx.multiply_bytes(bytes, words, b, words, sums), amx.end();
    is_same &= std::equal(sums, sums + amx_rows * strip, expected);
  }
  return is_same;
}

}  // namespace
#endif
