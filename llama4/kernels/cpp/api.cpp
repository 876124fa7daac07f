// What Python calls (llama4/kernels/abi.py): functions by name and dtype of their rows, with the types of their
// arguments; and the numbers on which both sides must agree. Python compares all of them when it loads the library.
// Formats have their numbers here; Python reads them.

#include <cstddef>
#include <iterator>

#include "amx_check.h"
#include "attention.h"
#include "check.h"
#include "decoder.h"
#include "draw_token.h"
#include "elementwise.h"
#include "flash_attention.h"
#include "greedy_token.h"
#include "matrix.h"
#include "quantize.h"

namespace {
namespace api {

using namespace check;

// Calls run(n) for N rows of so many numbers, by all threads if that pays off.
template <class Run>
void for_each_row(long threads, long N, long numbers, const Run& run) {
  Team(N * numbers > min_parallel ? threads : 1).for_each(N, numbers, run);
}

// Every function computes with so many threads. It gives nullptr, or what is wrong with its arguments, before anything
// is computed.

template <class X>
Problem linear(long threads, const X* x, long N, long I, long O, long layout, const char* w, const void* scales,
               long float32_scales, long group_size, X* y) {
  if (!N) return nullptr;  // an empty tensor has no address
  const Matrix a{w, {scales, float32_scales}, layout, group_size, I, O, 0, 0};
  if (Problem problem = first(addresses(x, y), require(N >= 0, "negative rows"), matrix<X>(a))) return problem;
  ::linear(threads, a, x, N, y);
  return nullptr;
}

// down(silu(gate(x)) * up(x)) for rows sorted by expert, counts [E] of each.
template <class X>
Problem experts(long threads, const Matrix* gate_up, const Matrix* down, const long* counts, long E, const X* x, X* y) {
  if (Problem problem = first(addresses(gate_up, down, counts), require(E > 0, "there are no experts"))) return problem;
  if (Problem problem = first(check::experts<X>(*gate_up, *down),
                              require(*std::min_element(counts, counts + E) >= 0, "an expert has negative rows")))
    return problem;
  const bool has_rows = std::any_of(counts, counts + E, [](long count) { return count > 0; });
  if (Problem problem = has_rows ? addresses(x, y) : nullptr) return problem;
  Team team(gate_up->numbers() > min_parallel ? threads : 1);
  ::experts(team, *gate_up, *down, counts, E, x, y);
  return nullptr;
}

template <class X>
Problem quantize_int4(long threads, const X* weights, long groups, long size, const float* ranges, long count,
                      uint32_t* words, X* scales) {
  if (!groups) return nullptr;
  if (Problem problem =
          first(addresses(weights, ranges, words, scales), require(groups >= 0 && count > 0, "no ranges"), width(size)))
    return problem;
  ::quantize_int4(threads, weights, groups, size, ranges, count, words, scales);
  return nullptr;
}

template <class X>
Problem rms_norm(long threads, const float* x, long N, long D, const X* weight, float eps, X* y) {
  if (!N) return nullptr;  // an empty tensor has no address
  if (Problem problem = first(addresses(x, weight, y), require(N >= 0, "negative rows"), width(D))) return problem;
  for_each_row(threads, N, D, [&](long n) { ::rms_norm(x + n * D, D, weight, eps, y + n * D); });
  return nullptr;
}

template <class X>
Problem apply_rope(long threads, const X* x, long stride, long N, long H, long C, const float* rotation, float eps,
                   const float* factors, X* y) {
  if (!N) return nullptr;  // an empty tensor has no address
  if (Problem problem = first(addresses(x, y), require(N >= 0 && stride >= H * C, "rows overlap"), heads(H, H, C)))
    return problem;
  for_each_row(threads, N, H * C, [&](long n) {
    const float* own = rotation ? rotation + n * C : nullptr;
    const float factor = factors ? factors[n] : 1;
    for (long h = 0; h < H; h++) ::apply_rope(x + n * stride + h * C, C, own, eps, factor, y + (n * H + h) * C);
  });
  return nullptr;
}

template <class X>
Problem swiglu(long threads, const X* gate, const X* up, long N, long F, long stride, X* y) {
  if (!N) return nullptr;  // an empty tensor has no address
  if (Problem problem = first(addresses(gate, up, y), require(N >= 0 && stride >= F, "rows overlap"), width(F)))
    return problem;
  for_each_row(threads, N, F, [&](long n) { ::swiglu(gate + n * stride, up + n * stride, F, y + n * F); });
  return nullptr;
}

template <class X>
Problem greedy_token(long threads, const X* logits, long N, long V, long* ids, float* logprobs) {
  if (!N) return nullptr;  // an empty tensor has no address
  if (Problem problem = first(addresses(logits, ids, logprobs), require(N >= 0 && V > 0, "there are no logits")))
    return problem;
  Team team(N * V > min_parallel ? threads : 1);
  ::greedy_token(team, logits, N, V, ids, logprobs);
  return nullptr;
}

template <class X>
Problem draw_token(long threads, const X* logits, long N, long V, Draw* draws, long count) {
  if (Problem problem = first(addresses(logits, draws), require(N > 0 && V > 0, "there are no logits"),
                              check::draws(draws, count, N, V)))
    return problem;
  for_each_row(threads, count, V, [&](long i) { ::draw_token(logits + draws[i].row * V, V, draws[i]); });
  return nullptr;
}

// One query per sequence.
template <class X>
Problem attend(long threads, const X* q, const char* const* block_table, long width, const long* lengths, long B,
               long H, long K, long C, long format, X* y) {
  if (!B) return nullptr;
  const Sequences sequences{nullptr, B};
  if (Problem problem = first(addresses(q, y), check::sequences(nullptr, B), heads(H, K, C), cache_format<X>(format, C),
                              spans(sequences, lengths, block_table, width)))
    return problem;
  CacheFormats<X>::visit(format, [&](auto cache) {
    Team team(threads);
    ::attend<decltype(cache)>(team, q, block_table, width, lengths, sequences, H, K, C, y);
  });
  return nullptr;
}

template <class X>
Problem attend_causal(long threads, const X* q, const X* k, const X* v, long N, const char* const* blocks, long width,
                      long past, long H, long K, long C, long format, X* y) {
  if (!N) return nullptr;  // an empty tensor has no address
  if (Problem problem = first(addresses(q, k, v, y), require(N >= 0 && past >= 0, "negative tokens"), heads(H, K, C),
                              cache_format<X>(format, C)))
    return problem;
  if (Problem problem =
          past ? first(addresses(blocks), blocks ? check::blocks(blocks, width, past) : nullptr) : nullptr)
    return problem;
  CacheFormats<X>::visit(format, [&](auto cache) {
    Team team(threads);
    ::attend_causal<decltype(cache)>(team, q, k, v, N, blocks, past, H, K, C, y);
  });
  return nullptr;
}

template <class X>
Problem decode(long threads, const Decoder* decoder, const LayerStep* layer_steps, long step, const Tokens* tokens) {
  if (Problem problem = addresses(decoder, tokens)) return problem;
  if (Problem problem = check::decode<X>(*decoder, layer_steps, step, *tokens)) return problem;
  DecoderStep<X>(threads, *decoder, layer_steps, step, *tokens).run();
  return nullptr;
}

// ---- the tables

struct Function {
  const char *name, *dtype, *arguments;  // arguments: p for a pointer, q for 64 bits, f for a float
  const void* address;
};

template <class T>
constexpr char code_of() {
  if (std::is_pointer_v<T>) return 'p';
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, float> || std::is_same_v<T, long>);
  return std::is_same_v<T, float> ? 'f' : 'q';
}
template <class... Arguments>
constexpr char codes_of[] = {code_of<Arguments>()..., '\0'};

template <class... Arguments>
Function function(const char* name, const char* dtype, Problem (*f)(Arguments...)) {
  return {name, dtype, codes_of<Arguments...>, reinterpret_cast<const void*>(f)};
}

#define BOTH_DTYPES(name) function(#name, "float32", name<float>), function(#name, "bfloat16", name<bf16>)
const Function functions[] = {
    BOTH_DTYPES(linear),     BOTH_DTYPES(experts),       BOTH_DTYPES(quantize_int4), BOTH_DTYPES(rms_norm),
    BOTH_DTYPES(apply_rope), BOTH_DTYPES(swiglu),        BOTH_DTYPES(greedy_token),  BOTH_DTYPES(draw_token),
    BOTH_DTYPES(attend),     BOTH_DTYPES(attend_causal), BOTH_DTYPES(decode),
};

struct Constant {
  const char* name;
  int64_t value;
};

#define SIZE(type) {#type, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name)}
#define MEMBER(type, name, value) {#type "." #name, value}
#define NUMBER(name) {#name, name}
const Constant constants[] = {
    SIZE(Matrix),
    FIELD(Matrix, w),
    FIELD(Matrix, scales),
    {"Matrix.float32_scales", offsetof(Matrix, scales) + offsetof(Scales, is_float32)},
    FIELD(Matrix, layout),
    FIELD(Matrix, group_size),
    FIELD(Matrix, I),
    FIELD(Matrix, O),
    FIELD(Matrix, stride),
    FIELD(Matrix, scale_stride),
    SIZE(Layer),
    FIELD(Layer, q),
    FIELD(Layer, k),
    FIELD(Layer, v),
    FIELD(Layer, o),
    FIELD(Layer, gate_up),
    FIELD(Layer, expert_up),
    FIELD(Layer, down),
    FIELD(Layer, gate),
    FIELD(Layer, up),
    FIELD(Layer, shared_down),
    FIELD(Layer, input_norm),
    FIELD(Layer, post_norm),
    FIELD(Layer, router),
    FIELD(Layer, H),
    FIELD(Layer, K),
    FIELD(Layer, C),
    FIELD(Layer, E),
    FIELD(Layer, experts_per_token),
    FIELD(Layer, eps),
    FIELD(Layer, qk_eps),
    SIZE(Decoder),
    FIELD(Decoder, layers),
    FIELD(Decoder, num_layers),
    FIELD(Decoder, embedding),
    FIELD(Decoder, norm),
    FIELD(Decoder, head),
    FIELD(Decoder, eps),
    FIELD(Decoder, is_batch_invariant),
    SIZE(LayerStep),
    FIELD(LayerStep, rotations),
    FIELD(LayerStep, temperatures),
    FIELD(LayerStep, lengths),
    FIELD(LayerStep, block_table),
    FIELD(LayerStep, width),
    FIELD(LayerStep, format),
    SIZE(Tokens),
    FIELD(Tokens, ids),
    FIELD(Tokens, sequence_starts),
    FIELD(Tokens, features),
    FIELD(Tokens, outputs),
    FIELD(Tokens, B),
    FIELD(Tokens, num_outputs),
    FIELD(Tokens, logits),
    FIELD(Tokens, greedy),
    FIELD(Tokens, logprobs),
    FIELD(Tokens, hidden),
    FIELD(Tokens, residual),
    FIELD(Tokens, layer),
    FIELD(Tokens, is_prompt),
    SIZE(Penalties),
    FIELD(Penalties, seen),
    FIELD(Penalties, counts),
    FIELD(Penalties, biased),
    FIELD(Penalties, biases),
    FIELD(Penalties, num_seen),
    FIELD(Penalties, num_biased),
    FIELD(Penalties, repetition),
    FIELD(Penalties, presence),
    FIELD(Penalties, frequency),
    SIZE(Draw),
    FIELD(Draw, row),
    FIELD(Draw, top_k),
    FIELD(Draw, temperature),
    FIELD(Draw, top_p),
    FIELD(Draw, min_p),
    FIELD(Draw, uniform),
    FIELD(Draw, penalties),
    FIELD(Draw, id),
    FIELD(Draw, logprob),
    MEMBER(MatrixLayout, OUT_IN, OUT_IN),
    MEMBER(MatrixLayout, IN_OUT, IN_OUT),
    NUMBER(max_gemv_rows),
    NUMBER(max_head_dim),
    NUMBER(lanes),
    NUMBER(block_slots),
    NUMBER(strip),
    {"interleave", Int4::interleave},
    NUMBER(float32_inputs),
    NUMBER(bfloat16_inputs),
};

constexpr auto weight_formats = QuantizedFormats::entries();
constexpr auto cache_formats = CacheFormats<float>::entries();

}  // namespace api
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const api::Function* llama4_functions(long* count) {
  *count = std::size(api::functions);
  return api::functions;
}

EXPORT const api::Constant* llama4_constants(long* count) {
  *count = std::size(api::constants);
  return api::constants;
}

EXPORT const FormatEntry* llama4_weight_formats(long* count) {
  *count = std::size(api::weight_formats);
  return api::weight_formats.data();
}

EXPORT const FormatEntry* llama4_cache_formats(long* count) {
  *count = std::size(api::cache_formats);
  return api::cache_formats.data();
}

#ifdef __AVX512BF16__
// From now on products of many rows go by AMX, whose library has `open`. -> nullptr, or why they do not
EXPORT const char* llama4_use_amx(const char* (*open)(const Amx**)) {
  const Amx* opened = nullptr;
  if (const char* problem = open(&opened)) return problem;
  if (!computes_the_same(*opened)) return "a product by AMX is not what AVX512-BF16 computes";
  amx = opened;
  return nullptr;
}
#endif
