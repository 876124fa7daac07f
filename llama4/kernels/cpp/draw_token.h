// A token of a row of logits, drawn from those that top_k, top_p and min_p leave. Nothing is sorted as a whole.
//
// Tokens stand in the order of their ids throughout; what is left out of them has the weight 0.

#pragma once

#include <functional>
#include <limits>

#include "greedy_token.h"

namespace {

// What is done to the logits of some tokens before one is drawn.
struct Penalties {
  const long *seen, *counts;  // [num_seen], tokens of prompt and reply, and how often the reply has each
  const long* biased;         // [num_biased], tokens,
  const double* biases;       // and what is added to their logits, last
  int64_t num_seen, num_biased;
  double repetition, presence, frequency;  // 1, 0 and 0 for none
};

// How to draw, and what was drawn.
struct Draw {
  int64_t row, top_k;                // of the logits; of how many tokens, 0 for all
  double temperature, top_p, min_p;  // top_p 1 and min_p 0: of all
  double uniform;                    // a random number in [0, 1)
  const Penalties* penalties;        // nullptr for none
  int64_t id;
  double logprob;  // its log_softmax; NaN if the logits are no numbers
};

// 2^x for x <= 0: 2^n 2^r with |r| <= 1/2, and 2^r by Taylor's series. Relative error 3e-16; zero below 2^-1022.
// Written without branches, so that compilers make vectors of loops over it.
inline double exp2_nonpositive(double x) {
  constexpr double magic = 0x1.8p52;
  const double bounded = x > -1022 ? x : -1022, shifted = bounded + magic, r = bounded - (shifted - magic);
  double p = 1.3691488853904128e-12;
  p = p * r + 2.5678435993488206e-11, p = p * r + 4.4455382718708116e-10, p = p * r + 7.0549116208011234e-9;
  p = p * r + 1.0178086009239700e-7, p = p * r + 1.3215486790144310e-6, p = p * r + 1.5252733804059841e-5;
  p = p * r + 1.5403530393381609e-4, p = p * r + 1.3333558146428443e-3, p = p * r + 9.6181291076284769e-3;
  p = p * r + 5.5504108664821583e-2, p = p * r + 2.4022650695910072e-1, p = p * r + 6.9314718055994529e-1;
  p = p * r + 1;
  const uint64_t bits = __builtin_bit_cast(uint64_t, p) + (__builtin_bit_cast(uint64_t, shifted) << 52);
  return x < -1022 ? 0 : __builtin_bit_cast(double, bits);
}

// Of the numbers above a border, in an order that depends on their count alone.
inline double sum(const double* numbers, long count, double border = 0) {
  double sums[8]{};
  const auto at = [&](long i) { return numbers[i] > border ? numbers[i] : 0; };
  long i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; k++) sums[k] += at(i + k);
  for (; i < count; i++) sums[0] += at(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

struct Candidate {
  double value;
  long place;

  // Of equals the first.
  bool operator<(const Candidate& later) const {
    return value > later.value || (value == later.value && place < later.place);
  }
};

// The `count` largest of V logits that are above minus infinity, or all of them if they are fewer; in order of place.
template <class X>
std::pair<const Candidate*, long> largest(const X* logits, long V, long count) {
  constexpr long piece = 4 * lanes;
  auto* found = scratch<Candidate, Use::words>(2 * count + piece);
  long n = 0;
  float least = -INFINITY;  // of `count` that were found
  for (long i = 0; i < V; i += piece) {
    const long end = std::min(i + piece, V);
    const auto at = [&](long k) { return load_floats(logits + i + k * lanes); };
    if (end - i == piece && !(horizontal_max(max(max(at(0), at(1)), max(at(2), at(3)))) > least)) continue;
    for (long k = i; k < end; k++)
      if (const float value = upcast(logits[k]); value > least) found[n++] = {value, k};
    if (n < 2 * count) continue;
    std::nth_element(found, found + count - 1, found + n);
    n = count, least = float(found[n - 1].value);
  }
  if (n > count) std::nth_element(found, found + count - 1, found + n), n = count;
  std::sort(found, found + n, [](const Candidate& a, const Candidate& b) { return a.place < b.place; });
  return {found, n};
}

// Leaves the weights of the `count` largest of V logits, of equals the first.
template <class X>
void keep_largest(const X* logits, long V, long count, double* weights) {
  auto* sorted = scratch<float, Use::floats>(V);
  for (long i = 0; i < V; i++) sorted[i] = upcast(logits[i]);
  std::nth_element(sorted, sorted + count - 1, sorted + V, std::greater());
  const float least = sorted[count - 1];
  long equal = std::count(sorted, sorted + count, least);  // that are left
  for (long i = 0; i < V; i++)
    if (const float value = upcast(logits[i]); value < least || (value == least && equal-- <= 0)) weights[i] = 0;
}

// Leaves the fewest largest weights that sum to this share of all. The largest is 1.
inline void keep_nucleus(double* weights, long count, double share) {
  const double total = sum(weights, count), needed = share * total;
  double low = (total - needed) / double(2 * count), high = 1;  // those above `low` suffice, those above `high` do not
  auto* found = scratch<double, Use::floats>(count);
  auto* places = scratch<long, Use::floats>(count);
  long n = 0;
  for (long i = 0; i < count; i++) found[n] = weights[i], places[n] = i, n += weights[i] > low;
  for (int halvings = 12; halvings; halvings--) {
    const double middle = std::sqrt(low * high);
    (sum(found, n, middle) < needed ? high : low) = middle;
  }
  auto* border = scratch<Candidate, Use::floats>(n);
  long between = 0, last = 0;
  for (long i = 0; i < n; i++)
    if (found[i] > low && found[i] <= high) border[between++] = {found[i], places[i]};
  if (!between) return;  // all are needed, but for rounding
  std::sort(border, border + between);
  for (double before = sum(found, n, high); last + 1 < between; last++)
    if ((before += border[last].value) >= needed) break;
  for (long i = 0; i < count; i++) weights[i] = border[last] < Candidate{weights[i], i} ? 0 : weights[i];
}

// The place at which the sum of weights passes this share of all.
inline long place_of(const double* weights, long count, double share) {
  constexpr long piece = 256;
  const long pieces = (count + piece - 1) / piece;
  auto* sums = scratch<double, Use::sums>(pieces);
  double total = 0, before = 0;
  for (long i = 0; i < pieces; i++) total += sums[i] = sum(weights + i * piece, std::min(piece, count - i * piece));
  const double target = std::min(share * total, std::nextafter(total, 0.));  // however the product rounds
  long i = 0, found = 0;
  for (; i + 1 < pieces && before + sums[i] <= target; i++) before += sums[i];
  for (long k = i * piece; k < std::min((i + 1) * piece, count); k++) {
    if (!(weights[k] > 0)) continue;
    found = k, before += weights[k];
    if (before > target) break;
  }
  return found;
}

// The token that is drawn from logits of which this is the largest.
template <class X>
long draw_from(const X* logits, long V, const LargestLogit& top, const Draw& draw) {
  if (!std::isfinite(top.value)) return top.index;
  const double scale = std::min(1.4426950408889634 / draw.temperature, std::numeric_limits<double>::max());
  const bool is_limited = draw.top_k > 0 && draw.top_k < V, takes_few = is_limited && draw.top_k <= V / 16;
  const auto [few, count] = takes_few ? largest(logits, V, draw.top_k) : std::pair<const Candidate*, long>(nullptr, V);
  auto* weights = scratch<double, Use::scores>(count);
  if (takes_few) {
    for (long i = 0; i < count; i++) weights[i] = exp2_nonpositive((few[i].value - top.value) * scale);
  } else {
    for (long i = 0; i < V; i++) weights[i] = exp2_nonpositive((double(upcast(logits[i])) - top.value) * scale);
    if (is_limited) keep_largest(logits, V, draw.top_k, weights);
  }
  if (draw.top_p < 1) keep_nucleus(weights, count, draw.top_p);
  if (draw.min_p > 0)  // the largest weight is 1
    for (long i = 0; i < count; i++) weights[i] = weights[i] < draw.min_p ? 0 : weights[i];
  const long place = place_of(weights, count, draw.uniform);
  return takes_few ? few[place].place : place;
}

inline void apply(const Penalties& p, float* logits) {
  const float repetition = p.repetition, presence = p.presence, frequency = p.frequency;
  for (long i = 0; i < p.num_seen; i++) {
    float& logit = logits[p.seen[i]];
    logit = logit < 0 ? logit * repetition : logit / repetition;
    if (p.counts[i]) logit -= frequency * p.counts[i] + presence;
  }
  for (long i = 0; i < p.num_biased; i++) logits[p.biased[i]] += float(p.biases[i]);
}

template <class X>
void draw_token(const X* logits, long V, Draw& draw) {
  const LargestLogit top = largest_logit(logits, 0, V);
  draw.id = top.index, draw.logprob = top.logprob();
  if (std::isnan(draw.logprob)) return;
  if (draw.penalties) {
    auto* changed = scratch<float, Use::scores>(V);
    for (long i = 0; i < V; i++) changed[i] = upcast(logits[i]);
    apply(*draw.penalties, changed);
    draw.id = draw_from(changed, V, largest_logit(changed, 0, V), draw);
  } else {
    draw.id = draw_from(logits, V, top, draw);
  }
  draw.logprob += upcast(logits[draw.id]) - top.value;
}

}  // namespace
