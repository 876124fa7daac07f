// A step of decoding, one new token per row: what llama4/model.py does, without the microseconds between its steps. And
// what Python calls.

#include "attention.h"
#include "between.h"
#include "products.h"
#include "rounding.h"
#include "tiles.h"

namespace {

// ---- matrices of any format

enum { OUT_IN, IN_OUT, INT8, FP8, INT4 };  // as in llama4/kernels/cpu.py

// Or, for experts, several that lie `step` bytes apart, and their scales `scale_step`.
struct Matrix {
  const char* w;
  Scales scales;
  int64_t kind, group, I, O, step, scale_step;

  Matrix of(long expert) const {
    Matrix own = *this;
    own.w += expert * step;
    if (scales) own.scales.numbers = static_cast<const char*>(scales.numbers) + expert * scale_step;
    return own;
  }
};

// The formats for rows of a dtype.
template <class X>
struct For;
template <>
struct For<float> {
  using Dense = Float32;
  using Rows = Float32Rows;
  using Codes8 = Int8;
  using E4M3 = Float8;
  using Codes4 = Codes;
};
template <>
struct For<bf16> {
  using Rows = Bfloat16Rows;
#ifdef __AVX512BF16__
  using Dense = Bfloat16Pairs;
  using Codes4 = CodePairs;
#else
  using Dense = Bfloat16;
  using Codes4 = Codes;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  using Codes8 = Int8Pairs;
  using E4M3 = Float8Pairs;
#else
  using Codes8 = Int8;
  using E4M3 = Float8;
#endif
};

constexpr long few = 12;  // as in cpu.py

long numbers(const Matrix& a) { return a.I * a.O; }

// Floats that a product wants.
long parts_for(const Matrix& a, long M) { return a.kind == IN_OUT ? omp_get_max_threads() * M * a.O : 0; }

template <class X>
struct Product {
  const Matrix& matrix;
  X* y;
  bool goes_with(const Product& b) const {
    return matrix.kind == b.matrix.kind && matrix.group == b.matrix.group && matrix.kind != IN_OUT;
  }
};

// Products of a few rows, by a team, those side by side that go with each other; in x out only the parts, which `total`
// adds up after a wait.
template <class X>
void products(Shares& shares, std::initializer_list<Product<X>> all, const X* x, long M, float* parts) {
  using Of = For<X>;
  for (auto first = all.begin(), end = first; first != all.end(); first = end) {
    while (end != all.end() && first->goes_with(*end)) end++;
    if (end == first) end++;
    const Matrix& a = first->matrix;
    const auto outputs = [&](auto format) {  // in a format, given a matrix
      std::vector<Outputs<decltype(format(a)), X>> some;
      for (auto p = first; p != end; p++) some.push_back({format(p->matrix), p->matrix.O, p->matrix.scales, p->y});
      return some;
    };
    const long count = end - first;
    switch (a.kind) {
      case OUT_IN: {
        const auto dense = [](const Matrix& b) { return typename Of::Dense{(const X*)b.w, b.I}; };
        out_in(shares, outputs(dense).data(), count, x, M);
        break;
      }
      case IN_OUT: in_out<typename Of::Rows>((const X*)a.w, x, M, a.I, a.O, parts); break;
      case INT8: {
        const auto codes = [](const Matrix& b) { return typename Of::Codes8{(const uint8_t*)b.w, b.I}; };
        out_in(shares, outputs(codes).data(), count, x, M);
        break;
      }
      case FP8: {
        const auto codes = [](const Matrix& b) { return typename Of::E4M3{(const uint8_t*)b.w, b.I}; };
        float* row_scales = scratch<float, 9>(M);
        auto* rows = scratch<Number<X>, 12>(M * a.I);
        for (long m = 0; m < M; m++) row_scales[m] = to_e4m3(x + m * a.I, a.I, rows + m * a.I);
        out_in(shares, outputs(codes).data(), count, rows, M, row_scales);
        break;
      }
      case INT4: {
        const auto codes = [](const Matrix& b) { return Int4{(const uint8_t*)b.w, b.I, b.scales, b.group}; };
        in_sixteens<typename Of::Codes4>(shares, outputs(codes).data(), count, x, M);
      }
    }
  }
}

template <class X>
void product(Shares& shares, const Matrix& a, const X* x, long M, float* parts, X* y) {
  products(shares, {Product<X>{a, y}}, x, M, parts);
}

// Many rows.
template <class X>
void product_of_many(const Matrix& a, const X* x, long M, X* y) {
  const auto* codes = (const uint8_t*)a.w;
  switch (a.kind) {
    case IN_OUT:
      if constexpr (std::is_same_v<X, float>)
        if (M <= several) return project_several(x, M, a.I, a.O, (const float*)a.w, y);
      return project_many(x, M, a.I, a.O, (const X*)a.w, y);
    case INT8: return linear_many(Int8{codes, a.I}, in_words<Int8>(x, M * a.I), M, a.O, a.scales, nullptr, y);
    case FP8: {
      float* row_scales = scratch<float, 9>(M);
      auto* rows = scratch<Number<X>, 12>(M * a.I);
#pragma omp parallel for schedule(static)
      for (long m = 0; m < M; m++) row_scales[m] = to_e4m3(x + m * a.I, a.I, rows + m * a.I);
      return linear_many(Float8{codes, a.I}, (const Word*)rows, M, a.O, a.scales, row_scales, y);
    }
    case INT4:
      const Int4 four{codes, a.I, a.scales, a.group};
      return linear_many(four, in_words<Int4>(x, M * a.I), M, a.O, Scales{}, nullptr, y);
  }
}

template <class X>
void linear(const Matrix& a, const X* x, long M, X* y) {
  const bool in_tiles = a.kind == IN_OUT && a.I % numbers_per_word<X> == 0 && a.O % strip == 0;
  const long most = in_tiles ? rows_at_once : few;
  if (M > most && a.kind != OUT_IN) return product_of_many(a, x, M, y);
  float* parts = scratch<float, 1>(parts_for(a, M));
  Shares shares;
#pragma omp parallel if (numbers(a) > worth_threads)
  {
    product(shares, a, x, M, parts, y);
    if (a.kind == IN_OUT) wait_for_team(), total<typename For<X>::Rows>(parts, M, a.O, y);
  }
}

// ---- a step of decoding

struct Layer {
  Matrix q, k, v, o, gate_up, down;
  Matrix gate, up, shared_down;                 // of the shared expert, or of the dense MLP
  const void *input_norm, *post_norm, *router;  // router: nullptr in a dense layer
  int64_t H, K, C, E, chosen;                   // chosen: experts per token, none in a dense layer
  double eps, qk_eps;                           // qk_eps: negative without QK-norm
};

struct Decoder {
  const Layer* layers;
  int64_t count;
  const void *embedding, *norm;
  Matrix head;
  double eps;
};

// What a layer is told of M rows for some steps to come: turns [steps, M, C] and temperatures [steps, M], either if it
// has them; how many tokens a row sees, its new one included, [steps, M]; and the blocks that hold them, [M, width].
struct Held {
  const float *rotations, *temperatures;
  const long* lengths;
  char* const* table;
  int64_t width, format;
};

template <class X>
void add(float* to, const X* from, long count) {
  for (long i = 0; i < count; i += 16) store(to + i, load<f32>(to + i) + floats(from + i));
}

// The k largest logits of a row, of equals the lowest index first.
void choose(const float* logits, long E, long k, long* experts, float* scores) {
  for (long i = 0; i < k; i++) {
    long best = -1;
    for (long e = 0; e < E; e++)
      if (std::find(experts, experts + i, e) == experts + i && (best < 0 || logits[e] > logits[best])) best = e;
    experts[i] = best, scores[i] = 1 / (1 + std::exp(-logits[best]));
  }
}

// What the threads of a team share: each buffer is written by all and read by all, with a wait between. Rows of experts
// come first, those of the shared expert behind them.
template <class X>
struct Shared {
  X *q, *k, *v, *heads, *wide, *inner, *out;
  float *logits, *parts;
  Shares& shares;

  Shared(const Decoder& d, const Held* held, long step, long M, Shares& shares) : shares(shares) {
    const long D = d.head.I;
    long queries = 0, keys = 0, width = 0, depth = 0, rows = 0, experts = 0, most = 0;
    for (long i = 0; i < d.count; i++) {
      const Layer& l = d.layers[i];
      const long R = M * l.chosen;
      queries = std::max(queries, l.H * l.C), keys = std::max(keys, l.K * l.C), experts = std::max(experts, l.E);
      width = std::max(width, R * l.gate_up.O + 2 * M * l.gate.O), depth = std::max(depth, R * l.down.I + M * l.gate.O);
      rows = std::max(rows, R + M);
      most = std::max({most, parts_for(l.gate_up, R), parts_for(l.down, R)});
      most = std::max(most, parts_for(held[i].lengths + step * M, M, l.H, l.C));
    }
    q = scratch<X, 7>(M * (2 * queries + 2 * keys) + width + depth + rows * D);
    heads = q + M * queries, k = heads + M * queries, v = k + M * keys, wide = v + M * keys, inner = wide + width;
    out = inner + depth;
    logits = scratch<float, 8>(M * experts), parts = scratch<float, 1>(most);
  }
};

// Rows of silu(gate) * up, by a team, a piece at a time; rows of both lie `stride` apart.
template <class X>
void swiglu(const X* gate, const X* up, long M, long F, long stride, X* y) {
  constexpr long piece = 256;
  for (long m = 0; m < M; m++)
#pragma omp for schedule(static) nowait
    for (long i = 0; i < F; i += piece)
      swiglu(gate + m * stride + i, up + m * stride + i, std::min(piece, F - i), y + m * F + i);
}

// Each thread of a team has a residual stream h [M, D] of its own, and adds to it what all of them computed.
template <class X>
void attention(const Layer& l, const Held& held, long step, long M, long D, const Shared<X>& s, X* x, float* h) {
  const long H = l.H, K = l.K, C = l.C, *lengths = held.lengths + step * M;
  for (long m = 0; m < M; m++) rms_norm(h + m * D, D, (const X*)l.input_norm, l.eps, x + m * D);
  products(s.shares, {{l.q, s.q}, {l.k, s.k}, {l.v, s.v}}, x, M, s.parts);
  wait_for_team();
  with_format<X>(held.format, [&](auto format) {
    using F = decltype(format);
#pragma omp for schedule(static)
    for (long i = 0; i < M * (H + K); i++) {
      const long m = i / (H + K), head = i % (H + K), k = head - H;
      const float* rotation = held.rotations ? held.rotations + (step * M + m) * C : nullptr;
      const float temperature = held.temperatures && k < 0 ? held.temperatures[step * M + m] : 1;
      X* own = k < 0 ? s.q + (m * H + head) * C : s.k + (m * K + k) * C;
      if (rotation || l.qk_eps >= 0 || temperature != 1) turn(own, C, rotation, l.qk_eps, temperature, own);
      if (k < 0) continue;
      const long slot = lengths[m] - 1;
      char* block = held.table[m * held.width + slot / slots];
      put<F>(block, slot % slots, k, K, C, own);
      put<F>(block, slot % slots, K + k, K, C, s.v + (m * K + k) * C);
    }
    attend<F>(s.q, held.table, held.width, lengths, M, H, K, C, s.parts, s.heads);
  });
  wait_for_team();
  product(s.shares, l.o, s.heads, M, s.parts, s.out);
  wait_for_team();
  add(h, s.out, M * D);
}

// The experts that rows are sent to, and rows times their scores, by expert.
template <class X>
struct Routed {
  long R, *chosen, *order;  // R choices; which of them stand where
  X* rows;

  Routed(const Layer& l, long M, long D, const X* x, const float* logits) : R(M * l.chosen) {
    chosen = scratch<long, 13>(2 * R), order = chosen + R, rows = scratch<X, 15>(R * D);
    float* scores = scratch<float, 14>(R);
    for (long m = 0; m < M; m++) choose(logits + m * l.E, l.E, l.chosen, chosen + m * l.chosen, scores + m * l.chosen);
    for (long i = 0; i < R; i++) order[i] = i;
    std::sort(order, order + R, [&](long i, long j) { return std::pair(chosen[i], i) < std::pair(chosen[j], j); });
    for (long i = 0; i < R; i++)
      for (long d = 0; d < D; d += 16)
        keep(rows + i * D + d, floats(x + order[i] / l.chosen * D + d) * scores[order[i]]);
  }

  // Calls part(expert, first row, rows) for each expert.
  template <class Part>
  void each(const Part& part) const {
    for (long i = 0, count; i < R; i += count) {
      for (count = 1; i + count < R && chosen[order[i + count]] == chosen[order[i]];) count++;
      part(chosen[order[i]], i, count);
    }
  }
};

// Experts, if there are such, and the shared one beside them, or the dense MLP. Shares of experts in x out are fixed, so
// what comes after in any shares evens out who is late.
template <class X>
void feed_forward(const Layer& l, long M, long D, const Shared<X>& s, const X* x, float* h) {
  if (l.router) {
    const Outputs<typename For<X>::Dense, float> router{{(const X*)l.router, D}, l.E, Scales{}, s.logits};
    out_in(s.shares, &router, 1, x, M);
    wait_for_team();
  }
  const Routed<X> routed(l, M, D, x, s.logits);
  const long R = routed.R, N = l.down.I, F = l.gate.O;
  X *gate = s.wide + R * 2 * N, *up = gate + M * F, *inner = s.inner + R * N, *out = s.out + R * D;
  const auto multiply = [&](const Matrix& a, const X* rows, X* y) {
    routed.each([&](long e, long i, long count) {
      product(s.shares, a.of(e), rows + i * a.I, count, s.parts + parts_for(a, i), y + i * a.O);
    });
  };
  const auto add_up = [&](const Matrix& a, X* y) {
    if (!R || a.kind != IN_OUT) return;
    routed.each([&](long, long i, long count) {
      total<typename For<X>::Rows>(s.parts + parts_for(a, i), count, a.O, y + i * a.O);
    });
    wait_for_team();
  };
  multiply(l.gate_up, routed.rows, s.wide);
  products(s.shares, {{l.gate, gate}, {l.up, up}}, x, M, s.parts);
  wait_for_team();
  add_up(l.gate_up, s.wide);
  swiglu(s.wide, s.wide + N, R, N, 2 * N, s.inner);
  swiglu(gate, up, M, F, F, inner);
  wait_for_team();
  multiply(l.down, s.inner, s.out);
  product(s.shares, l.shared_down, inner, M, s.parts, out);
  wait_for_team();
  add_up(l.down, s.out);
  for (long i = 0; i < R; i++) add(h + routed.order[i] / l.chosen * D, s.out + i * D, D);
  add(h, out, M * D);
}

// A token in every row -> logits of the next, the likeliest of these, and its log_softmax.
template <class X>
void decode(const Decoder& d, const Held* held, long step, const long* ids, long M, X* logits, long* next,
            float* logprobs) {
  Shares shares;
  const Shared<X> shared(d, held, step, M, shares);
  Largest* largest = scratch<Largest, 18>(M * pieces_of_logits);
  const long D = d.head.I;
#pragma omp parallel if (numbers(d.layers[0].gate) > worth_threads)
  {
    float* h = scratch<float, 16>(M * D);
    X* x = scratch<X, 6>(M * D);
    for (long m = 0; m < M; m++)
      for (long i = 0; i < D; i += 16) store(h + m * D + i, floats((const X*)d.embedding + ids[m] * D + i));
    for (long i = 0; i < d.count; i++) {
      const Layer& l = d.layers[i];
      attention(l, held[i], step, M, D, shared, x, h);
      for (long m = 0; m < M; m++) rms_norm(h + m * D, D, (const X*)l.post_norm, l.eps, x + m * D);
      feed_forward(l, M, D, shared, x, h);
    }
    for (long m = 0; m < M; m++) rms_norm(h + m * D, D, (const X*)d.norm, d.eps, x + m * D);
    product(shares, d.head, x, M, shared.parts, logits);
    wait_for_team();
    likeliest(logits, M, d.head.O, largest, next, logprobs);
  }
}

// Calls part(row) for rows of so many numbers, on all cores if that is worth it.
template <class Part>
void for_each_row(long N, long numbers, const Part& part) {
#pragma omp parallel for schedule(static) if (N > 1 && N * numbers > worth_threads)
  for (long n = 0; n < N; n++) part(n);
}

// What experts make of rows, so many for each, one after the other: down(silu(gate(x)) * up(x)).
template <class X>
void experts(const Matrix& gate_up, const Matrix& down, const long* counts, long E, const X* x, X* y) {
  const long D = gate_up.I, F = down.I, most = *std::max_element(counts, counts + E);
  X *wide = scratch<X, 19>(most * 3 * F), *inner = wide + most * 2 * F;
  for (long e = 0; e < E; x += counts[e] * D, y += counts[e] * D, e++) {
    if (!counts[e]) continue;
    linear(gate_up.of(e), x, counts[e], wide);
    for_each_row(counts[e], F, [&](long i) { swiglu(wide + i * 2 * F, wide + i * 2 * F + F, F, inner + i * F); });
    linear(down.of(e), inner, counts[e], y);
  }
}

}  // namespace

// ---- what Python calls, once per dtype of x and y: f for float32, b for bfloat16

#define ENTRIES(X, suffix)                                                                                             \
  extern "C" void linear_##suffix(const X* x, long M, long I, long O, long kind, const char* w, const void* s,         \
                                  long wide, long group, X* y) {                                                       \
    linear(Matrix{w, {s, wide}, kind, group, I, O}, x, M, y);                                                          \
  }                                                                                                                    \
  extern "C" void experts_##suffix(const Matrix* gate_up, const Matrix* down, const long* counts, long E, const X* x,  \
                                   X* y) {                                                                             \
    experts(*gate_up, *down, counts, E, x, y);                                                                         \
  }                                                                                                                    \
  extern "C" void quantize_int4_##suffix(const X* weights, long groups, long size, const float* ranges, long count,    \
                                         uint32_t* words, X* scales) {                                                 \
    quantize_int4(weights, groups, size, ranges, count, words, scales);                                                \
  }                                                                                                                    \
  extern "C" void rms_norm_##suffix(const float* x, long N, long D, const X* weight, float eps, X* y) {                \
    for_each_row(N, D, [&](long n) { rms_norm(x + n * D, D, weight, eps, y + n * D); });                              \
  }                                                                                                                    \
  extern "C" void apply_rope_##suffix(const X* x, long stride, long N, long H, long C, const float* rotation,                \
                                float eps, const float* factors, X* y) {                                               \
    for_each_row(N, H* C, [&](long n) {                                                                                \
      const float* own = rotation ? rotation + n * C : nullptr;                                                        \
      const float factor = factors ? factors[n] : 1;                                                                   \
      for (long h = 0; h < H; h++) turn(x + n * stride + h * C, C, own, eps, factor, y + (n * H + h) * C);            \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void swiglu_##suffix(const X* gate, const X* up, long N, long F, long stride, X* y) {                     \
    for_each_row(N, F, [&](long n) { swiglu(gate + n * stride, up + n * stride, F, y + n * F); });                     \
  }                                                                                                                    \
  extern "C" void greedy_token_##suffix(const X* logits, long N, long V, long* indices, float* logprobs) {                \
    Largest* largest = scratch<Largest, 18>(N * pieces_of_logits);                                                     \
    _Pragma("omp parallel if (N * V > worth_threads)")                                                                 \
    likeliest(logits, N, V, largest, indices, logprobs);                                                               \
  }                                                                                                                    \
  extern "C" void attend_##suffix(const X* q, const char* const* table, long width, const long* lengths, long B,       \
                                  long H, long K, long C, long format, X* y) {                                         \
    float* parts = scratch<float, 1>(parts_for(lengths, B, H, C));                                                     \
    with_format<X>(format, [&](auto held) {                                                                            \
      _Pragma("omp parallel")                                                                                          \
      attend<decltype(held)>(q, table, width, lengths, B, H, K, C, parts, y);                                          \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void attend_causal_##suffix(const X* q, const X* k, const X* v, long N, const char* const* blocks,        \
                                         long past, long H, long K, long C, long format, X* y) {                       \
    with_format<X>(format, [&](auto held) {                                                                            \
      attend_causal<decltype(held)>(q, k, v, N, blocks, past, H, K, C, y);                                             \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void decode_##suffix(const Decoder* decoder, const Held* held, long step, const long* ids, long M,        \
                                  X* logits, long* next, float* logprobs) {                                            \
    decode(*decoder, held, step, ids, M, logits, next, logprobs);                                                      \
  }
ENTRIES(float, f)
ENTRIES(bf16, b)
