// Random numbers, and numbers of 32, 16 and 8 bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "library.h"

namespace {

using Doubles = std::vector<double>;

// ---- random numbers, the same everywhere

std::mt19937 generator(0);

uint32_t below(uint32_t count) { return generator() % count; }
Doubles normal(long count) {
  Doubles values(count);
  for (double& x : values) {
    x = -6;
    for (int i = 0; i < 12; i++) x += generator() * 0x1p-32;
  }
  return values;
}

// ---- numbers of 32, 16 and 8 bits

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
uint16_t narrowed(double x) {
  const auto bits = bits_as<uint32_t>(float(x));
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
double widened(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }
double from_half(int bits) {
  const double magnitude = std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25);  // normal ones
  return bits & 0x8000 ? -magnitude : magnitude;
}
double from_e4m3(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10);
  return byte & 128 ? -magnitude : magnitude;
}

// Numbers in the dtype of rows; what they are made of is rounded to that.
struct Numbers {
  std::vector<char> memory;
  bool narrow;
  Numbers(long count, bool narrow) : memory(count * (narrow ? 2 : 4)), narrow(narrow) {}
  Numbers(Doubles& values, bool narrow) : Numbers(values.size(), narrow) {
    for (size_t i = 0; i < values.size(); i++) set(i, values[i]), values[i] = get(i);
  }
  void set(long i, double x) {
    if (narrow) reinterpret_cast<uint16_t*>(memory.data())[i] = narrowed(x);
    else reinterpret_cast<float*>(memory.data())[i] = x;
  }
  double get(long i) const {
    return narrow ? widened(reinterpret_cast<const uint16_t*>(memory.data())[i])
                  : reinterpret_cast<const float*>(memory.data())[i];
  }
  void* data() { return memory.data(); }
  const void* data() const { return memory.data(); }
};

const char* word(bool narrow) { return narrow ? "bfloat16" : "float32"; }

// The error relative to the largest number.
void compare(const std::string& what, const Numbers& ours, const Doubles& truth, double tolerance) {
  double most = 0, error = 0;
  for (size_t i = 0; i < truth.size(); i++) {
    most = std::max(most, std::abs(truth[i]));
    const double own = std::abs(ours.get(i) - truth[i]);
    error = own >= 0 ? std::max(error, own) : INFINITY;
  }
  expect(error <= tolerance * most, "%s, %s: %g", what.c_str(), word(ours.narrow), error / most);
}

// Numbers [begin, end) have become NaN, and no other has changed.
void compare_nan(const std::string& what, const Numbers& before, const Numbers& after, long begin, long end,
                 long count) {
  long wrong = 0;
  for (long i = 0; i < count; i++)
    wrong += begin <= i && i < end ? !std::isnan(after.get(i)) : after.get(i) != before.get(i);
  expect(!wrong, "%s, %s: %ld numbers are wrong", what.c_str(), word(after.narrow), wrong);
}

}  // namespace
