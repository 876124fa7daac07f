// A step of the decoder, from token ids to logits, in one call: what the modules of llama4/model/ compute, in the same
// order and precision, without the microseconds that Python and torch spend between two products.
//
// Shapes: N tokens of B sequences, D hidden size, H query heads, K key heads, C head_dim, E experts, k experts per
// token, R = N k routed rows, F expert or MLP width, V vocabulary.

#pragma once

#include "attention.h"
#include "elementwise.h"
#include "greedy_token.h"
#include "matrix.h"

namespace {

struct Layer {
  Matrix q, k, v, o, gate_up, down;
  Matrix gate, up, shared_down;                 // of the shared expert, or of the dense MLP
  const void *input_norm, *post_norm, *router;  // router: nullptr in a dense layer
  int64_t H, K, C, E, experts_per_token;        // none in a dense layer
  double eps, qk_eps;                           // qk_eps: negative without QK-norm
};

struct Decoder {
  const Layer* layers;
  int64_t num_layers;
  const void *embedding, *norm;
  Matrix head;
  double eps;
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
  const long* outputs;          // [num_outputs], tokens whose logits are wanted; nullptr: the first ones
  int64_t B, num_outputs;
  void* logits;     // [num_outputs, V]
  long* greedy;     // [num_outputs], the index of the largest logit, of equals the first
  float* logprobs;  // [num_outputs], its log_softmax
};

// Memory that a team shares: each buffer is written and read by all threads, with a barrier between. Routed rows come
// first, those of the shared expert behind them.
template <class X>
struct StepMemory {
  X *q, *k, *v, *heads, *gate_up, *inner, *out, *normed, *routed;
  float *logits, *residual;
  long* sequence_of;  // [N], of each token
  Workspace<X> workspace;

  StepMemory(const Decoder& d, const LayerStep* layer_steps, long step, long N) {
    const long D = d.head.I;
    long queries = 0, keys = 0, gate_up_size = 0, inner_size = 0, rows = 0, experts = 0, partial = 0, inputs = 0;
    for (long i = 0; i < d.num_layers; i++) {
      const Layer& l = d.layers[i];
      const long R = N * l.experts_per_token, widest = std::max({D, l.H * l.C, l.down.I, l.gate.O});
      queries = std::max(queries, l.H * l.C), keys = std::max(keys, l.K * l.C), experts = std::max(experts, l.E);
      gate_up_size = std::max(gate_up_size, R * l.gate_up.O + 2 * N * l.gate.O);
      inner_size = std::max(inner_size, R * l.down.I + N * l.gate.O);
      rows = std::max(rows, R + N), inputs = std::max(inputs, (padded_rows(R) + padded_rows(N)) * widest);
      partial = std::max({partial, partial_floats(l.gate_up, R), partial_floats(l.down, R),
                          attention_floats(layer_steps[i].lengths + step * N, N, l.H, l.C)});
    }
    q = scratch<X, Use::step_activations>(N * (2 * queries + 2 * keys) + gate_up_size + inner_size + rows * D);
    heads = q + N * queries, k = heads + N * queries, v = k + N * keys, gate_up = v + N * keys;
    inner = gate_up + gate_up_size, out = inner + inner_size;
    logits = scratch<float, Use::step_logits>(N * experts), residual = scratch<float, Use::step_residual>(N * D);
    normed = scratch<X, Use::step_normed>(N * D), routed = scratch<X, Use::step_routed_rows>((rows - N) * D);
    sequence_of = scratch<long, Use::step_sequences>(N);
    workspace = {scratch<float, Use::partial_results>(partial), scratch<WordNumber<X>, Use::gemm_inputs>(inputs),
                 scratch<float, Use::row_scales>(rows)};
  }
};

// The k largest logits, the lowest index on ties, and their sigmoid.
inline void choose_experts(const float* logits, long E, long k, long* experts, float* scores) {
  for (long i = 0; i < k; i++) {
    long best = -1;
    for (long e = 0; e < E; e++)
      if (std::find(experts, experts + i, e) == experts + i && (best < 0 || logits[e] > logits[best])) best = e;
    experts[i] = best, scores[i] = 1 / (1 + std::exp(-logits[best]));
  }
}

// R choices of experts, sorted by expert: those of token n, in this order, are rows[n k] to rows[n k + k - 1].
struct Routes {
  long R, k, *experts, *choices, *rows;  // expert of a choice; choice of a row; rows of a token's choices
  float* scores;                         // of a choice

  Routes(const float* logits, long N, long E, long k) : R(N * k), k(k) {
    experts = scratch<long, Use::step_routes>(3 * R), choices = experts + R, rows = choices + R;
    scores = scratch<float, Use::step_scores>(R);
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

// The step of a team, every thread of which calls run(). Of few tokens each thread keeps a residual stream of its own
// and adds to it what all of them computed, which saves barriers; of many they share one.
template <class X>
class DecoderStep {
  const Decoder& d;
  const LayerStep* layer_steps;
  const long step;
  const Tokens tokens;
  const Sequences sequences;
  const long N, D;
  const bool shares_rows;
  const StepMemory<X> memory;
  WorkStealing work;

  // Calls run(n) for rows of this thread.
  template <class Run>
  void for_rows(long count, const Run& run) const {
    if (shares_rows) {
#pragma omp for schedule(static)
      for (long n = 0; n < count; n++) run(n);
    } else {
      for (long n = 0; n < count; n++) run(n);
    }
  }

  // swiglu for rows of gate and up, `stride` apart, a piece at a time. Of the team.
  static void swiglu_rows(const X* gate, const X* up, long count, long F, long stride, X* y) {
    constexpr long piece = 256;
    const long pieces = (F + piece - 1) / piece;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < count * pieces; i++) {
      const long n = i / pieces, f = i % pieces * piece;
      swiglu(gate + n * stride + f, up + n * stride + f, std::min(piece, F - f), y + n * F + f);
    }
  }

  void attention(const Layer& l, const LayerStep& s, X* x, float* h) {
    const StepMemory<X>& m = memory;
    const long H = l.H, K = l.K, C = l.C, *lengths = s.lengths + step * N;
    for_rows(N, [&](long n) { rms_norm(h + n * D, D, (const X*)l.input_norm, l.eps, x + n * D); });
    multiply(work, {{l.q, m.q}, {l.k, m.k}, {l.v, m.v}}, x, N, m.workspace);
    barrier();
    CacheFormats<X>::visit(s.format, [&](auto format) {
      using F = decltype(format);
#pragma omp for schedule(static)
      for (long i = 0; i < N * (H + K); i++) {
        const long n = i / (H + K), head = i % (H + K), k = head - H;
        const float* rotation = s.rotations ? s.rotations + (step * N + n) * C : nullptr;
        const float temperature = s.temperatures && k < 0 ? s.temperatures[step * N + n] : 1;
        X* own = k < 0 ? m.q + (n * H + head) * C : m.k + (n * K + k) * C;
        if (rotation || l.qk_eps >= 0 || temperature != 1) apply_rope(own, C, rotation, l.qk_eps, temperature, own);
        if (k < 0) continue;
        const long slot = lengths[n] - 1;
        char* block = s.block_table[m.sequence_of[n] * s.width + slot / block_slots];
        write_head<F>(block, slot % block_slots, k, K, C, own);
        write_head<F>(block, slot % block_slots, K + k, K, C, m.v + (n * K + k) * C);
      }
      attend<F>(m.q, s.block_table, s.width, lengths, sequences, H, K, C, m.workspace.partial, m.heads);
    });
    barrier();
    multiply(work, {{l.o, m.out}}, m.heads, N, m.workspace);
    barrier();
    for_rows(N, [&](long n) { add(h + n * D, m.out + n * D, D); });
  }

  // The experts, if there are any, and the shared one beside them; or the dense MLP. Threads' shares of experts in x
  // out are fixed; what follows is shared by work stealing, which makes up for threads that are late.
  void feed_forward(const Layer& l, const X* x, float* h) {
    const StepMemory<X>& m = memory;
    if (l.router) {
      const Product<Fastest<Float32, X>, float> router{{(const X*)l.router, D}, l.E, Scales{}, m.logits};
      gemv(work, &router, 1, x, N);
      barrier();
    }
    const Routes routes(m.logits, N, l.E, l.experts_per_token);
    const long R = routes.R, F_expert = l.down.I, F = l.gate.O;
    X* routed = shares_rows ? m.routed : scratch<X, Use::step_routed_rows>(R * D);
    for_rows(R, [&](long i) {
      const long choice = routes.choices[i];
      const X* from = x + choice / routes.k * D;
      for (long d = 0; d < D; d += 16) store_floats(routed + i * D + d, load_floats(from + d) * routes.scores[choice]);
    });
    X *gate = m.gate_up + R * 2 * F_expert, *up = gate + N * F, *inner = m.inner + R * F_expert, *out = m.out + R * D;
    const auto multiply_experts = [&](const Matrix& a, const X* rows, X* y) {
      routes.for_each_expert([&](long e, long i, long count) {
        multiply(work, {{a.expert(e), y + i * a.O}}, rows + i * a.I, count, m.workspace.from(a, i));
      });
    };
    const auto finish_experts = [&](const Matrix& a, X* y) {
      if (!R || a.layout != IN_OUT) return;
      routes.for_each_expert(
          [&](long, long i, long count) { finish_product(a, count, m.workspace.from(a, i), y + i * a.O); });
      barrier();
    };
    multiply_experts(l.gate_up, routed, m.gate_up);
    multiply(work, {{l.gate, gate}, {l.up, up}}, x, N, m.workspace.behind(R, D));
    barrier();
    finish_experts(l.gate_up, m.gate_up);
    swiglu_rows(m.gate_up, m.gate_up + F_expert, R, F_expert, 2 * F_expert, m.inner);
    swiglu_rows(gate, up, N, F, F, inner);
    barrier();
    multiply_experts(l.down, m.inner, m.out);
    multiply(work, {{l.shared_down, out}}, inner, N, m.workspace.behind(R, std::max(F_expert, F)));
    barrier();
    finish_experts(l.down, m.out);
    for_rows(N, [&](long n) {
      for (long i = n * routes.k; i < (n + 1) * routes.k; i++) add(h + n * D, m.out + routes.rows[i] * D, D);
      add(h + n * D, out + n * D, D);
    });
  }

 public:
  DecoderStep(const Decoder& d, const LayerStep* layer_steps, long step, const Tokens& tokens)
      : d(d),
        layer_steps(layer_steps),
        step(step),
        tokens(tokens),
        sequences{tokens.sequence_starts, tokens.B},
        N(sequences.N()),
        D(d.head.I),
        shares_rows(N > max_gemv_rows),
        memory(d, layer_steps, step, N) {
    for (long b = 0; b < tokens.B; b++)
      std::fill(memory.sequence_of + sequences.begin(b), memory.sequence_of + sequences.end(b), b);
  }

  void run(LargestLogit* parts) {
    float* h = shares_rows ? memory.residual : scratch<float, Use::step_residual>(N * D);
    X* x = shares_rows ? memory.normed : scratch<X, Use::step_normed>(N * D);
    const auto norm = [&](const void* weight, double eps, long from, long to) {
      rms_norm(h + from * D, D, (const X*)weight, eps, x + to * D);
    };
    for_rows(N, [&](long n) {
      const X* embedding = (const X*)d.embedding + tokens.ids[n] * D;
      for (long i = 0; i < D; i += 16) store(h + n * D + i, load_floats(embedding + i));
    });
    for (long i = 0; i < d.num_layers; i++) {
      const Layer& l = d.layers[i];
      attention(l, layer_steps[i], x, h);
      for_rows(N, [&](long n) { norm(l.post_norm, l.eps, n, n); });
      feed_forward(l, x, h);
    }
    const long outputs = tokens.num_outputs;
    if (!outputs) return;
    X* logits = (X*)tokens.logits;
    for_rows(outputs, [&](long i) { norm(d.norm, d.eps, tokens.outputs ? tokens.outputs[i] : i, i); });
    multiply(work, {{d.head, logits}}, x, outputs, memory.workspace);
    barrier();
    greedy_token(logits, outputs, d.head.O, parts, tokens.greedy, tokens.logprobs);
  }
};

template <class X>
void decode(const Decoder& d, const LayerStep* layer_steps, long step, const Tokens& tokens) {
  DecoderStep<X> decoder_step(d, layer_steps, step, tokens);
  auto* parts = scratch<LargestLogit, Use::greedy_parts>(tokens.num_outputs * greedy_parts);
#pragma omp parallel if (d.layers[0].gate.numbers() > min_parallel)
  decoder_step.run(parts);
}

}  // namespace
