// y = x W for several rows of float32 and W [I, O]: packing W would take as long as using it, so it is read as it lies,
// once.

#pragma once

#include "simd.h"

namespace {

constexpr long max_unpacked_rows = 40;

// sums [R, 16] += R rows of x, [count, x_rows], times 16 outputs of `count` rows of W, as one sum. Prefetches a line
// `ahead` for one row in `every`, from row `first` on.
template <int R, int x_rows = R>
void add_column(const float* x, const float* w, long O, long count, float* sums, const char* ahead, long first,
                long every) {
  if constexpr (4 * R > 3 * vectors_in_registers) {  // in two halves
    constexpr int half = (R + 1) / 2;
    add_column<half, x_rows>(x, w, O, count, sums, ahead, first, every);
    return add_column<R - half, x_rows>(x + half, w, O, count, sums + 16 * half, nullptr, -1, every);
  }
  f32x16 registers[R] = {};
  for (long i = 0; i < count; i++) {
    if (i == first) __builtin_prefetch(ahead + i * O * long(sizeof(*w)), 0, 2), first += every;
    f32x16 weights = load<f32x16>(w + i * O);
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) registers[r] += x[i * x_rows + r] * weights;
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) store(sums + 16 * r, load<f32x16>(sums + 16 * r) + registers[r]);
}

// In tiles of R rows, of which the fewest that suffice are chosen, from 10 to 24: their sums, 16 outputs each, fill the
// registers. W is read in panels of columns, `depth` rows at a time; the sums of a panel wait in the cache.
template <int R = 10>
void gemm_unpacked(Phase& phase, const float* x, long N, long I, long O, const float* w, float* y) {
  constexpr long most = 24, depth = 32, width = 16;
  const long tiles = (N + most - 1) / most, columns = O / 16;
  if constexpr (R < most)
    if (N > tiles * R) return gemm_unpacked<R + 2>(phase, x, N, I, O, w, y);
  float* inputs = phase.team.memory<float>(tiles * R * I);  // [tiles, I, R], with zeros behind the last row
  phase.add_before((I + depth - 1) / depth, depth * N, [=](long task) {
    const long begin = task * depth;
    for (long n = 0; n < tiles * R; n++)
      for (long i = begin; i < std::min(I, begin + depth); i++)
        inputs[(n / R * I + i) * R + n % R] = n < N ? x[n * I + i] : 0;
  });
  const long panel = std::clamp(columns / phase.team.size(), 1l, width);
  phase.add((columns + panel - 1) / panel, tiles * panel * 16 * I, [=](long task) {
    const long begin = task * panel, count = std::min(panel, columns - begin);
    float* sums = scratch<float, Use::sums>(panel * tiles * R * 16);
    std::fill(sums, sums + count * tiles * R * 16, 0.f);
    for (long i = 0; i < I; i += depth)
      for (long n = 0; n < count; n++)
        for (long tile = 0; tile < tiles; tile++) {
          const float* own = w + i * O + (begin + n) * 16;
          const float* next = i + depth < I ? own + depth * O : own + panel * 16 - i * O;  // and the end of its line
          const bool is_last = i + depth >= I && begin + panel >= columns;
          add_column<R>(inputs + (tile * I + i) * R, own, O, std::min(depth, I - i), sums + (n * tiles + tile) * R * 16,
                        (const char*)next + 63, is_last ? -1 : tile, tiles);
        }
    for (long n = 0; n < count; n++)
      for (long row = 0; row < N; row++)
        store(y + row * O + (begin + n) * 16, load<f32x16>(sums + (n * tiles * R + row) * 16));
  });
}

}  // namespace
