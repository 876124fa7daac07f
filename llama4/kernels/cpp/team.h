// Threads that work together.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <omp.h>

namespace {

// Numbers to read from which a second thread pays for being woken, and for waiting on others where cores are shared.
constexpr long worth_threads = 1 << 16;

// A team is all threads of a parallel region, who run a function together, each its share of it. None waits for the
// others at the end: who wants to read what they wrote waits first. Outside of a region a team is one thread.
void wait_for_team() {
#pragma omp barrier
}

// How a team shares what falls into pieces: each thread has a part of its own, which it goes through from the beginning,
// and who is done helps the others. So each reads on where it was told to begin, and all are done at the same time.
class Shares {
  struct alignas(64) Thread {
    uint64_t turn = 0;               // how often it was asked to share
    std::atomic<uint64_t> taken{0};  // the last turn in which its part was taken from, and how many pieces were
  };
  static constexpr int count_bits = 32;
  std::vector<Thread> threads;

  // The next pieces of a part of so many, half of those that are left; none, if none are, or if this turn is over for the
  // thread whose part it is: then it has found none anywhere.
  static std::pair<long, long> take(std::atomic<uint64_t>& taken, uint64_t turn, long size) {
    const uint64_t begin = turn << count_bits;
    for (uint64_t seen = taken.load();;) {
      const uint64_t from = std::max(seen, begin);
      if (from - begin >= size) return {size, size};
      const uint64_t until = from + (size - (from - begin) + 1) / 2;
      if (taken.compare_exchange_weak(seen, until)) return {from - begin, until - begin};
    }
  }

 public:
  Shares() : threads(omp_get_max_threads()) {}

  // Calls part(piece) for each of so many, by a team all of whose threads share as often as each other.
  template <class Part>
  void each(long pieces, const Part& part) {
    const long count = omp_get_num_threads(), own = omp_get_thread_num();
    const uint64_t turn = ++threads[own].turn;
    for (long i = own; i < own + count; i++) {
      const long begin = i % count * pieces / count, size = (i % count + 1) * pieces / count - begin;
      for (;;) {
        const auto [from, until] = take(threads[i % count].taken, turn, size);
        if (from == size) break;
        for (long piece = from; piece < until; piece++) part(begin + piece);
      }
    }
  }
};

}  // namespace
