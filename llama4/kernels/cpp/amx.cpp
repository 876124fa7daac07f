// The library of AMX: products of tiles for that of AVX512-BF16 (amx.h). Tests compile it with an emulation in the
// place of amx_tiles.h.

#include "amx.h"

#ifndef LLAMA4_TILES
#define LLAMA4_TILES "amx_tiles.h"
#endif
#include LLAMA4_TILES

namespace {

constexpr int tile_rows = 16, row_bytes = 64, row_words = 16, strip = 32, word = 4;

// What `ldtilecfg` reads. Tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of b.
struct Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  explicit Configuration(long depth) {
    for (int t = 0; t < 8; t++) {
      bytes[t] = t == 4 || t == 5 ? depth * word : row_bytes;
      rows[t] = t < 6 ? tile_rows : depth;
    }
  }
};
static_assert(sizeof(Configuration) == 64);

thread_local long depth;

void begin(long words) {
  depth = words;
  const Configuration configuration(words);
  tiles::configure(&configuration);
}
void end() { tiles::release(); }

template <bool has_two>
void add_pairs(const uint32_t* a, long a_row, const uint32_t* b, long count, float* sums) {
  float* lower = sums + tile_rows * strip;
  tiles::load<0>(sums, strip * word), tiles::load<1>(sums + row_words, strip * word);
  if (has_two) tiles::load<2>(lower, strip * word), tiles::load<3>(lower + row_words, strip * word);
  for (long k = 0; k < count; k += row_words) {
    tiles::load<4>(a + k, a_row * word);
    tiles::load<6>(b + k * strip, strip * word), tiles::load<7>(b + k * strip + row_words, strip * word);
    tiles::add_pairs<0, 4, 6>(), tiles::add_pairs<1, 4, 7>();
    if (has_two) {
      tiles::load<5>(a + tile_rows * a_row + k, a_row * word);
      tiles::add_pairs<2, 5, 6>(), tiles::add_pairs<3, 5, 7>();
    }
  }
  tiles::store<0>(sums, strip * word), tiles::store<1>(sums + row_words, strip * word);
  if (has_two) tiles::store<2>(lower, strip * word), tiles::store<3>(lower + row_words, strip * word);
}

void multiply_bytes(const uint32_t* a, long a_row, const uint32_t* b, long count, int32_t* sums) {
  tiles::zero<0>(), tiles::zero<1>();
  for (long k = 0; k < count; k += depth) {
    tiles::load<4>(a + k, a_row * word);
    tiles::load<6>(b + k * strip, strip * word), tiles::load<7>(b + k * strip + row_words, strip * word);
    tiles::add_bytes<0, 4, 6>(), tiles::add_bytes<1, 4, 7>();
  }
  tiles::store<0>(sums, strip * word), tiles::store<1>(sums + row_words, strip * word);
}

constexpr Amx functions{begin, end,
                        [](const uint32_t* a, long a_row, const uint32_t* b, long count, long rows, float* sums) {
                          if (rows == tile_rows) add_pairs<false>(a, a_row, b, count, sums);
                          else add_pairs<true>(a, a_row, b, count, sums);
                        },
                        multiply_bytes};

}  // namespace

// -> nullptr, or why there are no tiles
extern "C" __attribute__((visibility("default"))) const char* llama4_amx(const Amx** to) {
  const char* problem = tiles::request();
  *to = problem ? nullptr : &functions;
  return problem;
}
