// A step of the decoder, from token ids to logits, in one call: what the modules of llama4/model/ compute, in the same
// order and precision, without the microseconds that Python and torch spend between two products.
//
// Shapes: N tokens of B sequences, D hidden size, H query heads, K key heads, C head_dim, E experts, k experts per
// token, R = N k routed rows, F expert or MLP width, V vocabulary.

#pragma once

#include "attention.h"
#include "experts.h"
#include "flash_attention.h"
#include "greedy_token.h"

namespace {

struct Layer {
  Matrix q, k, v, o, gate_up, expert_up, down;  // expert_up: where it is apart, and gate_up is the gate alone
  Matrix gate, up, shared_down;                 // of the shared expert, or of the dense MLP
  const void *input_norm, *post_norm, *router;  // router: nullptr in a dense layer
  int64_t H, K, C, E, experts_per_token;        // none in a dense layer
  double eps, qk_eps;                           // qk_eps: negative without QK-norm
};

struct Decoder {
  const Layer* layers;
  int64_t num_layers;
  Matrix embedding;
  const void* norm;
  Matrix head;
  double eps;
  int64_t is_batch_invariant;  // whether a row's logits are the same bits, whatever rows stand beside it
};

// What a layer needs to know of the tokens of several steps to come: rotations [steps, N, C] and temperatures [steps,
// N], if it has them; how many tokens of its sequence, or chunk, each token sees, itself included, [steps, N]; and the
// blocks of each sequence, or its chunk, [B, width].
struct LayerStep {
  const float *rotations, *temperatures;
  const long* lengths;
  char* const* block_table;
  int64_t width, format;
};

// Tokens of a step and what is wanted of them. The tokens of a sequence are consecutive and see each other causally; in
// chunked layers all of them are in one chunk. Their keys and values are written first, and read from the cache.
struct Tokens {
  const long* ids;              // [N]
  const long* sequence_starts;  // [B + 1], where sequences begin among the tokens; nullptr: each has one
  const void* const* features;  // [N], what stands in the place of a token's embedding, [D], or nullptr; none: nullptr
  const long* outputs;          // [num_outputs], tokens whose logits are wanted; nullptr: the first ones
  int64_t B, num_outputs;
  void* logits;       // [num_outputs, V]
  long* greedy;       // [num_outputs], the index of the largest logit, of equals the first
  float* logprobs;    // [num_outputs], its log_softmax
  void* hidden;       // [N, D], what the head is given for each token; nullptr if it is not wanted
  float* residual;    // [N, D], where a call is for one layer, what it is given and gives to the next; nullptr: for all
  int64_t layer;      // that layer
  int64_t is_prompt;  // whether there are so many of each sequence that attention goes by tiles of queries
};

// The k largest logits, the lowest index on ties, and their sigmoid. NaN is larger than all, as in torch.
inline void choose_experts(const float* logits, long E, long k, long* experts, float* scores) {
  const auto is_larger = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  for (long i = 0; i < k; i++) {
    long best = -1;
    for (long e = 0; e < E; e++)
      if (std::find(experts, experts + i, e) == experts + i && (best < 0 || is_larger(logits[e], logits[best])))
        best = e;
    experts[i] = best, scores[i] = 1 / (1 + std::exp(-logits[best]));
  }
}

// R choices of experts, sorted by expert: those of token n, in this order, are rows[n k] to rows[n k + k - 1].
struct Routes {
  long R, k, *experts, *choices, *rows;  // expert of a choice; choice of a row; rows of a token's choices
  float* scores;                         // of a choice

  Routes(Team& team, const float* logits, long N, long E, long k) : R(N * k), k(k) {
    experts = team.memory<long>(3 * R), choices = experts + R, rows = choices + R;
    scores = team.memory<float>(R);
    for (long n = 0; n < N; n++) choose_experts(logits + n * E, E, k, experts + n * k, scores + n * k);
    for (long i = 0; i < R; i++) choices[i] = i;
    std::sort(choices, choices + R,
              [&](long i, long j) { return std::pair(experts[i], i) < std::pair(experts[j], j); });
    for (long i = 0; i < R; i++) rows[choices[i]] = i;
    for (long n = 0; n < N; n++) std::sort(rows + n * k, rows + (n + 1) * k);
  }

  // Calls run(expert, first row, rows) for each expert that has any.
  template <class Run>
  void for_each_expert(const Run& run) const {
    for (long i = 0, count; i < R; i += count) {
      for (count = 1; i + count < R && experts[choices[i + count]] == experts[choices[i]];) count++;
      run(experts[choices[i]], i, count);
    }
  }
};

template <class X>
void add(float* to, const X* from, long count) {
  for (long i = 0; i < count; i += 16) store(to + i, load<f32x16>(to + i) + load_floats(from + i));
}

template <class X>
class DecoderStep {
  const Decoder& d;
  const LayerStep* layer_steps;
  const long step;
  const Tokens tokens;
  const Sequences sequences;
  const long N, D;
  Team team;
  const long* sequence_of;  // [N], of each token
  float* h;                 // [N, D], the residual stream
  X* x;                     // [N, D], normalised

  void norm(const void* weight, double eps, long from, long to) const {
    rms_norm(h + from * D, D, (const X*)weight, eps, x + to * D);
  }

  void attention(const Layer& l, const LayerStep& s) {
    const auto scope = team.scope();
    const long H = l.H, K = l.K, C = l.C, *lengths = s.lengths + step * N;
    X *q = team.memory<X>(N * H * C), *k = team.memory<X>(N * K * C), *v = team.memory<X>(N * K * C);
    team.for_each(N, D, [&](long n) { norm(l.input_norm, l.eps, n, n); });
    Phase inputs(team);
    multiply(inputs, {{l.q, q}, {l.k, k}, {l.v, v}}, x, N, d.is_batch_invariant);
    inputs.run();
    CacheFormats<X>::visit(s.format, [&](auto format) {
      using F = decltype(format);
      team.for_each(N * (H + K), C, [&](long i) {
        const long n = i / (H + K), head = i % (H + K), key = head - H;
        const float* rotation = s.rotations ? s.rotations + (step * N + n) * C : nullptr;
        const float temperature = s.temperatures && key < 0 ? s.temperatures[step * N + n] : 1;
        X* own = key < 0 ? q + (n * H + head) * C : k + (n * K + key) * C;
        if (rotation || l.qk_eps >= 0 || temperature != 1) apply_rope(own, C, rotation, l.qk_eps, temperature, own);
        if (key < 0) return;
        const long slot = lengths[n] - 1;
        char* block = s.block_table[sequence_of[n] * s.width + slot / block_slots];
        write_head<F>(block, slot % block_slots, key, K, C, own);
        write_head<F>(block, slot % block_slots, K + key, K, C, v + (n * K + key) * C);
      });
      if (!tokens.is_prompt) return attend<F>(team, q, s.block_table, s.width, lengths, sequences, H, K, C, q);
      for (long b = 0; b < sequences.B; b++) {
        const long n = sequences.begin(b), count = sequences.end(b) - n;
        attend_causal<F>(team, q + n * H * C, k + n * K * C, v + n * K * C, count, s.block_table + b * s.width,
                         lengths[n] - 1, H, K, C, q + n * H * C);
      }
    });
    Phase output(team);
    multiply(output, {{l.o, x}}, q, N, d.is_batch_invariant);
    output.run();
    team.for_each(N, D, [&](long n) { add(h + n * D, x + n * D, D); });
  }

  // The experts, if there are any, and the shared one beside them; or the dense MLP.
  void feed_forward(const Layer& l) {
    const auto scope = team.scope();
    float* logits = team.memory<float>(N * l.E);
    team.for_each(N, D, [&](long n) { norm(l.post_norm, l.eps, n, n); });
    if (l.router) {
      constexpr long together = 32;  // rows, so that threads share them
      Phase phase(team);
      for (long n = 0; n < N; n += together) {
        const Product<Fastest<Float32, X>, float> router{{(const X*)l.router, D}, l.E, Scales{}, logits + n * l.E};
        gemv(phase, &router, 1, x + n * D, std::min(together, N - n));
      }
      phase.run();
    }
    const Routes routes(team, logits, N, l.E, l.experts_per_token);
    const long R = routes.R, F_expert = l.down.I, F = l.gate.O;
    X *routed = team.memory<X>(R * D), *gate_up = team.memory<X>(R * 2 * F_expert);
    X *routed_inner = team.memory<X>(R * F_expert), *gate = team.memory<X>(N * F), *up = team.memory<X>(N * F);
    team.for_each(R, D, [&](long i) {
      const long choice = routes.choices[i];
      const X* from = x + choice / routes.k * D;
      for (long d = 0; d < D; d += 16) store_floats(routed + i * D + d, load_floats(from + d) * routes.scores[choice]);
    });
    const auto multiply_experts = [&](Phase& phase, const Matrix& a, const X* rows, X* y) {
      routes.for_each_expert([&](long e, long i, long count) {
        multiply(phase, {{a.expert(e), y + i * a.O}}, rows + i * a.I, count, d.is_batch_invariant);
      });
    };
    const auto run = [&](const auto& add_products) {
      const auto scope = team.scope();
      Phase phase(team);
      add_products(phase), phase.run();
    };
    const bool is_apart = l.expert_up.w;
    X* expert_up = gate_up + (is_apart ? R * F_expert : F_expert);
    run([&](Phase& wide) {
      multiply_experts(wide, l.gate_up, routed, gate_up);
      if (is_apart) multiply_experts(wide, l.expert_up, routed, expert_up);
      multiply(wide, {{l.gate, gate}, {l.up, up}}, x, N, d.is_batch_invariant);
    });
    run([&](Phase& between) {
      swiglu_rows(between, gate_up, expert_up, R, F_expert, l.gate_up.O, routed_inner);
      swiglu_rows(between, gate, up, N, F, F, gate);
    });
    run([&](Phase& down) {
      multiply_experts(down, l.down, routed_inner, routed);
      multiply(down, {{l.shared_down, x}}, gate, N, d.is_batch_invariant);
    });
    team.for_each(N, D, [&](long n) {
      for (long i = n * routes.k; i < (n + 1) * routes.k; i++) add(h + n * D, routed + routes.rows[i] * D, D);
      add(h + n * D, x + n * D, D);
    });
  }

 public:
  DecoderStep(long threads, const Decoder& d, const LayerStep* layer_steps, long step, const Tokens& tokens)
      : d(d),
        layer_steps(layer_steps),
        step(step),
        tokens(tokens),
        sequences{tokens.sequence_starts, tokens.B},
        N(sequences.N()),
        D(d.head.I),
        team(d.layers[0].gate.numbers() > min_parallel ? threads : 1),
        h(tokens.residual ? tokens.residual : team.memory<float>(N * D)),
        x(team.memory<X>(N * D)) {
    long* sequence = team.memory<long>(N);
    for (long b = 0; b < tokens.B; b++) std::fill(sequence + sequences.begin(b), sequence + sequences.end(b), b);
    sequence_of = sequence;
  }

  void run() {
    const long begin = tokens.residual ? tokens.layer : 0, end = tokens.residual ? begin + 1 : d.num_layers;
    if (begin == 0) embed();
    for (long i = begin; i < end; i++) attention(d.layers[i], layer_steps[i]), feed_forward(d.layers[i]);
    if (end == d.num_layers) finish();
  }

 private:
  void embed() {
    team.for_each(N, D, [&](long n) {
      float* to = h + n * D;
      const X* given = tokens.features ? (const X*)tokens.features[n] : nullptr;
      const X* embedding = given ? given : (const X*)d.embedding.w + tokens.ids[n] * D;
      if (!given && d.embedding.layout != OUT_IN) return read_row(d.embedding, tokens.ids[n], to);
      for (long i = 0; i < D; i += 16) store(to + i, load_floats(embedding + i));
    });
  }

  // What the head is given, and what it gives.
  void finish() {
    if (X* hidden = (X*)tokens.hidden)
      team.for_each(N, D, [&](long n) { rms_norm(h + n * D, D, (const X*)d.norm, d.eps, hidden + n * D); });
    const long outputs = tokens.num_outputs;
    if (!outputs) return;
    X* logits = (X*)tokens.logits;
    team.for_each(outputs, D, [&](long i) { norm(d.norm, d.eps, tokens.outputs ? tokens.outputs[i] : i, i); });
    Phase head(team);
    multiply(head, {{d.head, logits}}, x, outputs, d.is_batch_invariant);
    head.run();
    greedy_token(team, logits, outputs, d.head.O, tokens.greedy, tokens.logprobs);
  }
};

}  // namespace
