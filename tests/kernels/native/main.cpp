// Compares every kernel that a library exports with float64, without Python: for machines that have none here.
// test_native.py runs it at the levels of this machine, scripts/check-aarch64 at those of aarch64 under qemu. It ends
// with 0 if all is well.

#include "decoder.h"

namespace {

void structures() {
  const std::pair<const char*, size_t> sizes[] = {{"Matrix", sizeof(Matrix)},       {"Layer", sizeof(Layer)},
                                                  {"Draw", sizeof(Draw)},           {"Decoder", sizeof(Decoder)},
                                                  {"Tokens", sizeof(Tokens)},       {"LayerStep", sizeof(LayerStep)},
                                                  {"Penalties", sizeof(Penalties)}, {"block_slots", slots}};
  for (const auto& [name, size] : sizes)
    for (const Constant& own : table(llama4_constants))
      if (own.name == std::string(name))
        expect(own.value == long(size), "%s is of %ld, here of %zu", name, long(own.value), size);
}

}  // namespace

int main() {
  structures();
  for (const bool narrow : {false, true}) {
    products(narrow);
    experts(narrow);
    quantize(narrow);
    rows(narrow);
    draws(narrow);
    attention(narrow);
    causal_attention(narrow);
    for (const Format& format : table(llama4_cache_formats))
      while (!decoder(narrow, format)) continue;
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
