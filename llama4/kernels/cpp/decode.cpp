// One decoder layer for one new token per row: the steps of llama4/model.py, without the microseconds between them. And
// what Python calls.

#include "attention.h"
#include "between.h"
#include "products.h"
#include "rounding.h"
#include "tiles.h"

namespace {

// Kinds of a Matrix, as in llama4/decoding.py.
enum { OUT_IN, IN_OUT, INT8, FP8, INT4 };

// A matrix of any format, or, for experts, several that lie `step` bytes apart, and their scales `scale_step`.
struct Matrix {
  const char* w;
  Scales scales;
  int64_t kind, group, I, O, step, scale_step;
};

struct Layer {
  Matrix q, k, v, o, gate_up, down;
  Matrix gate, up, shared_down;                 // of the shared expert, or of the dense MLP
  const void *input_norm, *post_norm, *router;  // router: nullptr in a dense layer
  int64_t D, H, K, C, E, chosen;                // chosen: experts per token
  double eps, qk_eps;                           // qk_eps: negative without QK-norm
};

// The formats for rows of a dtype: without and with bits to unpack.
template <class X>
struct For;
template <>
struct For<float> {
  using Dense = Float32;
  using Codes8 = Int8;
  using E4M3 = Float8;
  template <int lanes>
  using Codes4 = Int4;
};
template <>
struct For<bf16> {
#ifdef __AVX512BF16__
  using Dense = Bfloat16Pairs;
  template <int lanes>
  using Codes4 = Int4Pairs<lanes>;
#else
  using Dense = Bfloat16;
  template <int lanes>
  using Codes4 = Int4;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  using Codes8 = Int8Pairs;
  using E4M3 = Float8Pairs;
#else
  using Codes8 = Int8;
  using E4M3 = Float8;
#endif
};
template <class X>
using InOut = std::conditional_t<std::is_same_v<X, float>, Float32, Bfloat16>;

constexpr long few = 12;  // as in cpu.py

template <class X>
void project(const X* x, long M, long I, long O, const X* w, X* y) {
  const bool in_pairs = numbers_per_word<X> == 2 && I % 2 == 0 && O % strip == 0;
  const long most = in_pairs ? rows_at_once - 1 : few;  // many in pairs are twice as fast
  M <= most ? in_out(InOut<X>{w, O}, x, M, I, y) : project_many(x, M, I, O, w, y);
}

template <class X>
void linear_int8(const uint8_t* w, const X* x, long M, long I, long O, Scales scales, X* y) {
  if (M <= few) return out_in(typename For<X>::Codes8{w, I}, x, M, O, scales, y);
  linear_many(Int8{w, I}, in_words<Int8>(x, M * I), M, O, scales, nullptr, y);
}

template <class X>
void linear_fp8(const uint8_t* w, const X* x, long M, long I, long O, Scales scales, X* y) {
  float* row_scales = scratch<float, 9>(M);
  const Word* rows = in_e4m3(x, M, I, row_scales);
  if (M <= few) return out_in(typename For<X>::E4M3{w, I}, (const Number<X>*)rows, M, O, scales, y, row_scales);
  linear_many(Float8{w, I}, rows, M, O, scales, row_scales, y);
}

template <class X>
void linear_int4(const Int4& f, const X* x, long M, long O, X* y) {
  using Of = For<X>;
  if (M <= few && f.group >= 128) return out_in(typename Of::template Codes4<16>{f}, x, M, O, Scales{}, y);
  if (M <= few && f.group == 64) return out_in(typename Of::template Codes4<8>{f}, x, M, O, Scales{}, y);
  if (M <= few) return out_in(typename Of::template Codes4<4>{f}, x, M, O, Scales{}, y);
  linear_many(f, in_words<Int4>(x, M * f.I), M, O, Scales{}, nullptr, y);
}

template <class X>
void product(const Matrix& a, long expert, const X* x, long M, X* y) {
  const char* w = a.w + expert * a.step;
  const Scales s{static_cast<const char*>(a.scales.numbers) + expert * a.scale_step, a.scales.wide};
  switch (a.kind) {
    case OUT_IN: return out_in(typename For<X>::Dense{(const X*)w, a.I}, x, M, a.O, Scales{}, y);
    case IN_OUT: return in_out(InOut<X>{(const X*)w, a.O}, x, M, a.I, y);
    case INT8: return linear_int8((const uint8_t*)w, x, M, a.I, a.O, s, y);
    case FP8: return linear_fp8((const uint8_t*)w, x, M, a.I, a.O, s, y);
    case INT4: return linear_int4(Int4{(const uint8_t*)w, a.I, s, a.group}, x, M, a.O, y);
  }
}

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

template <class X>
void decode(const Layer& layer, float* h, long M, const float* rotation, const float* temperature, const long* lengths,
            char* const* table, long table_width, long format) {
  const long D = layer.D, H = layer.H, K = layer.K, C = layer.C, E = layer.router ? layer.E : 0, R = M * layer.chosen;
  const long width = std::max({H * C, D, layer.gate.O, E ? layer.gate_up.O : 0});
  X* work = scratch<X, 6>(M * (D + H * C + 2 * K * C + 3 * width));
  X *x = work, *q = x + M * D, *k = q + M * H * C, *v = k + M * K * C, *a = v + M * K * C, *b = a + M * width,
    *c = b + M * width;

  rms_norm(h, M, D, (const X*)layer.input_norm, layer.eps, x);
  product(layer.q, 0, x, M, q);
  product(layer.k, 0, x, M, k);
  product(layer.v, 0, x, M, v);
  if (rotation || layer.qk_eps >= 0 || temperature) {
    turn(q, H * C, M, H, C, rotation, layer.qk_eps, temperature, q);
    turn(k, K * C, M, K, C, rotation, layer.qk_eps, nullptr, k);
  }
  with_format<X>(format, [&](auto held) {
    using F = decltype(held);
    for (long m = 0; m < M; m++)
      for (long head = 0; head < K; head++) {
        const long slot = lengths[m] - 1, from = (m * K + head) * C;
        char* block = table[m * table_width + slot / slots];
        put<F>(block, slot % slots, head, K, C, k + from);
        put<F>(block, slot % slots, K + head, K, C, v + from);
      }
    attend<F>(q, table, table_width, lengths, M, H, K, C, a);
  });
  product(layer.o, 0, a, M, b);
  add(h, b, M * D);

  rms_norm(h, M, D, (const X*)layer.post_norm, layer.eps, x);
  if (E) {
    float* logits = scratch<float, 7>(M * E + R * 2);
    float* scores = logits + M * E;
    long* experts = scratch<long, 8>(R);
    out_in(typename For<X>::Dense{(const X*)layer.router, D}, x, M, E, Scales{}, logits);
    for (long m = 0; m < M; m++)
      choose(logits + m * E, E, layer.chosen, experts + m * layer.chosen, scores + m * layer.chosen);
    for (long e = 0; e < E; e++) {
      long count = 0;
      for (long i = 0; i < R; i++)
        if (experts[i] == e) {
          const X* from = x + i / layer.chosen * D;
          for (long d = 0; d < D; d += 16) keep(a + count * D + d, floats(from + d) * scores[i]);
          count++;
        }
      if (!count) continue;
      const long F = layer.gate_up.O / 2;
      product(layer.gate_up, e, a, count, b);
      swiglu(b, b + F, count, F, 2 * F, c);
      product(layer.down, e, c, count, a);
      for (long i = 0, row = 0; i < R; i++)
        if (experts[i] == e) add(h + i / layer.chosen * D, a + row++ * D, D);
    }
  }
  product(layer.gate, 0, x, M, a);
  product(layer.up, 0, x, M, b);
  swiglu(a, b, M, layer.gate.O, layer.gate.O, c);
  product(layer.shared_down, 0, c, M, a);
  add(h, a, M * D);
}

}  // namespace

// ---- what Python calls, once per dtype of x and y: f for float32, b for bfloat16

#define ENTRIES(X, suffix)                                                                                             \
  extern "C" void linear_##suffix(const X* x, long M, long I, long O, const X* w, X* y) {                              \
    out_in(For<X>::Dense{w, I}, x, M, O, Scales{}, y);                                                                 \
  }                                                                                                                    \
  extern "C" void project_##suffix(const X* x, long M, long I, long O, const X* w, X* y) {                             \
    project(x, M, I, O, w, y);                                                                                         \
  }                                                                                                                    \
  extern "C" void linear_int8_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide, \
                                       X* y) {                                                                         \
    linear_int8(w, x, M, I, O, Scales{s, wide}, y);                                                                    \
  }                                                                                                                    \
  extern "C" void linear_fp8_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide,  \
                                      X* y) {                                                                          \
    linear_fp8(w, x, M, I, O, Scales{s, wide}, y);                                                                     \
  }                                                                                                                    \
  extern "C" void linear_int4_##suffix(const X* x, long M, long I, long O, const uint8_t* w, const void* s, long wide, \
                                       long group, X* y) {                                                             \
    linear_int4({w, I, {s, wide}, group}, x, M, O, y);                                                                 \
  }                                                                                                                    \
  extern "C" void quantize_int4_##suffix(const X* weights, long groups, long size, const float* ranges, long count,    \
                                         uint32_t* words, X* scales) {                                                 \
    quantize_int4(weights, groups, size, ranges, count, words, scales);                                                \
  }                                                                                                                    \
  extern "C" void rms_norm_##suffix(const float* x, long N, long D, const X* weight, const float* eps, X* y) {         \
    rms_norm(x, N, D, weight, *eps, y);                                                                                \
  }                                                                                                                    \
  extern "C" void turn_##suffix(const X* x, long stride, long N, long H, long C, const float* rotation,                \
                                const float* eps, const float* factors, X* y) {                                        \
    turn(x, stride, N, H, C, rotation, *eps, factors, y);                                                              \
  }                                                                                                                    \
  extern "C" void swiglu_##suffix(const X* gate, const X* up, long N, long F, long stride, X* y) {                     \
    swiglu(gate, up, N, F, stride, y);                                                                                 \
  }                                                                                                                    \
  extern "C" void attend_##suffix(const X* q, const char* const* table, long table_width, const long* lengths, long B,  \
                                  long H, long K, long C, long format, X* y) {                                         \
    with_format<X>(format, [&](auto held) {                                                                            \
      attend<decltype(held)>(q, table, table_width, lengths, B, H, K, C, y);                                           \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void attend_causal_##suffix(const X* q, const X* k, const X* v, long N, const char* const* blocks,        \
                                         long past, long H, long K, long C, long format, X* y) {                       \
    with_format<X>(format, [&](auto held) {                                                                            \
      attend_causal<decltype(held)>(q, k, v, N, blocks, past, H, K, C, y);                                             \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void decode_##suffix(const Layer* layer, float* h, long M, const float* rotation,                         \
                                  const float* temperature, const long* lengths, char* const* table,                   \
                                  long table_width, long format) {                                                     \
    decode<X>(*layer, h, M, rotation, temperature, lengths, table, table_width, format);                                \
  }
ENTRIES(float, f)
ENTRIES(bf16, b)

