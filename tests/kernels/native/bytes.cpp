// Sums of products of bytes, exactly, up to the largest bytes that there are.

#include <cstdio>
#include <random>

#include "simd.h"

namespace {

std::mt19937 generator(0);
int failures = 0;

template <int range>
void products() {
  for (int round = 0; round < 100; round++) {
    uint8_t w[64];
    int8_t x[64];
    int32_t sums[16], truth[16];
    for (int i = 0; i < 64; i++) {
      w[i] = round < 2 ? range : generator() % (range + 1);
      x[i] = round == 0 ? -127 : round == 1 ? 127 : int(generator() % 255) - 127;
    }
    for (int i = 0; i < 16; i++) {
      truth[i] = sums[i] = int(generator() % 1000) - 500;
      for (int k = 4 * i; k < 4 * i + 4; k++) truth[i] += w[k] * x[k];
    }
    store(sums, multiply_add_bytes<range>(load<i32x16>(sums), load<u32x16>(w), load<u32x16>(x)));
    failures += !std::equal(sums, sums + 16, truth);
  }
}

}  // namespace

int main() {
  products<1>(), products<15>(), products<127>(), products<255>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
