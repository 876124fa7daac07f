// What llama4/kernels/cpp/amx_tiles.h does, computed as Intel's manual says (volume 2, LDTILECFG, TILELOADD,
// TDPBF16PS, TDPBSUD, ...), for a machine without AMX. Where the machine would raise an exception the program ends.
//
// Compiled with WRONG_PAIRS or WRONG_BYTES it computes something else; with REFUSED the system has no tiles to give.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
__attribute__((visibility("default"))) long llama4_pairs = 0, llama4_bytes = 0;  // how many products there were
}

namespace {
namespace tiles {

constexpr int count = 8, max_rows = 16, max_bytes = 64, columns = max_bytes / 4;

struct Tile {
  int rows, bytes;  // of a row
  unsigned char data[max_rows][max_bytes];
};
struct State {
  bool is_configured = false;
  Tile tiles[count];
};
inline State& state() {
  thread_local State state;
  return state;
}

inline void require(bool is_true, const char* what) {
  if (is_true) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int t) {
  require(state().is_configured, "no configuration");
  Tile& own = state().tiles[t];
  require(own.rows > 0 && own.bytes > 0, "a tile of no size");
  return own;
}

inline const char* request() {
#ifdef REFUSED
  return "emulated AMX is refused";
#else
  return nullptr;
#endif
}

// Byte 0 is the palette, byte 1 the row to begin with, bytes 16 to 31 bytes of the rows of each tile, bytes 48 to 55
// their number; the others are 0.
inline void configure(const void* memory) {
  unsigned char bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1, from row 0");
  for (int i = 2; i < 64; i++) require(!bytes[i] || (i >= 16 && i < 32) || (i >= 48 && i < 56), "what must be 0");
  for (int t = 0; t < count; t++) {
    const int own = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
    require(own <= max_bytes && rows <= max_rows && !own == !rows, "too large a tile");
    state().tiles[t] = {rows, own, {}};
  }
  state().is_configured = true;
}
inline void release() { state() = {}; }

inline void write(Tile& to, const unsigned char (&data)[max_rows][max_bytes]) {  // and zeros behind its size
  std::memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; r++) std::memcpy(to.data[r], data[r], to.bytes);
}

template <int t>
void zero() {
  write(tile(t), {});
}
template <int t>
void load(const void* from, long row) {
  unsigned char data[max_rows][max_bytes] = {};
  for (int r = 0; r < tile(t).rows; r++)
    std::memcpy(data[r], static_cast<const unsigned char*>(from) + r * row, tile(t).bytes);
  write(tile(t), data);
}
template <int t>
void store(void* to, long row) {
  for (int r = 0; r < tile(t).rows; r++)
    std::memcpy(static_cast<unsigned char*>(to) + r * row, tile(t).data[r], tile(t).bytes);
}

// c [m, n] += a [m, k] b [k, n], of words of 32 bits: add_row(sums, words, row, b) adds to a row of c, all its 16
// places.
template <class Sum, int c, int a, int b, class AddRow>
void add(const AddRow& add_row) {
  static_assert(c != a && c != b && a != b, "an illegal instruction");
  Tile &sums = tile(c), &left = tile(a), &right = tile(b);
  require(sums.rows == left.rows && sums.bytes == right.bytes && left.bytes == 4 * right.rows, "sizes differ");
  require(left.bytes % 4 == 0 && sums.bytes % 4 == 0, "half a word");
  unsigned char data[max_rows][max_bytes] = {};
  for (int m = 0; m < sums.rows; m++) {
    Sum own[columns];
    std::memcpy(own, sums.data[m], sizeof own);
    add_row(own, left.bytes / 4, left.data[m], right.data);
    std::memcpy(data[m], own, sizeof own);
  }
  write(sums, data);
}

// Numbers below the least normal one are zero, as operands and as results.
inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
inline float number(const unsigned char* bf16) {
  const uint32_t bits = uint32_t(bf16[0]) << 16 | uint32_t(bf16[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

// Products of first numbers and those of second ones have sums of their own, from 0, each rounded once for a product;
// then both are added, and that to c.
template <int c, int a, int b>
void add_pairs() {
  __atomic_fetch_add(&llama4_pairs, 1, __ATOMIC_RELAXED);
  add<float, c, a, b>([](float* to, int words, const unsigned char* left, const unsigned char (*right)[max_bytes]) {
    float sums[2][columns] = {};
    for (int k = 0; k < words; k++)
      for (int i = 0; i < 2; i++) {
        const float x = number(left + 4 * k + 2 * i);
        for (int n = 0; n < columns; n++)
          sums[i][n] = flush(__builtin_fmaf(x, number(right[k] + 4 * n + 2 * i), sums[i][n]));
      }
#ifdef WRONG_PAIRS
    std::memcpy(sums[1], sums[0], sizeof sums[0]);
#endif
    for (int n = 0; n < columns; n++) to[n] = flush(flush(to[n]) + flush(sums[0][n] + sums[1][n]));
  });
}

// Signed bytes of a times unsigned ones of b; sums wrap around.
template <int c, int a, int b>
void add_bytes() {
  __atomic_fetch_add(&llama4_bytes, 1, __ATOMIC_RELAXED);
  add<uint32_t, c, a, b>(
      [](uint32_t* to, int words, const unsigned char* left, const unsigned char (*right)[max_bytes]) {
#ifdef WRONG_BYTES
        using Weight = int8_t;
#else
        using Weight = uint8_t;
#endif
        for (int k = 0; k < words; k++)
          for (int i = 0; i < 4; i++)
            for (int n = 0; n < columns; n++) to[n] += uint32_t(int8_t(left[4 * k + i]) * Weight(right[k][4 * n + i]));
      });
}

}  // namespace tiles
}  // namespace
