// The kernels of the library that this program is linked with (llama4/kernels/abi.py), and what is expected of them.

#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

struct Function {
  const char *name, *dtype, *arguments;
  const void* address;
};
struct Constant {
  const char* name;
  int64_t value;
};
struct Format {
  const char* name;
  int64_t number, multiple;
};
extern "C" const Function* llama4_functions(long* count);
extern "C" const Constant* llama4_constants(long* count);
extern "C" const Format* llama4_weight_formats(long* count);
extern "C" const Format* llama4_cache_formats(long* count);

struct Matrix {
  const void *w, *scales;
  int64_t float32_scales, layout, group_size, I, O, stride, scale_stride;
};
struct Layer {
  Matrix q, k, v, o, gate_up, expert_up, down, gate, up, shared_down;
  const void *input_norm, *post_norm, *router;
  int64_t H, K, C, E, experts_per_token;
  double eps, qk_eps;
};
struct Decoder {
  const Layer* layers;
  int64_t num_layers;
  Matrix embedding;
  const void* norm;
  Matrix head;
  double eps;
  int64_t is_batch_invariant;
};
struct LayerStep {
  const float *rotations, *temperatures;
  const long* lengths;
  void* const* block_table;
  int64_t width, format;
};
struct Tokens {
  const long *ids, *sequence_starts;
  const void* const* features;
  const long* outputs;
  int64_t B, num_outputs;
  void* logits;
  long* greedy;
  float* logprobs;
  void* hidden;
  float* residual = nullptr;
  int64_t layer = 0, is_prompt = 0;
};
struct Penalties {
  const long *seen, *counts, *biased;
  const double* biases;
  int64_t num_seen, num_biased;
  double repetition, presence, frequency;
};
struct Draw {
  int64_t row, top_k;
  double temperature, top_p, min_p, uniform;
  const Penalties* penalties;
  int64_t id;
  double logprob;
};

namespace {

using Problem = const char*;
int failures = 0, checks = 0;

template <class... Arguments>
void expect(bool holds, const char* format, Arguments... arguments) {
  checks++;
  if (holds) return;
  failures++, std::printf(format, arguments...), std::printf("\n");
}

template <class Entry>
std::vector<Entry> table(const Entry* (*read)(long*)) {
  long count;
  const Entry* entries = read(&count);
  return {entries, entries + count};
}

// The kernel of that name, by two threads.
template <class... Arguments>
void call(const std::string& name, bool narrow, Arguments... arguments) {
  for (const Function& own : table(llama4_functions))
    if (own.name == name && own.dtype == std::string(narrow ? "bfloat16" : "float32")) {
      const auto f = reinterpret_cast<Problem (*)(long, Arguments...)>(const_cast<void*>(own.address));
      const Problem problem = f(2, arguments...);
      return expect(!problem, "%s: %s", name.c_str(), problem);
    }
  expect(false, "there is no %s", name.c_str());
}

}  // namespace
