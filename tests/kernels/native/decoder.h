// A step of a decoder of three layers: a dense one; one with experts, RoPE and a norm of queries and keys; one with
// temperatures and whose experts are in three matrices.

#pragma once

#include "attention.h"
#include "rows.h"

namespace {

constexpr long D = 64, H = 4, K = 2, C = 32, E = 4, top = 2, F = 64, V = 96;

// A layer's weights as they are, and as kernels read them.
struct OwnLayer {
  bool narrow;
  const char* format;
  bool has_experts, is_apart, has_rope, has_norm;

  Weights matrix(long O, long I, long experts = 1) const { return {format, narrow, O, I, experts}; }
  Weights q = matrix(H * C, D), k = matrix(K * C, D), v = matrix(K * C, D), o = matrix(D, H* C);
  Weights gate_up = matrix(is_apart ? F : 2 * F, D, E), expert_up = matrix(F, D, E), down = matrix(D, F, E);
  Weights gate = matrix(F, D), up = matrix(F, D), shared_down = matrix(D, F);
  Doubles input_norm = normal(D), post_norm = normal(D), router = normal(E * D);
  Numbers own_input_norm{input_norm, narrow}, own_post_norm{post_norm, narrow}, own_router{router, narrow};

  Layer layer() const {
    return {q.matrix(),
            k.matrix(),
            v.matrix(),
            o.matrix(),
            gate_up.matrix(),
            is_apart ? expert_up.matrix() : Matrix{},
            down.matrix(),
            gate.matrix(),
            up.matrix(),
            shared_down.matrix(),
            own_input_norm.data(),
            own_post_norm.data(),
            has_experts ? own_router.data() : nullptr,
            H,
            K,
            C,
            has_experts ? E : 0,
            has_experts ? top : 0,
            1e-5,
            has_norm ? 1e-6 : -1};
  }
};

struct Model {
  std::vector<OwnLayer> layers;
  Weights embedding, head;
  Doubles norm;
};

Doubles normed(const Doubles& h, const Doubles& weight) {
  Doubles x = h;
  const double factor = inverse_rms(h.data(), D, 1e-5);
  for (long d = 0; d < D; d++) x[d] *= factor * weight[d];
  return x;
}
void add(Doubles& to, const Doubles& more, double factor = 1) {
  for (size_t i = 0; i < to.size(); i++) to[i] += factor * more[i];
}

// What the head is given for one token, of which h is the embedding; its keys and values are appended to `memory`,
// [layer][token][2 K C]. `margin`: how far the experts that are chosen were above the others, as a part of all logits'
// range, at least.
Doubles decoded(const Model& model, Doubles h, std::vector<std::vector<Doubles>>& memory, const float* rotation,
                double temperature, double& margin) {
  for (size_t i = 0; i < model.layers.size(); i++) {
    const OwnLayer& l = model.layers[i];
    Doubles x = normed(h, l.input_norm), q = times(l.q, x.data()), kv = times(l.k, x.data()), out;
    const auto prepare = [&](Doubles& heads, double factor) {
      for (size_t at = 0; at < heads.size(); at += C) {
        if (l.has_rope) rotate(heads.data() + at, C, rotation);
        const double own = factor * (l.has_norm ? inverse_rms(heads.data() + at, C, 1e-6) : 1);
        for (long c = 0; c < C; c++) heads[at + c] *= own;
      }
    };
    prepare(q, l.has_rope ? 1 : temperature), prepare(kv, 1);
    for (double own : times(l.v, x.data())) kv.push_back(own);
    memory[i].push_back(kv);
    for (long head = 0; head < H; head++) {
      const auto key = [&](long s, long c) { return memory[i][s][head / (H / K) * C + c]; };
      const auto value = [&](long s, long c) { return memory[i][s][(K + head / (H / K)) * C + c]; };
      for (double own : attended(q.data() + head * C, C, memory[i].size(), key, value)) out.push_back(own);
    }
    add(h, times(l.o, out.data()));
    x = normed(h, l.post_norm);
    const Doubles shared = times(l.shared_down, swiglu_of(times(l.gate, x.data()), times(l.up, x.data())).data());
    std::vector<std::pair<double, long>> scores;
    for (long e = 0; l.has_experts && e < E; e++) {
      double logit = 0;
      for (long d = 0; d < D; d++) logit += l.router[e * D + d] * x[d];
      scores.emplace_back(logit, e);
    }
    std::sort(scores.rbegin(), scores.rend());
    if (l.has_experts)
      margin = std::min(margin, (scores[top - 1].first - scores[top].first) / (scores[0].first - scores[E - 1].first));
    for (long n = 0; l.has_experts && n < top; n++) {
      const auto& [logit, e] = scores[n];
      Doubles routed(D);
      add(routed, x, 1 / (1 + std::exp(-logit)));
      const Doubles gate = times(l.gate_up, routed.data(), e, 0, F);
      const Doubles up =
          l.is_apart ? times(l.expert_up, routed.data(), e) : times(l.gate_up, routed.data(), e, F, 2 * F);
      add(h, times(l.down, swiglu_of(gate, up).data(), e));
    }
    add(h, shared);
  }
  return normed(h, model.norm);
}

// -> whether it was done: what rounding may decide has no truth.
bool decoder(bool narrow, const Format& format) {
  Model model{{{narrow, "out x in", false, false, true, false},
               {narrow, "int4", true, false, true, true},
               {narrow, "int8", true, true, false, false}},
              {"q8_0", narrow, V, D},
              {"out x in", narrow, V, D},
              normal(D)};
  const Numbers norm(model.norm, narrow);
  const long count = model.layers.size(), N = 3, B = 2, width = 2, starts[] = {0, 2, 3}, past[] = {5, 300};
  const long ids[] = {7, 90, 33}, lengths[] = {6, 7, 301}, sequence_of[] = {0, 0, 1};
  const std::vector<float> rotation = rotations(N * C / 2);
  const float temperatures[] = {1.5, 1, 2};

  std::vector<std::vector<std::vector<Doubles>>> memory(B, std::vector<std::vector<Doubles>>(count));
  std::vector<std::vector<Cache>> caches(count);
  std::vector<std::vector<void*>> addresses(count);
  std::vector<Layer> layers;
  std::vector<LayerStep> steps;
  for (long i = 0; i < count; i++) {
    for (long b = 0; b < B; b++) {
      Cache& cache = caches[i].emplace_back(format, narrow, width, K, C);
      cache.fill(past[b]);
      addresses[i].insert(addresses[i].end(), cache.addresses.begin(), cache.addresses.end());
      for (long s = 0; s < past[b]; s++) {
        Doubles& own = memory[b][i].emplace_back();
        for (long at = 0; at < 2 * K * C; at++) own.push_back(cache.get(s, at / C, at % C));
      }
    }
    const OwnLayer& l = model.layers[i];
    layers.push_back(l.layer());
    steps.push_back({l.has_rope ? rotation.data() : nullptr, l.has_rope ? nullptr : temperatures, lengths,
                     addresses[i].data(), width, format.number});
  }
  Doubles feature = normal(D), inner, truth;  // of token 1, in the place of its embedding
  const Numbers own_feature(feature, narrow);
  const void* const features[] = {nullptr, own_feature.data(), nullptr};
  double margin = 1;
  for (long n = 0; n < N; n++) {
    Doubles h = feature;
    for (long d = 0; d < D && n != 1; d++) h[d] = model.embedding.at(ids[n], d);
    const Doubles own = decoded(model, h, memory[sequence_of[n]], rotation.data() + n * C, temperatures[n], margin);
    inner.insert(inner.end(), own.begin(), own.end());
    for (double logit : times(model.head, own.data())) truth.push_back(logit);
  }
  if (margin < 0.1) return false;

  Numbers logits(N * V, narrow), hidden(N * D, narrow);
  std::vector<long> best(N);
  std::vector<float> logprobs(N);
  const Decoder own{layers.data(), count, model.embedding.matrix(), norm.data(), model.head.matrix(), 1e-5, 0};
  const Tokens tokens{ids, starts, features, nullptr, B, N, logits.data(), best.data(), logprobs.data(), hidden.data()};
  const Decoder* address = &own;
  const LayerStep* of_layers = steps.data();
  const Tokens* of_step = &tokens;
  call("decode", narrow, address, of_layers, 0l, of_step);

  const std::string what = std::string("decode, cache in ") + format.name;
  if (format.name == std::string("unquantized")) {
    compare(what, logits, truth, narrow ? 0.08 : 1e-5);
    compare(what + ", what the head is given", hidden, inner, narrow ? 0.08 : 1e-5);
  }
  for (long n = 0; n < N; n++) {
    Doubles ours;
    for (long v = 0; v < V; v++) ours.push_back(logits.get(n * V + v));
    greedy(what, ours.data(), V, best[n], logprobs[n], 1e-4);
    // What layer 0 wrote, before anything was read from a cache, is the nearest that the format has.
    for (long head = 0; head < 2 * K; head++) {
      Cache& cache = caches[0][sequence_of[n]];
      const double* meant = memory[sequence_of[n]][0][lengths[n] - 1].data() + head * C;
      double most = 0, error = 0;
      for (long c = 0; c < C; c++) {
        most = std::max(most, std::abs(meant[c]));
        error = std::max(error, std::abs(cache.get(lengths[n] - 1, head, c) - meant[c]));
      }
      const std::string& kind = cache.format;  // of int4 the largest code is 7, and -8 the smallest
      const double allowed = kind == "int8" ? 0.5 / 127 : kind == "fp8" ? 0.5 / 14 : kind == "int4" ? 1 / 8. : 0;
      expect(error <= (allowed * 1.01 + (narrow ? 0.02 : 2e-6)) * most, "%s, %s: wrote %g beside %g", what.c_str(),
             word(narrow), error / most, allowed);
    }
  }
  return true;
}

}  // namespace
