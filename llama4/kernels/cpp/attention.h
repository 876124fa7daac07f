// softmax(q K^T / sqrt(C)) V over a cache in blocks, of the new tokens of several sequences.
//
// The softmax over a block is computed as sums weighted by e^(score - max of the block), the blocks' parts are merged
// (Milakov & Gimelshein 2018). Keys are read once per sequence, which is what takes the time.
//
// Shapes: B sequences, N new tokens, H query heads, K key heads, C head_dim; H / K queries per key head.

#pragma once

#include "elementwise.h"
#include "kv_cache.h"

namespace {

constexpr int max_queries = 5;  // that meet keys at once: as many as the Llama 4 models have per key head

// Which of the N new tokens belong to which sequence: those of sequence b are sequence_starts[b] to
// sequence_starts[b + 1] - 1. Without `sequence_starts` each sequence has one.
struct Sequences {
  const long* sequence_starts;
  long B;
  long begin(long b) const { return sequence_starts ? sequence_starts[b] : b; }
  long end(long b) const { return begin(b + 1); }
  long N() const { return begin(B); }
};

// Prefetches 16 rows, which the processor does too late by itself.
template <class F>
void prefetch_rows(const Head<F>& head, long s) {
  const char* from = head.rows + s * head.row_bytes;
  for (long line = 0; line < 16 * head.row_bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

// Dot products of Q queries with 16 keys, [Q] vectors. `step` numbers of a key or query are read at a time. Four keys
// go together, so that what is read of a query serves four, and sums stay in registers.
template <int Q, int step, class Key, class Query>
void dot_16_keys(long C, const Key& key, const Query& query, f32x16* dots) {
  f32x16 fours[Q][4];
  for (int t = 0; t < 4; t++) {
    f32x16 own[Q][4] = {};
    for (long c = 0; c < C; c += step) {
      const decltype(key(0, 0)) keys[4] = {key(t, c), key(t + 4, c), key(t + 8, c), key(t + 12, c)};
#pragma GCC unroll 8
      for (int i = 0; i < Q; i++) {
        const auto numbers = query(i, c);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) own[i][k] = multiply_add(own[i][k], keys[k], numbers);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) fours[i][t] = fold<4>(fold<8>(own[i][0], own[i][2]), fold<8>(own[i][1], own[i][3]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; i++) dots[i] = horizontal_sums<2>(fours[i]);
}

// Values whose products are one sum; such sums are added to each other, which in float32 rounds less than one long sum.
constexpr long values_per_sum = 64;

// sums += weights of Q queries times values [first, n), `together` of them at a time; read(t, to) reads some of their
// numbers. The first time it prefetches the keys of the next head, which is read next.
template <int Q, int together, class Plane, int planes, class F, class Read, class Weight>
void add_values(long first, long n, const Head<F>& keys, bool is_first, const Read& read, const Weight& weight,
                f32x16 (&sums)[Q][planes]) {
  for (long t = first; t < n; t += together) {
    if (is_first && t % 16 == 0) prefetch_rows(keys, block_slots + t);
    Plane values[planes];
    read(t, values);
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) {
      const Plane own = weight(i, t);
#pragma GCC unroll 4
      for (int j = 0; j < planes; j++) sums[i][j] = multiply_add(sums[i][j], values[j], own);
    }
  }
}

// Scores of n keys become weights e^(score - most), zero where the score is minus infinity, and behind them up to a
// multiple of 16. -> most, sum of the weights
inline std::pair<float, float> softmax_weights(float* scores, long n) {
  const long width = (n + 15) / 16 * 16;
  std::fill(scores + n, scores + width, -INFINITY);
  f32x16 highest = load<f32x16>(scores), total{};
  for (long s = 16; s < width; s += 16) highest = max(highest, load<f32x16>(scores + s));
  const float most = horizontal_max(highest), origin = most == -INFINITY ? 0 : most;
  for (long s = 0; s < width; s += 16) {
    f32x16 weight = exp(load<f32x16>(scores + s) - origin);
    total += weight;
    store(scores + s, weight);
  }
  return {most, horizontal_sum(total)};
}

// Q queries, divided by sqrt(C), against n keys and values of a block. Of each query, `part` floats apart: the weighted
// sums of values [C], `most`, and the sum of the weights. `scores` is memory for [Q, 256].
template <int Q, class F>
void attend_block(const float* q, const Head<F>& keys, const Head<F>& values, long n, long C, float* scores, float* out,
                  long part) {
  for (long s = 0; s < n; s += 16) {
    prefetch_rows(keys, s + 32), prefetch_rows(values, s);
    f32x16 dots[Q];  // behind the last key of a block may be anything; its scores are overwritten
    const auto key = [&](long t, long c) { return keys.read(s + t, c); };
    const auto query = [&](long i, long c) { return load<f32x16>(q + i * C + c); };
    dot_16_keys<Q, 16>(C, key, query, dots);
    for (int i = 0; i < Q; i++)
      store(scores + i * block_slots + s, F::scaled ? dots[i] * load_floats(keys.scales + s) : dots[i]);
  }
  for (int i = 0; i < Q; i++) {
    float* own = scores + i * block_slots;
    std::tie(out[i * part + C], out[i * part + C + 1]) = softmax_weights(own, n);
    for (long s = 0; F::scaled && s < n; s += 16)
      store(own + s, load<f32x16>(own + s) * load_floats(values.scales + s));
  }
  const auto add = [&](auto planes, long c) {
    constexpr int P = planes;
    const auto read = [&](long t, f32x16* to) {
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) to[j] = values.read(t, c + 16 * j);
    };
    const auto weight = [&](int i, long t) { return scores[i * block_slots + t] - f32x16{}; };
    for (long first = 0; first < n; first += values_per_sum) {
      f32x16 sums[Q][P] = {};
      add_values<Q, 1, f32x16>(first, std::min(n, first + values_per_sum), keys, c == 0, read, weight, sums);
      for (int i = 0; i < Q; i++)
        for (int j = 0; j < P; j++) {
          float* to = out + i * part + c + 16 * j;
          store(to, first ? load<f32x16>(to) + sums[i][j] : sums[i][j]);
        }
    }
  };
  long c = 0;
  for (; c + 64 <= C; c += 64) add(std::integral_constant<int, 4>(), c);
  for (; c < C; c += 16) add(std::integral_constant<int, 1>(), c);
}

#ifdef __AVX512BF16__
// The same for queries, not yet divided, keys and values of bfloat16, two numbers to a sum. The weights are rounded,
// too.
template <int Q>
void attend_block(const bf16* q, const Head<Unquantized<bf16>>& keys, const Head<Unquantized<bf16>>& values, long n,
                  long C, float* scores, float* out, long part) {
  const float factor = 1 / __builtin_sqrtf(C);
  for (long s = 0; s < n; s += 16) {
    prefetch_rows(keys, s + 32), prefetch_rows(values, s);
    f32x16 dots[Q];
    const auto key = [&](long t, long c) {
      return bf16x32{_mm512_loadu_si512(keys.rows + (s + t) * keys.row_bytes + 2 * c)};
    };
    const auto query = [&](long i, long c) { return bf16x32{_mm512_loadu_si512(q + i * C + c)}; };
    dot_16_keys<Q, 32>(C, key, query, dots);
    for (int i = 0; i < Q; i++) store(scores + i * block_slots + s, dots[i] * factor);
  }
  for (int i = 0; i < Q; i++) {
    float* own = scores + i * block_slots;
    std::tie(out[i * part + C], out[i * part + C + 1]) = softmax_weights(own, n);
    for (long s = 0; s < n; s += 16) store_floats((bf16*)own + s, load<f32x16>(own + s));
  }
  const auto weight = [&](int i, long t) {  // of two values
    uint32_t two;
    __builtin_memcpy(&two, (bf16*)(scores + i * block_slots) + t, sizeof two);
    return bf16x32{_mm512_set1_epi32(two)};
  };
  const auto add = [&](auto planes, long c) {
    constexpr int P = planes;
    const auto read = [&](long t, bf16x32* to) {
#pragma GCC unroll 2
      for (int j = 0; j < P; j += 2) {
        const char* row = values.rows + t * values.row_bytes + 2 * c + 32 * j;
        __m512i a = _mm512_loadu_si512(row), b{};
        if (t + 1 < n) b = _mm512_loadu_si512(row + values.row_bytes);
        to[j].bits = _mm512_unpacklo_epi16(a, b), to[j + 1].bits = _mm512_unpackhi_epi16(a, b);
      }
    };
    f32x16 sums[Q][P] = {};
    add_values<Q, 2, bf16x32>(0, n, keys, c == 0, read, weight, sums);
    for (int i = 0; i < Q; i++)
      for (int j = 0; j < P; j += 2) {  // four numbers are in the one, the next four in the other
        __m512d low = (__m512d)sums[i][j], high = (__m512d)sums[i][j + 1];
        float* own = out + i * part + c + 16 * j;
        _mm512_storeu_pd(own, _mm512_permutex2var_pd(low, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high));
        _mm512_storeu_pd(own + 16, _mm512_permutex2var_pd(low, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), high));
      }
  };
  long c = 0;
  for (; c + 64 <= C; c += 64) add(std::integral_constant<int, 4>(), c);
  for (; c < C; c += 32) add(std::integral_constant<int, 2>(), c);
}
constexpr bool has_bf16_attention = true;
#else
constexpr bool has_bf16_attention = false;
#endif

inline long blocks_for(long tokens) { return (tokens + block_slots - 1) / block_slots; }

// A query's part of a block: [C] sums, `most`, the sum of the weights, and a gap that keeps them aligned.
constexpr long part_floats(long C) { return C + 16; }

// y [N, H, C] of queries [N, H, C], for tokens [from, until). Token n sees the first lengths[n] tokens of its sequence,
// its own included, which are in the blocks that block_table[b * width] and what follows point to. A task is a block of
// a sequence and a key head; last blocks, which may be short, come first, when tasks are handed out in large portions.
template <class F, class X>
void attend_tokens(Team& team, long from, long until, const X* q, const char* const* block_table, long width,
                   const long* lengths, const Sequences& sequences, long H, long K, long C, X* y) {
  const auto scope = team.scope();
  const long group = H / K, part = part_floats(C), longest = *std::max_element(lengths + from, lengths + until);
  const long blocks = blocks_for(longest), keys = std::min(longest, block_slots);
  float* parts = team.memory<float>((until - from) * H * blocks * part);
  team.for_each(sequences.B * blocks * K, 2 * keys * C, [=](long task) {
    float* queries = scratch<float, Use::queries>(max_queries * C);
    float* scores = scratch<float, Use::scores>(max_queries * block_slots);
    const long b = task / K / blocks, block = blocks - 1 - task / K % blocks, k = task % K;
    for (long token = std::max(from, sequences.begin(b)); token < std::min(until, sequences.end(b)); token++) {
      const long n = std::min(lengths[token] - block * block_slots, block_slots);
      if (n <= 0) continue;
      const char* memory = block_table[b * width + block];
      const Head<F> keys = head_of<F>(memory, k, K, C), values = head_of<F>(memory, K + k, K, C);
      const auto attend_queries = [&](auto count, long first) {
        const long head = token * H + k * group + first;
        float* out = parts + ((head - from * H) * blocks + block) * part;
        if constexpr (has_bf16_attention && std::is_same_v<F, Unquantized<bf16>> && std::is_same_v<X, bf16>) {
          if (C % 32 == 0) return attend_block<count>(q + head * C, keys, values, n, C, scores, out, blocks * part);
        }
        for (long i = 0; i < count * C; i += 16)
          store(queries + i, load_floats(q + head * C + i) * (1 / __builtin_sqrtf(C)));
        attend_block<count>(queries, keys, values, n, C, scores, out, blocks * part);
      };
      if (group == max_queries) attend_queries(std::integral_constant<int, max_queries>(), 0);
      else for_each_four(group, attend_queries);
    }
  });
  team.for_each((until - from) * H, blocks * C, [=](long i) {
    const long head = from * H + i;
    const float* own = parts + i * blocks * part;
    const long used = blocks_for(lengths[head / H]);
    float most = own[C], total = 0;
    for (long i = 1; i < used; i++) most = std::max(most, own[i * part + C]);
    f32x16 sums[max_head_dim / 16] = {};
    for (long i = 0; i < used; i++) {
      const float factor = exp(f32x16{} + (own[i * part + C] - most))[0];
      total += factor * own[i * part + C + 1];
      for (long c = 0; c < C; c += 16) sums[c / 16] += load<f32x16>(own + i * part + c) * factor;
    }
    for (long c = 0; c < C; c += 16) store_floats(y + head * C + c, sums[c / 16] / total);
  });
}

constexpr long max_part_floats = 1 << 20;  // of all parts that are kept at once

// The same for all tokens, as many at once as their parts allow.
template <class F, class X>
void attend(Team& team, const X* q, const char* const* block_table, long width, const long* lengths,
            const Sequences& sequences, long H, long K, long C, X* y) {
  const long N = sequences.N(), blocks = blocks_for(*std::max_element(lengths, lengths + N));
  const long tokens = std::max(max_part_floats / (H * blocks * part_floats(C)), 1l);
  for (long from = 0; from < N; from += tokens)
    attend_tokens<F>(team, from, std::min(N, from + tokens), q, block_table, width, lengths, sequences, H, K, C, y);
}

}  // namespace
