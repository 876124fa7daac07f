// softmax(q K^T / sqrt(C)) V for many new tokens of one sequence, which takes as long as the products of its tiles.
//
// Shapes: N new tokens, H query heads, K key heads, C head_dim; H / K queries per key head.

#pragma once

#include "gemm.h"
#include "kv_cache.h"

namespace {

// Some queries of one key head, on their way through the keys, 256 at a time: sums of values weighted by e^((score -
// most) / sqrt(C)), of which `most` may still grow (Milakov & Gimelshein 2018, Dao et al. 2022).
template <class X>
struct QueryTile {
  static constexpr int per_word = numbers_per_word<X>;
  using Number = WordNumber<X>;
  long rows, C;
  Word *queries, *keys, *values, *weights;  // [rows, C], [C, 256], [256, C], [8, 256], in words along the dot products
  float *sums, *scores, *most, *total;      // [rows, C], [8, 256], [rows], [rows]
  float *key_scales, *value_scales;         // [256] each: quantized values are exact in bfloat16, scaled ones are not

  QueryTile(long rows, long C) : rows(rows), C(C) {
    const long words = C / per_word;
    queries = scratch<Word, Use::words>(rows * words + words * block_slots + block_slots / per_word * C +
                                        tile_rows * block_slots);
    keys = queries + rows * words, values = keys + words * block_slots, weights = values + block_slots / per_word * C;
    sums = scratch<float, Use::floats>(rows * C + tile_rows * block_slots + 2 * block_slots + 2 * rows);
    scores = sums + rows * C, key_scales = scores + tile_rows * block_slots, value_scales = key_scales + block_slots;
    most = value_scales + block_slots, total = most + rows;
    std::fill(sums, sums + rows * C, 0.f), std::fill(total, total + rows, 0.f);
    std::fill(most, most + rows, -INFINITY);
  }

  void set_query(long row, const X* from) {
    Number* to = (Number*)(queries + row * C / per_word);
    for (long c = 0; c < C; c += 16) store_floats(to + c, load_floats(from + c));
  }

  // Packs the next n <= 256 keys and values.
  template <class F>
  void pack_block(const Head<F>& key_head, const Head<F>& value_head, long n) {
    for (long s = 0; F::scaled && s < block_slots; s++)
      key_scales[s] = s < n ? key_head.scale(s) : 0, value_scales[s] = s < n ? value_head.scale(s) : 0;
    const auto read = [&](const Head<F>& from, long s, long c) { return s < n && c < C ? from.read(s, c) : f32x16{}; };
    for (long s = 0; s < block_slots; s += 16)
      for (long c = 0; c < C; c += 16 * per_word) {
        u32x16 words[16];
        for (long i = 0; i < 16; i++) {
          f32x16 planes[per_word];
          for (long p = 0; p < per_word; p++) planes[p] = read(key_head, s + i, c + 16 * p);
          words[i] = words_of<per_word>(planes);
        }
        transpose(words);
        for (long i = 0; i < std::min(16l, (C - c) / per_word); i++)
          store(keys + (c / per_word + i) * block_slots + s, words[i]);
      }
    f32x16 zeros{};
    for (long s = 0; s < block_slots; s += per_word) {
      f32x16 own{};  // a sum for each slot, so that the additions of one do not wait for those of another
      for (long c = 0; c < C; c += 16) {
        f32x16 planes[per_word];
        for (long p = 0; p < per_word; p++) planes[p] = read(value_head, s + p, c), own += zero_or_nan(planes[p]);
        store(values + s / per_word * C + c, interleave_halves<per_word>(words_of<per_word>(planes)));
      }
      zeros += own;
    }
    num_apart = 0;
    if (horizontal_sum(zeros) != 0) set_apart(value_head, n);
  }

  // Row r sees the first seen(r) of the keys that were packed.
  template <class F, class Seen>
  void attend(const Head<F>& value_head, const Seen& seen) {
    for (long first = 0; first < rows; first += tile_rows) {
      const long n = (std::min(seen(first + tile_rows - 1), block_slots) + 31) / 32 * 32;
      if (n <= 0) continue;
      std::fill(scores, scores + tile_rows * block_slots, 0.f);
      add_tiles<per_word>(queries + first * C / per_word, C / per_word, keys, block_slots, C / per_word, scores,
                          block_slots, n);
      for (long r = 0; r < tile_rows; r++)
        softmax_row<F::scaled>(first + r, scores + r * block_slots, seen(first + r), n, weights + r * block_slots);
      add_tiles<per_word>(weights, block_slots, values, C, n / per_word, sums + first * C, C, C);
      for (long i = 0; i < num_apart; i++)
        for (long r = 0; r < tile_rows; r++)
          if (apart[i] < seen(first + r)) add_value(value_head, apart[i], first + r, weights + r * block_slots);
    }
  }

 private:
  long num_apart, apart[block_slots];  // slots of values that have infinity or NaN

  // Puts zeros in the place of such values, as 0 times them is NaN in rows that do not see them. The others add them.
  template <class F>
  void set_apart(const Head<F>& value_head, long n) {
    for (long s = 0; s < n; s++) {
      f32x16 zeros{};
      for (long c = 0; c < C; c += 16) zeros += zero_or_nan(value_head.read(s, c));
      if (horizontal_sum(zeros) == 0) continue;
      apart[num_apart++] = s;
      Number* own = (Number*)(values + s / per_word * C) + s % per_word;
      for (long c = 0; c < C; c++) own[c * per_word] = 0;
    }
  }
  template <class F>
  void add_value(const Head<F>& value_head, long s, long row, const Word* own) {
    const float weight = upcast(((const Number*)own)[s]);
    float* to = sums + row * C;
    for (long c = 0; c < C; c += 16) store(to + c, load<f32x16>(to + c) + value_head.read(s, c) * weight);
  }

  // Words of two halves, of 16 numbers each, become pairs of one number of each half.
  template <int words>
  static u32x16 interleave_halves(u32x16 v) {
#ifdef __AVX512BF16__
    if constexpr (words == 2) {
      using u16x32 = uint16_t __attribute__((vector_size(64)));
      u16x32 halves = (u16x32)v;
      return (u32x16)__builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                             24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#endif
    return v;
  }

  // n scores of a row, of which it sees the first `seen`, become weights; what it summed so far is scaled to the new
  // `most`.
  template <bool scaled>
  void softmax_row(long row, float* own, long seen, long n, Word* out) {
    const float factor = 1.44269504f / __builtin_sqrtf(C);  // to powers of two
    for (long s = 0; scaled && s < n; s += 16) store(own + s, load<f32x16>(own + s) * load<f32x16>(key_scales + s));
    std::fill(own + std::clamp(seen, 0l, n), own + n, -INFINITY);
    f32x16 highest = load<f32x16>(own);
    for (long s = 16; s < n; s += 16) highest = max(highest, load<f32x16>(own + s));
    const float now = std::max(most[row], horizontal_max(highest));
    if (now > most[row]) {
      const float shrink = exp2_nonpositive<false>(f32x16{} + (most[row] - now) * factor)[0];
      for (long c = 0; c < C; c += 16) store(sums + row * C + c, load<f32x16>(sums + row * C + c) * shrink);
      total[row] *= shrink, most[row] = now;
    }
    const float origin = now == -INFINITY ? 0 : now;  // -inf - -inf would be NaN
    f32x16 all{};
    for (long s = 0; s < n; s += 16) {
      f32x16 weight = exp2_nonpositive<per_word == 2>((load<f32x16>(own + s) - origin) * factor);
      all += weight;
      store_floats((Number*)out + s, scaled ? weight * load<f32x16>(value_scales + s) : weight);
    }
    total[row] += horizontal_sum(all);
  }
};

// y [N, H, C] of queries [N, H, C], each of which sees `past` tokens in blocks and of the new keys and values [N, K, C]
// those up to its own.
template <class F, class X>
void attend_causal(Team& team, const X* q, const X* k, const X* v, long N, const char* const* blocks, long past, long H,
                   long K, long C, X* y) {
  const long group = H / K, tokens = std::max(8l, 512 / group), tiles = (N + tokens - 1) / tokens;
  const long numbers = N * (past + N) * H * C / (K * tiles);
  team.for_each(K * tiles, numbers, [=](long task) {
    const long head = task % K, begin = (tiles - 1 - task / K) * tokens, end = std::min(N, begin + tokens);
    const long rows = (end - begin) * group;
    QueryTile<X> tile((rows + tile_rows - 1) / tile_rows * tile_rows, C);
    for (long r = 0; r < tile.rows; r++) {
      const long row = std::min(r, rows - 1);  // the last ones repeated, to fill eight
      tile.set_query(r, q + ((begin + row / group) * H + head * group + row % group) * C);
    }
    for (long from = 0; from < past; from += block_slots) {
      const char* block = blocks[from / block_slots];
      const long n = std::min(past - from, block_slots);
      const Head<F> values = head_of<F>(block, K + head, K, C);
      tile.pack_block(head_of<F>(block, head, K, C), values, n);
      tile.attend(values, [&](long) { return n; });
    }
    for (long from = 0; from < end; from += block_slots) {
      const auto at = [&](const X* x) {
        return Head<Unquantized<X>>{(const char*)(x + (from * K + head) * C), nullptr, C, K * C * long(sizeof(X))};
      };
      tile.pack_block(at(k), at(v), std::min(end - from, block_slots));
      tile.attend(at(v),
                  [&](long r) { return std::min(begin + std::min(r, rows - 1) / group + 1 - from, block_slots); });
    }
    for (long r = 0; r < rows; r++)
      for (long c = 0; c < C; c += 16)
        store_floats(y + ((begin + r / group) * H + head * group + r % group) * C + c,
                     load<f32x16>(tile.sums + r * C + c) / tile.total[r]);
  });
}

}  // namespace
