// A program that compares the kernels with float64, for machines that have no Python here: test_native.py builds it
// together with api.cpp for aarch64 and runs it under qemu. It ends with 0 if all is well.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct Function {
  const char *name, *dtype, *arguments;
  const void* address;
};
struct Format {
  const char* name;
  int64_t number, multiple;
};
extern "C" const Function* llama4_functions(long* count);
extern "C" const Format* llama4_weight_formats(long* count);

namespace {

using Doubles = std::vector<double>;
using Problem = const char*;
int failures = 0;
std::mt19937 generator(0);

template <class... Arguments>
void call(const char* name, bool narrow, Arguments... arguments) {
  long count;
  const Function* all = llama4_functions(&count);
  for (long i = 0; i < count; i++)
    if (all[i].name == std::string(name) && all[i].dtype == std::string(narrow ? "bfloat16" : "float32")) {
      const auto f = reinterpret_cast<Problem (*)(long, Arguments...)>(const_cast<void*>(all[i].address));
      if (Problem problem = f(2, arguments...)) failures++, std::printf("%s: %s\n", name, problem);
      return;
    }
  failures++, std::printf("there is no %s\n", name);
}

uint16_t narrowed(double x) {
  const float single = x;
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
double widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float single;
  std::memcpy(&single, &bits, 4);
  return single;
}

// Numbers as float32 or bfloat16; what they are is rounded to that.
struct Numbers {
  std::vector<char> memory;
  bool narrow;
  Numbers(long count, bool narrow) : memory(count * (narrow ? 2 : 4)), narrow(narrow) {}
  Numbers(Doubles& values, bool narrow) : Numbers(values.size(), narrow) {
    for (size_t i = 0; i < values.size(); i++) set(i, values[i]), values[i] = get(i);
  }
  void set(long i, double x) {
    if (narrow) reinterpret_cast<uint16_t*>(memory.data())[i] = narrowed(x);
    else reinterpret_cast<float*>(memory.data())[i] = x;
  }
  double get(long i) const {
    return narrow ? widened(reinterpret_cast<const uint16_t*>(memory.data())[i])
                  : reinterpret_cast<const float*>(memory.data())[i];
  }
  void* data() { return memory.data(); }
};

Doubles normal(long count) {
  std::normal_distribution<double> distribution;
  Doubles values(count);
  for (double& x : values) x = distribution(generator);
  return values;
}

// The error relative to the largest number: of float32's sums, or of bfloat16's result.
void compare(const std::string& what, const Numbers& ours, const Doubles& truth, double tolerance = 0) {
  double most = 0, error = 0;
  for (size_t i = 0; i < truth.size(); i++) {
    most = std::max(most, std::abs(truth[i]));
    const double own = std::abs(ours.get(i) - truth[i]);
    error = own >= 0 ? std::max(error, own) : INFINITY;
  }
  if (!tolerance) tolerance = ours.narrow ? 0.005 : 2e-6;
  if (error / most <= tolerance) return;
  failures++, std::printf("%s, %s: %g\n", what.c_str(), ours.narrow ? "bfloat16" : "float32", error / most);
}

Doubles product(const Doubles& x, const Doubles& w, long N, long I, long O) {
  Doubles y(N * O);
  for (long n = 0; n < N; n++)
    for (long o = 0; o < O; o++)
      for (long i = 0; i < I; i++) y[n * O + o] += x[n * I + i] * w[o * I + i];
  return y;
}

void products(bool narrow, long N) {
  const long I = 256, O = 96, group = 32;
  Doubles x = normal(N * I), w = normal(O * I);
  Numbers rows(x, narrow), out_in(w, narrow), in_out(O * I, narrow), y(N * O, narrow);
  for (long o = 0; o < O; o++)
    for (long i = 0; i < I; i++) in_out.set(i * O + o, w[o * I + i]);
  const Doubles truth = product(x, w, N, I, O);
  const std::string of = " of " + std::to_string(N) + " rows";
  const auto linear = [&](long layout, void* weight, void* scales, long group_size) {
    call("linear", narrow, rows.data(), N, I, O, layout, weight, scales, 1l, group_size, y.data());
  };
  linear(0, out_in.data(), nullptr, 0), compare("out x in" + of, y, truth);
  linear(1, in_out.data(), nullptr, 0), compare("in x out" + of, y, truth);

  long count;
  const Format* formats = llama4_weight_formats(&count);
  for (long f = 0; f < count; f++) {
    const std::string name = formats[f].name;
    const bool grouped = name == "int4";
    std::vector<uint8_t> bytes(O * I / (grouped ? 2 : 1));
    std::vector<float> scales(grouped ? O * I / group : O);
    Doubles values(O * I);
    for (float& scale : scales) scale = 0.5 + generator() % 256 / 256.;
    for (long o = 0; o < O; o++)
      for (long i = 0; i < I; i++) {
        double& value = values[o * I + i];
        if (grouped) {  // 16 outputs are interleaved: 32 inputs of each, two to a byte
          const uint8_t four = generator() % 16;
          bytes[(o / 16 * (I / 32) + i / 32) * 256 + o % 16 * 16 + i % 32 / 2] |= four << 4 * (i % 2);
          value = (four - 8) * scales[(o / 16 * (I / group) + i / group) * 16 + o % 16];
        } else if (name == "int8") {
          bytes[o * I + i] = generator() % 256;
          value = int8_t(bytes[o * I + i]) * scales[o];
        } else {  // e4m3
          const int byte = generator() % 256 & ~(1 << 6), exponent = byte >> 3 & 15, mantissa = byte & 7;
          bytes[o * I + i] = byte;
          value = std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10) * scales[o];
          if (byte & 128) value = -value;
        }
      }
    linear(formats[f].number, bytes.data(), scales.data(), grouped ? group : 0);
    compare(name + of, y, product(x, values, N, I, O), name == "fp8" ? 0.06 : 0);  // its rows are rounded to e4m3
  }
}

void rows(bool narrow) {
  const long N = 3, D = 160;
  Doubles x = normal(N * D), up = normal(N * D), weight = normal(D), normed(N * D), swiglu(N * D);
  Numbers gate(x, narrow), other(up, narrow), scale(weight, narrow), y(N * D, narrow);
  Numbers wide(x, false);
  for (long n = 0; n < N; n++) {
    double squares = 0;
    for (long d = 0; d < D; d++) squares += x[n * D + d] * x[n * D + d];
    for (long d = 0; d < D; d++) {
      const double own = x[n * D + d];
      normed[n * D + d] = own / std::sqrt(squares / D + 1e-5) * weight[d];
      swiglu[n * D + d] = own / (1 + std::exp(-own)) * up[n * D + d];
    }
  }
  call("rms_norm", narrow, wide.data(), N, D, scale.data(), 1e-5f, y.data()), compare("rms_norm", y, normed);
  call("swiglu", narrow, gate.data(), other.data(), N, D, D, y.data()), compare("swiglu", y, swiglu);

  const long H = 2, C = 80;  // x as [N, H, C]
  Doubles angles = normal(N * C / 2), turned(N * D);
  std::vector<float> rotation(N * C);
  for (long i = 0; i < N * C / 2; i++) rotation[2 * i] = std::cos(angles[i]), rotation[2 * i + 1] = std::sin(angles[i]);
  for (long i = 0; i < N * D; i += 2) {
    const long at = i / D * C + i % C;
    turned[i] = x[i] * rotation[at] - x[i + 1] * rotation[at + 1];
    turned[i + 1] = x[i] * rotation[at + 1] + x[i + 1] * rotation[at];
  }
  const float* no_factors = nullptr;
  call("apply_rope", narrow, gate.data(), D, N, H, C, rotation.data(), -1.f, no_factors, y.data());
  compare("apply_rope", y, turned);

  std::vector<long> ids(N);
  std::vector<float> logprobs(N);
  call("greedy_token", narrow, gate.data(), N, D, ids.data(), logprobs.data());
  for (long n = 0; n < N; n++) {
    const double* own = x.data() + n * D;
    const long best = std::max_element(own, own + D) - own;
    double total = 0;
    for (long d = 0; d < D; d++) total += std::exp(own[d] - own[best]);
    if (ids[n] != best || !(std::abs(logprobs[n] + std::log(total)) < 1e-5))
      failures++, std::printf("greedy_token: %ld, %g\n", ids[n], logprobs[n]);
  }
}

// Causal attention of N new tokens behind none.
void attention(bool narrow, long N) {
  const long H = 4, K = 2, C = 64;
  Doubles q = normal(N * H * C), k = normal(N * K * C), v = normal(N * K * C), truth(N * H * C);
  Numbers queries(q, narrow), keys(k, narrow), values(v, narrow), y(N * H * C, narrow);
  for (long n = 0; n < N; n++)
    for (long h = 0; h < H; h++) {
      double total = 0;
      Doubles sums(C);
      for (long s = 0; s <= n; s++) {
        const long at = (s * K + h / (H / K)) * C;
        double dot = 0;
        for (long c = 0; c < C; c++) dot += q[(n * H + h) * C + c] * k[at + c];
        const double weight = std::exp(dot / std::sqrt(C));
        total += weight;
        for (long c = 0; c < C; c++) sums[c] += weight * v[at + c];
      }
      for (long c = 0; c < C; c++) truth[(n * H + h) * C + c] = sums[c] / total;
    }
  const void* no_blocks = nullptr;
  call("attend_causal", narrow, queries.data(), keys.data(), values.data(), N, no_blocks, 0l, 0l, H, K, C, 0l, y.data());
  compare("attention of " + std::to_string(N) + " tokens", y, truth, narrow ? 0.01 : 5e-6);

  // The last token alone, its keys and values in blocks of 256.
  const long size = 2 * K * 256 * C, blocks = (N + 255) / 256;
  std::vector<Numbers> memory(blocks, Numbers(size, narrow));
  std::vector<void*> table;
  for (Numbers& block : memory) table.push_back(block.data());
  for (long s = 0; s < N; s++)
    for (long h = 0; h < K; h++)
      for (long c = 0; c < C; c++) {
        Numbers& block = memory[s / 256];
        block.set((h * 256 + s % 256) * C + c, k[(s * K + h) * C + c]);
        block.set(((K + h) * 256 + s % 256) * C + c, v[(s * K + h) * C + c]);
      }
  Doubles last_query(q.end() - H * C, q.end());
  Numbers last(last_query, narrow), one(H * C, narrow);
  call("attend", narrow, last.data(), table.data(), blocks, &N, 1l, H, K, C, 0l, one.data());
  compare("a token behind " + std::to_string(N), one, Doubles(truth.end() - H * C, truth.end()), narrow ? 0.01 : 5e-6);
}

}  // namespace

int main() {
  for (bool narrow : {false, true}) {
    for (long N : {1, 2, 3, 4, 7, 13, 24, 41, 75}) products(narrow, N);
    for (long N : {1, 40, 300}) attention(narrow, N);
    rows(narrow);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
