// Matrices of random codes in every format, and the numbers that these stand for by the format's specification.

#pragma once

#include "numbers.h"

namespace {

int half_at(const uint8_t* at) { return at[0] | at[1] << 8; }
void put_half(uint8_t* at) {  // of magnitudes from 2^-5 to 1/2
  const int bits = (10 + below(4)) << 10 | below(1024) | below(2) << 15;
  at[0] = bits, at[1] = bits >> 8;
}
int nibble(const uint8_t* bytes, int i) { return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4; }

// A block of GGUF, or ours: bytes of a header are random at first, too.
struct Blocks {
  const char* name;
  int weights, bytes;
  void (*write_header)(uint8_t*);
  double (*weight)(const uint8_t*, int);
};

int fifth(const uint8_t* block, int at, int i) {
  return nibble(block + at + 4, i) | (block[at + i / 8] >> i % 8 & 1) << 4;
}
// Of group j of a block of Q4_K or Q5_K: number 0 its scale, 1 its minimum.
int six_bits(const uint8_t* s, int j, int number) {
  if (j < 4) return s[j + 4 * number] & 63;
  return (number ? s[j + 4] >> 4 : s[j + 4] & 15) | s[j - 4 + 4 * number] >> 6 << 4;
}
double paired(const uint8_t* block, int j, int code) {
  return from_half(half_at(block)) * six_bits(block + 4, j, 0) * code -
         from_half(half_at(block + 2)) * six_bits(block + 4, j, 1);
}
void two_halves(uint8_t* block) { put_half(block), put_half(block + 2); }

const Blocks block_formats[] = {
    {"q8_0", 32, 34, [](uint8_t* b) { put_half(b); },
     [](const uint8_t* b, int i) { return from_half(half_at(b)) * int8_t(b[2 + i]); }},
    {"q4_0", 32, 18, [](uint8_t* b) { put_half(b); },
     [](const uint8_t* b, int i) { return from_half(half_at(b)) * (nibble(b + 2, i) - 8); }},
    {"q4_1", 32, 20, two_halves,
     [](const uint8_t* b, int i) { return from_half(half_at(b)) * nibble(b + 4, i) + from_half(half_at(b + 2)); }},
    {"q5_0", 32, 22, [](uint8_t* b) { put_half(b); },
     [](const uint8_t* b, int i) { return from_half(half_at(b)) * (fifth(b, 2, i) - 16); }},
    {"q5_1", 32, 24, two_halves,
     [](const uint8_t* b, int i) { return from_half(half_at(b)) * fifth(b, 4, i) + from_half(half_at(b + 2)); }},
    {"q4_k", 256, 144, two_halves,
     [](const uint8_t* b, int i) {
       const int byte = b[16 + i / 64 * 32 + i % 32];
       return paired(b, i / 32, i / 32 % 2 ? byte >> 4 : byte & 15);
     }},
    {"q5_k", 256, 176, two_halves,
     [](const uint8_t* b, int i) {
       const int byte = b[48 + i / 64 * 32 + i % 32], bit = b[16 + i % 32] >> i / 32 & 1;
       return paired(b, i / 32, (i / 32 % 2 ? byte >> 4 : byte & 15) | bit << 4);
     }},
    {"q6_k", 256, 210, [](uint8_t* b) { put_half(b + 208); },
     [](const uint8_t* b, int i) {
       const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
       const int low = b[64 * half + 32 * (quarter % 2) + l], high = b[128 + 32 * half + l] >> 2 * quarter & 3;
       const int code = (quarter / 2 ? low >> 4 : low & 15) | high << 4;
       return from_half(half_at(b + 208)) * int8_t(b[192 + 8 * half + 2 * quarter + l / 16]) * (code - 32);
     }},
    {"iq4_nl", 32, 18, [](uint8_t* b) { put_half(b); },
     [](const uint8_t* b, int i) {
       constexpr int values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
       return from_half(half_at(b)) * values[nibble(b + 2, i)];
     }},
    {"gguf_mxfp4", 32, 17, [](uint8_t* b) { b[0] = 122 + below(6); },
     [](const uint8_t* b, int i) {
       constexpr double values[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
       const int code = nibble(b + 1, i);
       return std::ldexp(code & 8 ? -values[code & 7] : values[code], b[0] - 127);
     }},
    {"int4_zeros", 32, 20,  // a float whose lowest byte is the code of zero
     [](uint8_t* b) {
       const uint32_t head = (bits_as<uint32_t>(float(0.5 + below(256) / 256.)) & ~255u) | below(16);
       std::memcpy(b, &head, 4);
     },
     [](const uint8_t* b, int i) {
       uint32_t head;
       std::memcpy(&head, b, 4);
       return double(bits_as<float>(head & ~255u)) * (nibble(b + 4, i) - b[0]);
     }},
};

// W [E, O, I] in a format: what it is, and its bytes. The names of dense ones are "out x in" and "in x out".
struct Weights {
  std::string format;
  long E, O, I, layout = -1, group = 0;
  Doubles values;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;

  Weights(const std::string& format, bool narrow, long O, long I, long E = 1)
      : format(format), E(E), O(O), I(I), values(E * O * I) {
    const std::string suffix = "_int8", base = ends_with(suffix) ? format.substr(0, format.size() - 5) : format;
    for (const Format& own : table(llama4_weight_formats))
      if (own.name == format) layout = own.number;
    if (base == "out x in" || base == "in x out") {
      layout = base == "in x out";
      values = normal(E * O * I);
      Numbers numbers(values, narrow);
      bytes.resize(numbers.memory.size());
      Numbers laid(E * O * I, narrow);
      for (long i = 0; i < E * O * I; i++) {
        const long e = i / (O * I), o = i / I % O, k = i % I;
        laid.set(layout ? e * O * I + k * O + o : i, values[i]);
      }
      std::memcpy(bytes.data(), laid.data(), bytes.size());
      return;
    }
    const auto* blocks = std::find_if(std::begin(block_formats), std::end(block_formats),
                                      [&](const Blocks& own) { return own.name == base; });
    if (blocks != std::end(block_formats)) fill_blocks(*blocks);
    else if (base == "int4") fill_int4();
    else if (base == "int8" || base == "fp8") fill_bytes(base == "fp8");
    else expect(false, "nothing is known of %s", format.c_str());
  }
  bool ends_with(const std::string& end) const {
    return format.size() > end.size() && format.compare(format.size() - end.size(), end.size(), end) == 0;
  }
  double at(long o, long i, long e = 0) const { return values[(e * O + o) * I + i]; }
  Matrix matrix() const {
    const void* own_scales = scales.empty() ? nullptr : scales.data();
    return {bytes.data(), own_scales, 1, layout, group, I, O, long(bytes.size()) / E, long(scales.size()) * 4 / E};
  }

 private:
  void fill_blocks(const Blocks& own) {
    const long count = E * O * I / own.weights;
    bytes.resize(count * own.bytes);
    for (uint8_t& byte : bytes) byte = generator();
    for (long i = 0; i < count; i++) {
      uint8_t* block = bytes.data() + i * own.bytes;
      own.write_header(block);
      for (int k = 0; k < own.weights; k++) values[i * own.weights + k] = own.weight(block, k);
    }
  }
  void fill_scales(long count) {
    scales.resize(count);
    for (float& scale : scales) scale = 0.5 + below(256) / 256.;
  }
  void fill_bytes(bool is_fp8) {
    fill_scales(E * O);
    bytes.resize(E * O * I);
    for (long i = 0; i < E * O * I; i++) {
      bytes[i] = is_fp8 ? generator() & 0xbf : generator();  // fp8 below 2
      values[i] = (is_fp8 ? from_e4m3(bytes[i]) : int8_t(bytes[i])) * scales[i / I];
    }
  }
  void fill_int4() {  // 16 outputs are interleaved: 32 inputs of each, two to a byte
    group = 32;
    fill_scales(E * O * I / group);
    bytes.resize(E * O * I / 2);
    for (long i = 0; i < E * O * I; i++) {
      const long o = i / I, k = i % I, block = o / 16 * (I / 32) + k / 32;
      const int code = below(16);
      bytes[block * 256 + o % 16 * 16 + k % 32 / 2] |= code << 4 * (k % 2);
      values[i] = (code - 8) * scales[block * 16 + o % 16];
    }
  }
};

}  // namespace
