// What is wrong with the arguments of a call, in words; nullptr if nothing is. Sizes, numbers of formats and indices
// are compared with each other before memory is touched. How much memory is behind an address cannot be seen from here.

#pragma once

#include "attention.h"
#include "decoder.h"
#include "draw_token.h"
#include "matrix.h"

namespace {
namespace check {

using Problem = const char*;

// The first problem of several.
template <class... Problems>
Problem first(Problems... problems) {
  Problem found = nullptr;
  (void)((found = problems) || ...);
  return found;
}

inline Problem require(bool holds, Problem otherwise) { return holds ? nullptr : otherwise; }

template <class... Pointers>
Problem addresses(Pointers... pointers) {
  return require((pointers && ...), "an address is null");
}

// Of what the last dimension of anything that is no matrix is.
inline Problem width(long numbers) {
  return require(numbers > 0 && numbers % lanes == 0, "a row is not a multiple of 16 numbers");
}

template <class X>
Problem matrix(const Matrix& a) {
  const bool is_dense = a.layout == OUT_IN || a.layout == IN_OUT;
  if (Problem problem = first(addresses(a.w), require(a.I > 0 && a.O > 0, "a matrix is empty"))) return problem;
  if (is_dense) {  // what lies behind each other in memory
    const long row = a.layout == IN_OUT ? a.O : a.I;
    return require(row % (sizeof(X) == 4 ? float32_inputs : bfloat16_inputs) == 0, "rows of a dense matrix are odd");
  }
  Problem problem = "a matrix has a layout that is not known";
  QuantizedFormats::visit(a.layout, [&](auto format) {
    using F = decltype(format);
    const bool fits = a.I % F::multiple == 0, has_scales = is_block_format<F> || a.scales;
    problem = first(
        require(fits, "a quantized matrix has odd inputs"), require(has_scales, "a quantized matrix has no scales"),
        require(a.group_size >= 0 && (!a.group_size || a.I % a.group_size == 0), "groups do not fit a row"));
  });
  return problem;
}

inline Problem heads(long H, long K, long C) {
  return first(require(K > 0 && H > 0 && H % K == 0, "query heads are not a multiple of key heads"), width(C),
               require(C <= max_head_dim, "heads are too wide"));
}

template <class X>
Problem cache_format(long number, long C) {
  Problem problem = "the format of the cache is not known";
  CacheFormats<X>::visit(number, [&](auto format) {
    problem = require(C % decltype(format)::multiple == 0, "heads do not fit the format of the cache");
  });
  return problem;
}

// `length` tokens in the blocks of one sequence, of which there are `width`, null behind the last.
inline Problem blocks(const char* const* of_sequence, long width, long length) {
  return first(require(0 < length && length <= width * block_slots, "a sequence is longer than its blocks"),
               require(length <= 0 || length > width * block_slots || of_sequence[(length - 1) / block_slots],
                       "a block is missing"));
}

// Lengths [N] and block tables of the tokens of some sequences.
inline Problem spans(const Sequences& sequences, const long* lengths, const char* const* block_table, long width) {
  if (Problem problem = first(addresses(lengths, block_table), require(width > 0, "there are no blocks")))
    return problem;
  for (long b = 0; b < sequences.B; b++)
    for (long n = sequences.begin(b); n < sequences.end(b); n++)
      if (Problem problem = blocks(block_table + b * width, width, lengths[n])) return problem;
  return nullptr;
}

inline Problem sequences(const long* starts, long B) {
  if (B < 1) return "there are no sequences";
  if (!starts) return nullptr;
  bool grows = starts[0] == 0;
  for (long b = 0; b < B; b++) grows = grows && starts[b] < starts[b + 1];
  return require(grows, "the sequences of a step do not follow each other");
}

template <class X>
Problem experts(const Matrix& gate_up, const Matrix& down) {
  return first(
      matrix<X>(gate_up), matrix<X>(down),
      require(gate_up.O == 2 * down.I && gate_up.I == down.O, "the matrices of experts do not fit each other"));
}

// The experts of a layer, of which up may be apart from gate.
template <class X>
Problem experts(const Layer& l, long D) {
  if (!l.expert_up.w)
    return first(experts<X>(l.gate_up, l.down), require(l.gate_up.I == D, "experts do not fit their layer"));
  const Matrix &gate = l.gate_up, &up = l.expert_up, &down = l.down;
  return first(matrix<X>(gate), matrix<X>(up), matrix<X>(down),
               require(gate.I == D && up.I == D && down.O == D && gate.O == down.I && up.O == down.I,
                       "experts do not fit their layer"));
}

// A matrix whose rows are read one by one.
template <class X>
Problem embedding(const Matrix& a, long V, long D) {
  bool has_rows = a.layout == OUT_IN;
  QuantizedFormats::visit(a.layout, [&](auto format) { has_rows = is_block_format<decltype(format)>; });
  return first(matrix<X>(a), require(has_rows, "embeddings are in a layout without rows"),
               require(a.I == D && a.O >= V, "embeddings do not fit the head"));
}

template <class X>
Problem layer(const Layer& l, long D) {
  const auto maps = [](const Matrix& a, long I, long O) {
    return first(matrix<X>(a), require(a.I == I && a.O == O, "a matrix does not fit its layer"));
  };
  return first(addresses(l.input_norm, l.post_norm), heads(l.H, l.K, l.C), maps(l.q, D, l.H * l.C),
               maps(l.k, D, l.K * l.C), maps(l.v, D, l.K * l.C), maps(l.o, l.H * l.C, D), maps(l.gate, D, l.gate.O),
               maps(l.up, D, l.gate.O), maps(l.shared_down, l.gate.O, D),
               l.router ? first(experts<X>(l, D), require(0 < l.experts_per_token && l.experts_per_token <= l.E,
                                                          "too many experts per token"))
                        : require(!l.experts_per_token, "experts without a router"));
}

// A step. The layers of a model do not change from step to step: they are checked where `step` is 0.
template <class X>
Problem decode(const Decoder& d, const LayerStep* layer_steps, long step, const Tokens& t) {
  if (Problem problem =
          first(addresses(d.layers, d.norm, d.head.w, layer_steps, t.ids),
                require(d.num_layers > 0 && step >= 0, "there is no layer, or no such step"),
                require(0 <= t.layer && t.layer < d.num_layers, "there is no such layer"),
                sequences(t.sequence_starts, t.B), require(t.num_outputs >= 0, "the number of outputs is negative")))
    return problem;
  const Sequences sequences{t.sequence_starts, t.B};
  const long N = sequences.N();
  if (Problem problem = t.num_outputs ? addresses(t.logits, t.greedy, t.logprobs) : nullptr) return problem;
  if (!t.outputs && t.num_outputs > N) return "more outputs than tokens";
  for (long i = 0; t.outputs && i < t.num_outputs; i++)
    if (t.outputs[i] < 0 || t.outputs[i] >= N) return "an output is no token of the step";
  for (long n = 0; n < N; n++)
    if (t.ids[n] < 0 || t.ids[n] >= d.head.O) return "a token is outside the vocabulary";
  if (Problem problem = step ? nullptr : first(matrix<X>(d.head), embedding<X>(d.embedding, d.head.O, d.head.I)))
    return problem;
  for (long i = 0; i < d.num_layers; i++) {
    const LayerStep& s = layer_steps[i];
    const long* lengths = s.lengths ? s.lengths + step * N : nullptr;
    if (Problem problem =
            first(spans(sequences, lengths, s.block_table, s.width), cache_format<X>(s.format, d.layers[i].C),
                  step ? nullptr : layer<X>(d.layers[i], d.head.I)))
      return problem;
  }
  return nullptr;
}

// Tokens of which there are some, each in a vocabulary of V.
inline bool are_tokens(const long* ids, long count, long V) {
  bool fits = count >= 0 && (ids || !count);
  for (long i = 0; fits && i < count; i++) fits = 0 <= ids[i] && ids[i] < V;
  return fits;
}

inline bool fit(const Penalties& p, long V) {
  return are_tokens(p.seen, p.num_seen, V) && are_tokens(p.biased, p.num_biased, V) && (p.counts || !p.num_seen) &&
         (p.biases || !p.num_biased) && p.repetition > 0;
}

inline Problem draws(const Draw* draws, long count, long N, long V) {
  bool fits = count >= 0;
  for (const Draw* d = draws; fits && d < draws + count; d++)
    fits = 0 <= d->row && d->row < N && d->top_k >= 0 && d->temperature > 0 && 0 < d->top_p && d->top_p <= 1 &&
           0 <= d->min_p && d->min_p <= 1 && 0 <= d->uniform && d->uniform < 1 &&
           (!d->penalties || fit(*d->penalties, V));
  return require(fits, "a token cannot be drawn like that");
}

}  // namespace check
}  // namespace
