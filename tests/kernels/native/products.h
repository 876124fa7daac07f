// Products with matrices, experts, and quantizing.
//
// Inputs are such that formats which round them lose nothing: all products have one truth.

#pragma once

#include "weights.h"

namespace {

// Rows of which each sixteen inputs have the largest magnitude, 127 or 448 times a power of two: they are integers, or
// e4m3, times that.
Doubles coded_rows(long N, long I, bool is_fp8) {
  Doubles x(N * I);
  for (long i = 0; i < N * I; i++) {
    const bool is_largest = i % 16 == i / 16 % 16;
    const int byte = is_largest ? 0x7e : generator() & 0xbf;
    x[i] = is_fp8 ? from_e4m3(byte) : is_largest ? 127 : int(below(255)) - 127;
    x[i] = std::ldexp(x[i], -5 - int(i / I % 4));
  }
  return x;
}

// Sums in float32; weights of rows in bfloat16 may be rounded to that.
void compare_product(const std::string& what, const Numbers& y, const Doubles& x, const Weights& w, long N) {
  double worst = 0;
  for (long n = 0; n < N; n++)
    for (long o = 0; o < w.O; o++) {
      double truth = 0, magnitudes = 0, squares = 0;
      for (long i = 0; i < w.I; i++) {
        const double own = x[n * w.I + i] * w.at(o, i);
        truth += own, magnitudes += std::abs(own), squares += own * own;
      }
      double allowed = 1e-6 * magnitudes;
      if (y.narrow) allowed += std::abs(truth) / 256 + std::sqrt(squares) / 128;
      const double error = std::abs(y.get(n * w.O + o) - truth) / allowed;
      worst = error >= 0 ? std::max(worst, error) : INFINITY;
    }
  expect(worst <= 1, "%s, %s, %ld rows: %g of what is allowed", what.c_str(), word(y.narrow), N, worst);
}

void products(bool narrow) {
  std::vector<Format> formats = {{"out x in", 0, 32}, {"in x out", 1, 32}};
  for (const Format& own : table(llama4_weight_formats)) formats.push_back(own);
  for (const Format& own : formats) {
    const long I = own.multiple == 256 ? 256 : own.multiple == 64 ? 192 : 160;
    const bool is_in_out = own.name == std::string("in x out");
    for (const long O : {32, 48}) {
      if (is_in_out && O % 32) continue;  // its rows are odd then
      const Weights w(own.name, narrow, O, I);
      const Matrix a = w.matrix();
      for (const long N : O == 32 ? std::vector<long>{1, 7, 9, 14, 17, 23, 71}
                                  : std::vector<long>{1, 2, 3, 4, 13}) {  // in tiles of 32, and never
        Doubles x = coded_rows(N, I, own.name == std::string("fp8"));
        const Numbers rows(x, narrow);
        Numbers y(N * O, narrow);
        call("linear", narrow, rows.data(), N, I, O, long(a.layout), a.w, a.scales, 1l, long(a.group_size), y.data());
        compare_product(own.name, y, x, w, N);
      }
    }
  }
}

Doubles swiglu_of(const Doubles& gate, const Doubles& up) {
  Doubles y(gate.size());
  for (size_t i = 0; i < y.size(); i++) y[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return y;
}
// W x of an expert's rows from `first` on, or all.
Doubles times(const Weights& w, const double* x, long e = 0, long first = 0, long end = -1) {
  Doubles y;
  for (long o = first; o < (end < 0 ? w.O : end); o++) {
    y.push_back(0);
    for (long i = 0; i < w.I; i++) y.back() += w.at(o, i, e) * x[i];
  }
  return y;
}

void experts(bool narrow) {
  const long counts[] = {3, 0, 20}, E = 3, D = 64, F = 96, N = 23;
  for (const char* format : {"out x in", "in x out", "int4", "q8_0", "int4_int8"}) {
    const Weights gate_up(format, narrow, 2 * F, D, E), down(format, narrow, D, F, E);
    Doubles x = normal(N * D), truth;
    for (double& own : x) own /= 64;
    const Numbers rows(x, narrow);
    Numbers y(N * D, narrow);
    const Matrix wide = gate_up.matrix(), narrow_again = down.matrix();
    call("experts", narrow, &wide, &narrow_again, counts, E, rows.data(), y.data());
    for (long e = 0, n = 0; e < E; e++)
      for (long i = 0; i < counts[e]; i++, n++) {
        const double* own = x.data() + n * D;
        const Doubles inner = swiglu_of(times(gate_up, own, e, 0, F), times(gate_up, own, e, F, 2 * F));
        for (double value : times(down, inner.data(), e)) truth.push_back(value);
      }
    const bool rounds = format == std::string("int4_int8");
    compare(std::string("experts in ") + format, y, truth, rounds ? 0.03 : narrow ? 0.02 : 3e-6);
  }
}

void quantize(bool narrow) {
  const long groups = 6, size = 64, count = 4;
  const float ranges[count] = {1, .95, .9, .8};
  Doubles w = normal(groups * size);
  const Numbers weights(w, narrow);
  std::vector<uint32_t> words(groups * size / 8);
  Numbers scales(groups, narrow);
  const float* tried = ranges;
  call("quantize_int4", narrow, weights.data(), groups, size, tried, count, words.data(), scales.data());
  const auto code = [](double weight, double scale) { return std::clamp(std::nearbyint(weight / scale), -8., 7.); };
  for (long g = 0; g < groups; g++) {
    const double* own = w.data() + g * size;
    const double highest = *std::max_element(own, own + size), lowest = *std::min_element(own, own + size);
    const auto error = [&](double scale) {
      double sum = 0;
      for (long i = 0; i < size; i++) sum += std::pow(code(own[i], scale) * scale - own[i], 2);
      return sum;
    };
    double best = INFINITY, reached = 0;
    for (float range : ranges) {
      Doubles scale = {(highest > -lowest ? highest : lowest) * range / -8};
      Numbers(scale, narrow);
      best = std::min(best, error(scale[0]));
    }
    for (long i = 0; i < size; i++) {
      const double value = int(words[(g * size + i) / 8] >> 4 * (i % 8) & 15) - 8, scale = scales.get(g);
      reached += std::pow(value * scale - own[i], 2);
    }
    expect(reached <= error(scales.get(g)) * 1.001 && reached <= best * 1.001,
           "quantize_int4, %s: %g, where %g and %g can be had", word(narrow), reached, error(scales.get(g)), best);
  }
}

}  // namespace
