// What is computed of single rows: norms, rotations, activations, the likeliest token.

#pragma once

#include <tuple>

#include "products.h"

namespace {

double inverse_rms(const double* x, long count, double eps) {
  double squares = 0;
  for (long i = 0; i < count; i++) squares += x[i] * x[i];
  return 1 / std::sqrt(squares / count + eps);
}
void rotate(double* x, long C, const float* rotation) {
  for (long c = 0; c < C; c += 2) {
    const double re = x[c], im = x[c + 1];
    x[c] = re * rotation[c] - im * rotation[c + 1], x[c + 1] = re * rotation[c + 1] + im * rotation[c];
  }
}
std::vector<float> rotations(long count) {  // complex numbers of magnitude 1
  std::vector<float> all;
  for (double angle : normal(count)) all.push_back(std::cos(angle)), all.push_back(std::sin(angle));
  return all;
}

void greedy(const std::string& what, const double* logits, long V, long id, double logprob, double tolerance) {
  const long best = std::max_element(logits, logits + V) - logits;
  double total = 0;
  for (long v = 0; v < V; v++) total += std::exp(logits[v] - logits[best]);
  expect(id == best && std::abs(logprob + std::log(total)) < tolerance, "%s: %ld, %g instead of %ld, %g", what.c_str(),
         id, logprob, best, -std::log(total));
}

void rows(bool narrow) {
  const long N = 3, D = 160;
  const double tolerance = narrow ? 0.004 : 1e-6;
  Doubles x = normal(N * D), up = normal(N * D), weight = normal(D), normed;
  const Numbers gate(x, narrow), other(up, narrow), scale(weight, narrow);
  Numbers y(N * D, narrow), wide(x, false);
  for (long n = 0; n < N; n++) {
    const double factor = inverse_rms(x.data() + n * D, D, 1e-5);
    for (long d = 0; d < D; d++) normed.push_back(x[n * D + d] * factor * weight[d]);
  }
  call("rms_norm", narrow, wide.data(), N, D, scale.data(), 1e-5f, y.data());
  compare("rms_norm", y, normed, tolerance);
  call("swiglu", narrow, gate.data(), other.data(), N, D, D, y.data());
  compare("swiglu", y, swiglu_of(x, up), tolerance);

  const long H = 2, C = 80;  // x as [N, H, C]
  const std::vector<float> rotation = rotations(N * C / 2);
  const float factors[] = {1.5, 1, 3}, *all_factors = factors;
  Doubles turned = x, turned_normed;
  for (long i = 0; i < N * H; i++) {
    rotate(turned.data() + i * C, C, rotation.data() + i / H * C);
    const double factor = inverse_rms(turned.data() + i * C, C, 1e-5) * factors[i / H];
    for (long c = 0; c < C; c++) turned_normed.push_back(turned[i * C + c] * factor);
  }
  const float* no_factors = nullptr;
  call("apply_rope", narrow, gate.data(), D, N, H, C, rotation.data(), -1.f, no_factors, y.data());
  compare("apply_rope", y, turned, tolerance);
  call("apply_rope", narrow, gate.data(), D, N, H, C, rotation.data(), 1e-5f, all_factors, y.data());
  compare("apply_rope with a norm", y, turned_normed, tolerance);

  std::vector<long> ids(N);
  std::vector<float> logprobs(N);
  call("greedy_token", narrow, gate.data(), N, D, ids.data(), logprobs.data());
  for (long n = 0; n < N; n++) greedy("greedy_token", x.data() + n * D, D, ids[n], logprobs[n], 1e-5);
}

// The token that a random number takes among those that are left, in the order of their ids.
long drawn(const double* logits, long V, const Draw& draw) {
  std::vector<std::pair<double, long>> kept;  // weights, less than those of what is likelier, and ids
  for (long v = 0; v < V; v++) kept.emplace_back(-logits[v], v);
  std::sort(kept.begin(), kept.end());
  if (draw.top_k) kept.resize(std::min(draw.top_k, V));
  const double most = -kept[0].first;
  double total = 0, sum = 0;
  for (auto& [weight, v] : kept) total += weight = std::exp((-weight - most) / draw.temperature);
  size_t count = 0;
  while (count < kept.size() && sum < draw.top_p * total) sum += kept[count++].first;
  kept.resize(draw.top_p < 1 ? count : kept.size());
  total = sum = 0;
  std::sort(kept.begin(), kept.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (auto& [weight, v] : kept) total += weight = weight < draw.min_p ? 0 : weight;
  for (const auto& [weight, v] : kept)
    if ((sum += weight) > draw.uniform * total) return v;
  return -1;
}

void draws(bool narrow) {
  const long N = 2, V = 300;
  Doubles x = normal(N * V);
  const Numbers logits(x, narrow);
  const std::vector<long> seen{3, 299, 41, 7}, counts{0, 1, 5, 2}, biased{11, 41};
  const std::vector<double> biases{3, -INFINITY};
  const Penalties penalties{seen.data(), counts.data(), biased.data(), biases.data(), 4, 2, 1.3, 0.4, 0.25};
  std::vector<Draw> all;
  for (const auto& [top_k, top_p, min_p] : {std::tuple(0, 1., 0.), {7, 1., 0.}, {0, .6, 0.}, {0, 1., .2}, {40, .7, .1}})
    for (long i = 0; i < 8; i++)
      all.push_back({i % N, top_k, 0.5 + i % 3, top_p, min_p, (i + 0.123) / 8, i < 4 ? nullptr : &penalties, -1, 0});
  call("draw_token", narrow, logits.data(), N, V, all.data(), long(all.size()));
  for (const Draw& draw : all) {
    const double* own = x.data() + draw.row * V;
    Doubles scores(own, own + V);
    for (long i = 0; draw.penalties && i < 4; i++) {
      double& score = scores[seen[i]];
      score = score < 0 ? score * 1.3 : score / 1.3;
      if (counts[i]) score -= 0.25 * counts[i] + 0.4;
    }
    for (long i = 0; draw.penalties && i < 2; i++) scores[biased[i]] += biases[i];
    const long id = drawn(scores.data(), V, draw);
    double total = 0;
    for (long v = 0; v < V; v++) total += std::exp(own[v]);
    const double logprob = own[id] - std::log(total);
    expect(draw.id == id && std::abs(draw.logprob - logprob) < 1e-5, "draw_token, %s: %ld, %g instead of %ld, %g",
           word(narrow), long(draw.id), draw.logprob, id, logprob);
  }
}

}  // namespace
