// Threads of one parallel region: a barrier, sharing of work, memory of each thread.
//
// A team is all threads of a parallel region. Functions "of a team" are called by every thread of it, and each does its
// share. Unless stated otherwise they do not wait for the other threads at the end: call barrier() before you read what
// others wrote. Outside of a parallel region a team is one thread.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include <omp.h>

namespace {

// Fewest elements to read for which it pays to wake a second thread, and to wait for others where cores are shared.
constexpr long min_parallel = 1 << 16;

inline void barrier() {
#pragma omp barrier
}

// Shares tasks among a team. Each thread takes tasks from its own contiguous part, in order, so that it reads memory in
// order. A thread that is done steals from the parts of others, so all finish at the same time.
class WorkStealing {
  struct alignas(64) Worker {
    uint64_t round = 0;              // how many loops this thread has begun
    std::atomic<uint64_t> taken{0};  // the last loop in which a task of its part was taken, and how many were
  };
  static constexpr int count_bits = 32;
  std::vector<Worker> workers;

  // The next tasks [from, until) of a part of `size`: half of what is left. Empty if none is left, or if the owner of
  // the part is already in a later loop: it went there because no part had any task left.
  static std::pair<long, long> take(std::atomic<uint64_t>& taken, uint64_t round, uint64_t size) {
    const uint64_t begin = round << count_bits;
    for (uint64_t seen = taken.load();;) {
      const uint64_t from = std::max(seen, begin);
      if (from - begin >= size) return {size, size};
      const uint64_t until = from + (size - (from - begin) + 1) / 2;
      if (taken.compare_exchange_weak(seen, until)) return {from - begin, until - begin};
    }
  }

 public:
  WorkStealing() : workers(omp_get_max_threads()) {}

  // Calls run(task) for each of `count` tasks. Of a team, all of whose threads must call it equally often.
  template <class Run>
  void for_each(long count, const Run& run) {
    const long threads = omp_get_num_threads(), own = omp_get_thread_num();
    const uint64_t round = ++workers[own].round;
    for (long i = own; i < own + threads; i++) {
      const long begin = i % threads * count / threads, size = (i % threads + 1) * count / threads - begin;
      for (;;) {
        const auto [from, until] = take(workers[i % threads].taken, round, size);
        if (from == size) break;
        for (long task = from; task < until; task++) run(begin + task);
      }
    }
  }
};

// What scratch memory is for. Two buffers that are in use at the same time have different names.
enum class Use {
  gemv_inputs,
  gemv_initial_sums,
  gemv_fp8_rows,
  gemv_row_scales,
  partial_results,
  row_scales,
  gemm_inputs,
  gemm_panel,
  gemm_sums,
  attention_queries,
  attention_scores,
  attention_words,
  attention_floats,
  quantize_group,
  greedy_parts,
  expert_activations,
  step_activations,
  step_logits,
  step_residual,
  step_normed,
  step_routes,
  step_scores,
  step_routed_rows,
  step_sequences,
};

// Memory of the calling thread, aligned as registers are, kept from call to call.
template <class T, Use use>
T* scratch(long count) {
  thread_local std::vector<char> memory;
  const size_t bytes = count * sizeof(T) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

}  // namespace
