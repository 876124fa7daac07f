// AMX: products of tiles, of 16 rows of 64 bytes. They are a library of their own (amx.cpp), which that of AVX512-BF16
// is given where the machine has it.
//
// A word is two bfloat16 or four bytes, neighbours along the inputs. Rows of a are a_row words apart; b and sums have
// rows of 32.

#pragma once

#include <cstdint>

struct Amx {
  // Before and after what a thread multiplies: so many words at once, at most 16.
  void (*begin)(long depth);
  void (*end)();
  // sums [rows, 32] += a [rows, count] b [count, 32] in bfloat16, for 16 or 32 rows and a multiple of 16 words.
  void (*add_pairs)(const uint32_t* a, long a_row, const uint32_t* b, long count, long rows, float* sums);
  // sums [16, 32] = a [16, count] b [count, 32], signed bytes times unsigned ones, for a multiple of `depth` words.
  void (*multiply_bytes)(const uint32_t* a, long a_row, const uint32_t* b, long count, int32_t* sums);
};

namespace {

#ifdef __AVX512BF16__
const Amx* amx = nullptr;  // null: not there
#else
constexpr const Amx* amx = nullptr;
#endif

// Fewest rows that go by AMX: as many as a tile has.
constexpr long amx_rows = 16;
inline bool uses_amx(long N) { return amx && N >= amx_rows; }
// Rows of a tile.
inline long amx_height(long N) { return N < 2 * amx_rows ? amx_rows : 2 * amx_rows; }

// A thread's use of tiles, if it has any. It ends before the thread sleeps or goes back to the program: others
// configure tiles as they need them.
class AmxScope {
  const bool is_used;

 public:
  AmxScope(bool is_used, long depth) : is_used(is_used) {
    if (is_used) amx->begin(depth);
  }
  ~AmxScope() {
    if (is_used) amx->end();
  }
  AmxScope(const AmxScope&) = delete;
};

}  // namespace
