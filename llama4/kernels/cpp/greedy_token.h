// The largest logit of each row, and its log_softmax.

#pragma once

#include "simd.h"

namespace {

// Of a part of a row: the largest logit, the index of the first such, and the sum of e^(x - largest). The sum is NaN if
// any logit is NaN or the largest is infinite.
struct LargestLogit {
  float value = -INFINITY;
  long index = 0;
  double total = 0;

  float logprob() const { return (value - value) - std::log(total); }

  void merge(const LargestLogit& later) {
    const double factor = value == later.value ? 1 : std::exp(-std::abs(value - later.value));
    if (later.value > value) *this = {later.value, later.index, total * factor + later.total};
    else total += later.total * factor;
  }
};

template <class X>
LargestLogit largest_logit(const X* logits, long begin, long end) {
  constexpr long piece = 1024;  // as many as float32 adds up well
  const auto at = [&](long i) {
    if (i + 16 <= end) return load_floats(logits + i);
    f32x16 last = f32x16{} - INFINITY;
    for (long k = i; k < end; k++) last[k - i] = upcast(logits[k]);
    return last;
  };
  f32x16 most = f32x16{} - INFINITY;
  i32x16 where{}, is_nan{}, places;
  for (int lane = 0; lane < lanes; lane++) places[lane] = lane;
  for (long i = begin; i < end; i += 16) {
    f32x16 v = at(i);
    where = select(v > most, places + int(i), where), most = max(v, most), is_nan |= v != v;
  }
  LargestLogit found{horizontal_max(most), end - 1};
  bool has_nan = false;
  for (int lane = 0; lane < 16; lane++) {
    if (most[lane] == found.value) found.index = std::min<long>(found.index, where[lane]);
    has_nan |= is_nan[lane] != 0;
  }
  for (long i = begin; i < end && found.value > -INFINITY;) {
    f32x16 part{};
    for (const long stop = std::min(end, i + piece); i < stop; i += 16) part += exp(at(i) - found.value);
    found.total += horizontal_sum(part);
  }
  if (has_nan) found.total = NAN;
  return found;
}

constexpr long greedy_parts = 16;  // of a row, for more threads than rows

// ids [N]: the index of the largest of V logits, of equals the first; logprobs [N]: its log_softmax.
template <class X>
void greedy_token(Team& team, const X* logits, long N, long V, long* ids, float* logprobs) {
  auto* parts = team.memory<LargestLogit>(N * greedy_parts);
  team.for_each(N * greedy_parts, V / greedy_parts, [=](long i) {
    const long row = i / greedy_parts, part = i % greedy_parts;
    parts[i] = largest_logit(logits + row * V, part * V / greedy_parts, (part + 1) * V / greedy_parts);
  });
  for (long n = 0; n < N; n++) {
    LargestLogit all;
    for (long part = 0; part < greedy_parts; part++) all.merge(parts[n * greedy_parts + part]);
    ids[n] = all.index, logprobs[n] = all.logprob();
  }
}

}  // namespace
