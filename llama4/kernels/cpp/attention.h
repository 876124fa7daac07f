// Attention over keys and values in blocks: of one new token per row, which takes as long as reading them does, and of
// many, which takes as long as their products.
//
// Shapes: B rows, N new tokens, H query heads, K key heads, G = H / K, C head_dim.

#pragma once

#include "blocks.h"
#include "tiles.h"

namespace {

// ---- one token per row

constexpr int most_queries = 5;  // that meet keys together: as many as the Llama 4 models have for a key head

// Sixteen rows nearer, which the processor does too late.
template <class F>
void bring(const Head<F>& head, long s) {
  const char* from = head.rows + s * head.bytes;
  for (long line = 0; line < 16 * head.bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

// Products of Q queries with sixteen keys, [Q] registers of sixteen; `step` numbers of either are read at a time. Four
// keys go together, so that what is read of a query serves four, and sums of lanes need not wait in memory.
template <int Q, int step, class Key, class Query>
void dot_sixteen(long C, const Key& key, const Query& query, f32* dots) {
  f32 fours[Q][4];
  for (int t = 0; t < 4; t++) {
    f32 own[Q][4] = {};
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
    for (int i = 0; i < Q; i++)
      fours[i][t] = merged<4>(merged<8>(own[i][0], own[i][2]), merged<8>(own[i][1], own[i][3]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; i++) dots[i] = sums<2>(fours[i]);
}

// Adds n values, `together` of them at a time, times the weights of Q queries to sums: planes(t, to) reads some of their
// numbers. The first time it brings near the keys of the next head, whose turn it is next.
template <int Q, int together, class Plane, int wide, class F, class Planes, class Weight>
void add_values(long n, const Head<F>& keys, bool is_first, const Planes& planes, const Weight& weight,
                f32 (&sums)[Q][wide]) {
  for (long t = 0; t < n; t += together) {
    if (is_first && t % 16 == 0) bring(keys, slots + t);
    Plane values[wide];
    planes(t, values);
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++) {
      const Plane own = weight(i, t);
#pragma GCC unroll 4
      for (int j = 0; j < wide; j++) sums[i][j] = multiply_add(sums[i][j], values[j], own);
    }
  }
}

// Scores of n keys become weights e^(score - most), zero behind them up to a multiple of 16; -> most, and their sum.
std::pair<float, float> weigh(float* scores, long n) {
  const long width = (n + 15) / 16 * 16;
  std::fill(scores + n, scores + width, -INFINITY);
  f32 highest = load<f32>(scores), total{};
  for (long s = 16; s < width; s += 16) highest = larger(highest, load<f32>(scores + s));
  const float most = largest(highest);
  for (long s = 0; s < width; s += 16) {
    f32 weight = exponential(load<f32>(scores + s) - most);
    total += weight;
    store(scores + s, weight);
  }
  return {most, sum(total)};
}

// Q queries, divided by sqrt(C), against n keys: sums of values [Q, C], weighted by e^(score - most), then `most` and the
// sum of the weights, `part` behind those of the query before. Room for scores is [Q, 256].
template <int Q, class F>
void attend_block(const float* q, const Head<F>& keys, const Head<F>& values, long n, long C, float* scores, float* out,
                  long part) {
  for (long s = 0; s < n; s += 16) {
    bring(keys, s + 32), bring(values, s);
    f32 dots[Q];  // the last of a block may have no number yet, and their scores go
    const auto key = [&](long t, long c) { return keys.read(s + t, c); };
    const auto query = [&](long i, long c) { return load<f32>(q + i * C + c); };
    dot_sixteen<Q, 16>(C, key, query, dots);
    for (int i = 0; i < Q; i++) store(scores + i * slots + s, F::scaled ? dots[i] * floats(keys.scales + s) : dots[i]);
  }
  for (int i = 0; i < Q; i++) {
    float* own = scores + i * slots;
    std::tie(out[i * part + C], out[i * part + C + 1]) = weigh(own, n);
    for (long s = 0; F::scaled && s < n; s += 16) store(own + s, load<f32>(own + s) * floats(values.scales + s));
  }
  const auto add = [&](auto wide, long c) {
    const auto planes = [&](long t, f32* to) {
#pragma GCC unroll 4
      for (int j = 0; j < wide; j++) to[j] = values.read(t, c + 16 * j);
    };
    const auto weight = [&](int i, long t) { return scores[i * slots + t] - f32{}; };
    f32 sums[Q][wide] = {};
    add_values<Q, 1, f32>(n, keys, c == 0, planes, weight, sums);
    for (int i = 0; i < Q; i++)
      for (int j = 0; j < wide; j++) store(out + i * part + c + 16 * j, sums[i][j]);
  };
  long c = 0;
  for (; c + 64 <= C; c += 64) add(std::integral_constant<int, 4>(), c);
  for (; c < C; c += 16) add(std::integral_constant<int, 1>(), c);
}

#ifdef __AVX512BF16__
// The same for queries, not yet divided, keys and values of bfloat16, two numbers to a sum: the weights are rounded, too.
template <int Q>
void attend_block(const bf16* q, const Head<AsIs<bf16>>& keys, const Head<AsIs<bf16>>& values, long n, long C,
                  float* scores, float* out, long part) {
  const float factor = 1 / __builtin_sqrtf(C);
  for (long s = 0; s < n; s += 16) {
    bring(keys, s + 32), bring(values, s);
    f32 dots[Q];
    const auto key = [&](long t, long c) { return bf16s{_mm512_loadu_si512(keys.rows + (s + t) * keys.bytes + 2 * c)}; };
    const auto query = [&](long i, long c) { return bf16s{_mm512_loadu_si512(q + i * C + c)}; };
    dot_sixteen<Q, 32>(C, key, query, dots);
    for (int i = 0; i < Q; i++) store(scores + i * slots + s, dots[i] * factor);
  }
  const auto weight = [&](int i, long t) {  // two of them, in the place of the first scores of their query
    uint32_t two;
    __builtin_memcpy(&two, (bf16*)(scores + i * slots) + t, sizeof two);
    return bf16s{_mm512_set1_epi32(two)};
  };
  for (int i = 0; i < Q; i++) {
    float* own = scores + i * slots;
    std::tie(out[i * part + C], out[i * part + C + 1]) = weigh(own, n);
    for (long s = 0; s < n; s += 16) keep((bf16*)own + s, load<f32>(own + s));
  }
  const auto add = [&](auto wide, long c) {
    const auto planes = [&](long t, bf16s* to) {
#pragma GCC unroll 2
      for (int j = 0; j < wide; j += 2) {
        const char* row = values.rows + t * values.bytes + 2 * c + 32 * j;
        __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(t + 1 < n ? row + values.bytes : row);
        to[j].bits = _mm512_unpacklo_epi16(a, b), to[j + 1].bits = _mm512_unpackhi_epi16(a, b);
      }
    };
    f32 sums[Q][wide] = {};
    add_values<Q, 2, bf16s>(n, keys, c == 0, planes, weight, sums);
    for (int i = 0; i < Q; i++)
      for (int j = 0; j < wide; j += 2) {  // four numbers are in the one, the next four in the other
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
constexpr bool attends_in_pairs = true;
#else
constexpr bool attends_in_pairs = false;
#endif

// Blocks of 256 tokens.
long blocks_for(long tokens) { return (tokens + slots - 1) / slots; }

// Floats that `attend` wants.
long parts_for(const long* lengths, long B, long H, long C) {
  return B * H * blocks_for(*std::max_element(lengths, lengths + B)) * (C + 16);
}

// softmax(q K^T / sqrt(C)) V for one query of every row and head, [B, H, C], by a team. Row b sees the first lengths[b]
// tokens of the blocks that table[b * width] and what follows point to. A task is a block and a key head, those of the last
// block, which may be short, in the first and largest share of tasks; what it leaves in `parts` is put together with the
// other blocks' when all are done.
template <class F, class X>
void attend(const X* q, const char* const* table, long width, const long* lengths, long B, long H, long K, long C,
            float* parts, X* y) {
  const long G = H / K, blocks = blocks_for(*std::max_element(lengths, lengths + B)), part = C + 16;
  float* queries = scratch<float, 2>(most_queries * C);
  float* scores = scratch<float, 3>(most_queries * slots);
#pragma omp for schedule(guided) nowait
  for (long task = 0; task < B * blocks * K; task++) {
    const long b = task / K / blocks, block = blocks - 1 - task / K % blocks, k = task % K;
    const long n = std::min(lengths[b] - block * slots, slots);
    if (n <= 0) continue;
    const char* held = table[b * width + block];
    const Head<F> keys = head_of<F>(held, k, K, C), values = head_of<F>(held, K + k, K, C);
    const auto meet = [&](auto count, long first) {
      const long head = b * H + k * G + first;
      float* out = parts + (head * blocks + block) * part;
      if constexpr (attends_in_pairs && std::is_same_v<F, AsIs<bf16>> && std::is_same_v<X, bf16>) {
        if (C % 32 == 0) return attend_block<count>(q + head * C, keys, values, n, C, scores, out, blocks * part);
      }
      for (long i = 0; i < count * C; i += 16)
        store(queries + i, floats(q + head * C + i) * (1 / __builtin_sqrtf(C)));
      attend_block<count>(queries, keys, values, n, C, scores, out, blocks * part);
    };
    G == most_queries ? meet(std::integral_constant<int, most_queries>(), 0) : in_fours(G, meet);
  }
  wait_for_team();
#pragma omp for schedule(static) nowait
  for (long head = 0; head < B * H; head++) {
    const float* own = parts + head * blocks * part;
    const long used = blocks_for(lengths[head / H]);
    float most = own[C], total = 0;
    for (long i = 1; i < used; i++) most = std::max(most, own[i * part + C]);
    f32 sums[64] = {};
    for (long i = 0; i < used; i++) {
      const float factor = exponential(f32{} + (own[i * part + C] - most))[0];
      total += factor * own[i * part + C + 1];
      for (long c = 0; c < C; c += 16) sums[c / 16] += load<f32>(own + i * part + c) * factor;
    }
    for (long c = 0; c < C; c += 16) keep(y + head * C + c, sums[c / 16] / total);
  }
}

// ---- many tokens

// Some queries of one key head on their way through the keys, 256 at a time: sums of values weighted by e^(score - most),
// of which `most` may still grow (Milakov & Gimelshein 2018, Dao et al. 2022).
template <class X>
struct Tile {
  static constexpr int per_word = numbers_per_word<X>;
  using Number = std::conditional_t<per_word == 2, bf16, float>;
  long rows, C;
  Word *queries, *keys, *values, *weights;  // [rows, C], [C, 256], [256, C], [8, 256], in words along the dot products
  float *sums, *scores, *most, *total;      // [rows, C], [8, 256], [rows], [rows]
  float *key_scales, *value_scales;         // [256] each: codes of few bits are exact in bfloat16, scaled they are not

  Tile(long rows, long C) : rows(rows), C(C) {
    const long words = C / per_word;
    queries = scratch<Word, 4>(rows * words + words * slots + slots / per_word * C + rows_at_once * slots);
    keys = queries + rows * words, values = keys + words * slots, weights = values + slots / per_word * C;
    sums = scratch<float, 5>(rows * C + rows_at_once * slots + 2 * slots + 2 * rows);
    scores = sums + rows * C, key_scales = scores + rows_at_once * slots, value_scales = key_scales + slots;
    most = value_scales + slots, total = most + rows;
    std::fill(sums, sums + rows * C, 0.f), std::fill(total, total + rows, 0.f);
    std::fill(most, most + rows, -INFINITY);
  }

  void query(long row, const X* from) {
    Number* to = (Number*)(queries + row * C / per_word);
    for (long c = 0; c < C; c += 16) keep(to + c, floats(from + c));
  }

  // The next keys and values, n of them.
  template <class F>
  void take(const Head<F>& head, const Head<F>& other, long n) {
    for (long s = 0; F::scaled && s < slots; s++)
      key_scales[s] = s < n ? head.scale(s) : 0, value_scales[s] = s < n ? other.scale(s) : 0;
    const auto read = [&](const Head<F>& from, long s, long c) { return s < n && c < C ? from.read(s, c) : f32{}; };
    for (long s = 0; s < slots; s += 16)
      for (long c = 0; c < C; c += 16 * per_word) {
        u32 rows[16];
        for (long i = 0; i < 16; i++) {
          f32 planes[per_word];
          for (long p = 0; p < per_word; p++) planes[p] = read(head, s + i, c + 16 * p);
          rows[i] = words_of<per_word>(planes);
        }
        transpose(rows);
        for (long i = 0; i < std::min(16l, (C - c) / per_word); i++) store(keys + (c / per_word + i) * slots + s, rows[i]);
      }
    for (long s = 0; s < slots; s += per_word)
      for (long c = 0; c < C; c += 16) {
        f32 planes[per_word];
        for (long p = 0; p < per_word; p++) planes[p] = read(other, s + p, c);
        store(values + s / per_word * C + c, side_by_side<per_word>(words_of<per_word>(planes)));
      }
  }

  // Row r sees the first seen(r) of the keys.
  template <bool scaled, class Seen>
  void meet(const Seen& seen) {
    for (long first = 0; first < rows; first += rows_at_once) {
      const long n = (std::min(seen(first + rows_at_once - 1), slots) + 31) / 32 * 32;
      if (n <= 0) continue;
      std::fill(scores, scores + rows_at_once * slots, 0.f);
      add_tiles<per_word>(queries + first * C / per_word, C / per_word, keys, slots, C / per_word, scores, slots, n);
      for (long r = 0; r < rows_at_once; r++)
        weigh<scaled>(first + r, scores + r * slots, seen(first + r), n, weights + r * slots);
      add_tiles<per_word>(weights, slots, values, C, n / per_word, sums + first * C, C, C);
    }
  }

  template <bool scaled>
  void weigh(long row, float* own, long seen, long n, Word* out) {
    const float factor = 1.44269504f / __builtin_sqrtf(C);  // to powers of two
    for (long s = 0; scaled && s < n; s += 16) store(own + s, load<f32>(own + s) * load<f32>(key_scales + s));
    std::fill(own + std::clamp(seen, 0l, n), own + n, -INFINITY);
    f32 highest = load<f32>(own);
    for (long s = 16; s < n; s += 16) highest = larger(highest, load<f32>(own + s));
    const float now = std::max(most[row], largest(highest) * factor);
    if (now > most[row]) {
      const float shrink = power_of_two<false>(f32{} + (most[row] - now))[0];
      for (long c = 0; c < C; c += 16) store(sums + row * C + c, load<f32>(sums + row * C + c) * shrink);
      total[row] *= shrink, most[row] = now;
    }
    f32 all{};
    for (long s = 0; s < n; s += 16) {
      f32 weight = seen > 0 ? power_of_two<per_word == 2>(load<f32>(own + s) * factor - now) : f32{};
      all += weight;
      keep((Number*)out + s, scaled ? weight * load<f32>(value_scales + s) : weight);
    }
    total[row] += sum(all);
  }
};

// softmax(q K^T / sqrt(C)) V for queries [N, H, C], each of which sees `past` tokens in blocks and the new keys and values
// [N, K, C] up to its own.
template <class F, class X>
void attend_causal(const X* q, const X* k, const X* v, long N, const char* const* blocks, long past, long H, long K,
                   long C, X* y) {
  const long G = H / K, tokens = std::max(8l, 512 / G), tiles = (N + tokens - 1) / tokens;
#pragma omp parallel for schedule(dynamic) if (N * (past + N) * H * C > worth_threads)
  for (long task = 0; task < K * tiles; task++) {
    const long head = task % K, begin = (tiles - 1 - task / K) * tokens, end = std::min(N, begin + tokens);
    const long rows = (end - begin) * G;
    Tile<X> tile((rows + rows_at_once - 1) / rows_at_once * rows_at_once, C);
    for (long r = 0; r < tile.rows; r++) {
      const long row = std::min(r, rows - 1);  // some twice, to fill the last eight
      tile.query(r, q + ((begin + row / G) * H + head * G + row % G) * C);
    }
    for (long from = 0; from < past; from += slots) {
      const char* block = blocks[from / slots];
      const long n = std::min(past - from, slots);
      tile.take(head_of<F>(block, head, K, C), head_of<F>(block, K + head, K, C), n);
      tile.template meet<F::scaled>([&](long) { return n; });
    }
    for (long from = 0; from < end; from += slots) {
      const auto at = [&](const X* x) {
        return Head<AsIs<X>>{(const char*)(x + (from * K + head) * C), nullptr, C, K * C * long(sizeof(X))};
      };
      tile.take(at(k), at(v), std::min(end - from, slots));
      tile.template meet<false>([&](long r) { return std::min(begin + std::min(r, rows - 1) / G + 1 - from, slots); });
    }
    for (long r = 0; r < rows; r++)
      for (long c = 0; c < C; c += 16)
        keep(y + ((begin + r / G) * H + head * G + r % G) * C + c, load<f32>(tile.sums + r * C + c) / tile.total[r]);
  }
}

}  // namespace
