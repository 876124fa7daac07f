// Attention over caches in every format.

#pragma once

#include "numbers.h"

namespace {

constexpr long slots = 256;

// Blocks of one sequence, in a format: keys [K, 256], values [K, 256], and scales of both in bfloat16.
struct Cache {
  std::string format;
  long number, blocks, K, C, row_bytes;
  bool narrow;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<void*> addresses;

  Cache(const Format& format, bool narrow, long blocks, long K, long C)
      : format(format.name), number(format.number), blocks(blocks), K(K), C(C), narrow(narrow) {
    row_bytes = this->format == "unquantized" ? C * (narrow ? 2 : 4) : this->format == "int4" ? C / 2 : C;
    memory.assign(blocks, std::vector<uint8_t>(2 * K * slots * (row_bytes + 2)));
    for (auto& block : memory) addresses.push_back(block.data());
  }
  uint8_t* row(long slot, long head) { return memory[slot / slots].data() + (head * slots + slot % slots) * row_bytes; }
  uint16_t* scale(long slot, long head) {
    return reinterpret_cast<uint16_t*>(memory[slot / slots].data() + 2 * K * slots * row_bytes) + head * slots +
           slot % slots;
  }
  // Random numbers of tokens [0, count).
  void fill(long count) {
    for (long slot = 0; slot < count; slot++)
      for (long head = 0; head < 2 * K; head++) {
        uint8_t* own = row(slot, head);
        if (format == "unquantized") {
          Doubles values = normal(C);
          std::memcpy(own, Numbers(values, narrow).data(), row_bytes);
          continue;
        }
        for (long i = 0; i < row_bytes; i++) own[i] = format == "fp8" ? generator() & 0xbf : generator();
        const double largest = format == "int8" ? 64 : format == "int4" ? 4 : 1;
        *scale(slot, head) = narrowed((0.5 + below(128) / 128.) / largest);
      }
  }
  double get(long slot, long head, long c) {
    const uint8_t* own = row(slot, head);
    if (format == "unquantized")
      return narrow ? widened(reinterpret_cast<const uint16_t*>(own)[c]) : reinterpret_cast<const float*>(own)[c];
    const double factor = widened(*scale(slot, head));
    if (format == "int8") return int8_t(own[c]) * factor;
    if (format == "fp8") return from_e4m3(own[c]) * factor;
    return ((c < C / 2 ? own[c] & 15 : own[c - C / 2] >> 4) - 8) * factor;
  }
};

// Of a query over `length` tokens: key(s, c), value(s, c).
template <class Key, class Value>
Doubles attended(const double* q, long C, long length, const Key& key, const Value& value) {
  Doubles scores(length), y(C);
  for (long s = 0; s < length; s++) {
    for (long c = 0; c < C; c++) scores[s] += q[c] * key(s, c);
    scores[s] /= std::sqrt(C);
  }
  const double most = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (long s = 0; s < length; s++) {
    const double weight = std::exp(scores[s] - most);
    total += weight;
    for (long c = 0; c < C; c++) y[c] += weight * value(s, c);
  }
  for (double& own : y) own /= total;
  return y;
}

void attention(bool narrow) {
  const double tolerance = narrow ? 0.012 : 5e-6;
  for (const Format& format : table(llama4_cache_formats))
    for (const auto& [H, C] : {std::pair(10l, 64l), std::pair(6l, 96l)}) {
      const long K = 2, lengths[] = {300, 17}, B = 2, width = 2;
      std::vector<Cache> caches(B, Cache(format, narrow, 0, K, C));
      std::vector<void*> addresses;
      Doubles q = normal(B * H * C), truth;
      Numbers queries(q, narrow), y(B * H * C, narrow), of_nan = y;
      for (long b = 0; b < B; b++) {
        caches[b] = Cache(format, narrow, width, K, C);
        caches[b].fill(lengths[b]);
        addresses.insert(addresses.end(), caches[b].addresses.begin(), caches[b].addresses.end());
        for (long h = 0; h < H; h++) {
          const auto key = [&](long s, long c) { return caches[b].get(s, h / (H / K), c); };
          const auto value = [&](long s, long c) { return caches[b].get(s, K + h / (H / K), c); };
          for (double own : attended(q.data() + (b * H + h) * C, C, lengths[b], key, value)) truth.push_back(own);
        }
      }
      const long* of_each = lengths;
      const auto attend = [&](Numbers& y) {
        call("attend", narrow, queries.data(), addresses.data(), width, of_each, B, H, K, C, long(format.number),
             y.data());
      };
      const auto what = std::string("attend, cache in ") + format.name;
      attend(y), compare(what, y, truth, tolerance);
      queries.set(5, NAN), attend(of_nan), compare_nan(what + ", NaN in a query", y, of_nan, 0, C, B * H * C);
    }
}

// New tokens behind `past` ones in blocks.
void causal_attention(bool narrow) {
  const long H = 4, K = 2, C = 64;
  for (const Format& format : table(llama4_cache_formats))
    for (const auto& [N, past] : {std::pair(1l, 0l), std::pair(70l, 0l), std::pair(6l, 270l)}) {
      Cache cache(format, narrow, 2, K, C);
      cache.fill(past);
      Doubles q = normal(N * H * C), k = normal(N * K * C), v = normal(N * K * C), truth;
      Numbers queries(q, narrow), keys(k, narrow), values(v, narrow), y(N * H * C, narrow), of_nan = y;
      for (long n = 0; n < N; n++)
        for (long h = 0; h < H; h++) {
          const long head = h / (H / K);
          const auto number = [&](const Doubles& own, long of_cache, long s, long c) {
            return s < past ? cache.get(s, of_cache, c) : own[((s - past) * K + head) * C + c];
          };
          const auto key = [&](long s, long c) { return number(k, head, s, c); };
          const auto value = [&](long s, long c) { return number(v, K + head, s, c); };
          for (double own : attended(q.data() + (n * H + h) * C, C, past + n + 1, key, value)) truth.push_back(own);
        }
      const auto attend = [&](Numbers& y) {
        call("attend_causal", narrow, queries.data(), keys.data(), values.data(), N, cache.addresses.data(), 2l, past,
             H, K, C, long(format.number), y.data());
      };
      const auto what = std::string("attend_causal behind ") + std::to_string(past) + ", cache in " + format.name;
      attend(y), compare(what, y, truth, narrow ? 0.012 : 5e-6);
      const long count = N * H * C, last = (N - 1) * K * C;  // the last token's first head
      queries.set(5, NAN), attend(of_nan), compare_nan(what + ", NaN in a query", y, of_nan, 0, C, count);
      queries.set(5, q[5]), keys.set(last, NAN), attend(of_nan);
      compare_nan(what + ", NaN in a key", y, of_nan, count - H * C, count - H * C + H / K * C, count);
      keys.set(last, k[last]);
      for (long c = 0; c < C; c++) values.set(last + c, c % 2 ? NAN : INFINITY);
      attend(of_nan);
      for (long i = count - H * C; i < count; i++)  // infinity is not NaN
        if (std::isinf(of_nan.get(i))) of_nan.set(i, NAN);
      compare_nan(what + ", NaN in a value", y, of_nan, count - H * C, count - H * C + H / K * C, count);
    }
}

}  // namespace
