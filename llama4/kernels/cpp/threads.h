// Threads that share loops, and memory for what these compute.
//
// One thread, which calls, goes through all of a computation. Its loops are shared by whoever else is running: workers
// that wait for a moment between two loops, then sleep. A thread takes tasks as it gets to them, so one that the system
// does not run, because other processes are busy, holds nothing up; only for tasks that it is inside of do the others
// wait. Nothing here depends on OpenMP, whose threads wait for each other at every barrier.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <pthread.h>
#include <signal.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Fewest elements to read for which it pays to wake a second thread, and to wait for others where cores are shared.
constexpr long min_parallel = 1 << 16;
// Fewest numbers in a loop between two products for which it pays to share the loop among threads that are awake.
constexpr long min_shared = 1 << 13;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits some microseconds, awake, for `word` to become another than `old`. -> whether it did
inline bool changes(const std::atomic<uint32_t>& word, uint32_t old) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds awake(50);
  for (const auto begin = Clock::now(); Clock::now() - begin < awake;)
    for (int i = 0; i < 16; i++) {
      if (word.load(std::memory_order_acquire) != old) return true;
      relax();
    }
  return false;
}

// A loop over tasks [0, count), of which a thread runs some in a row.
struct Loop {
  void (*run)(const void* closure, long begin, long end);
  const void* closure;
  long count;
};

// Workers, which help one caller at a time. Each thread of a loop owns a part of the tasks, contiguous, so that it
// reads memory in order. It takes half of what is left of its part, again and again, then steals from the parts of
// others in the same way: so all finish at the same time.
class Pool {
 public:
  static constexpr long max_threads = 256;

  // The pool, if nobody else is using it; else null. Until release().
  static Pool* acquire(long threads) {
    Pool* pool = instance();
    if (pool->is_used.exchange(true, std::memory_order_acquire)) return nullptr;
    pool->spread(threads);
    return pool;
  }
  void release() { is_used.store(false, std::memory_order_release); }

  // Runs a loop by up to so many threads. Returns when all tasks are done.
  void run(const Loop& loop, long threads) {
    threads = start(threads);
    const uint32_t number = round.load(std::memory_order_relaxed) + 2;
    round.store(number - 1, std::memory_order_relaxed);  // odd: what follows is being written
    for (long i = 0; i < threads; i++) parts[i].taken.store(begin_of(number), std::memory_order_release);
    run_.store(loop.run, std::memory_order_release), closure.store(loop.closure, std::memory_order_release);
    count.store(loop.count, std::memory_order_release), threads_.store(threads, std::memory_order_release);
    done.store(0, std::memory_order_release);
    round.store(number);
    for (long i = 1; i < threads; i++)
      if (parts[i].is_asleep.load() && parts[i].is_asleep.exchange(false)) parts[i].is_asleep.notify_one();
    const uint32_t others = uint32_t(loop.count - take_all(loop, threads, 0, number));
    for (uint32_t seen; (seen = done.load(std::memory_order_acquire)) != others;)
      if (!changes(done, seen)) done.wait(seen);
  }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> taken{0};       // the loop's number, and how many tasks were taken
    std::atomic<bool> is_asleep{false};   // whether its worker is
    std::atomic<int> thread{0}, cpu{-1};  // its worker's, and where that ran last
  };
  static constexpr int count_bits = 32;

  // What is to be done. `round` is the number of the loop, even once the rest is written: a reader that finds it
  // unchanged has read one loop's.
  alignas(64) std::atomic<uint32_t> round{0};
  std::atomic<void (*)(const void*, long, long)> run_{nullptr};
  std::atomic<const void*> closure{nullptr};
  std::atomic<long> count{0}, threads_{0};
  alignas(64) std::atomic<uint32_t> done{0};  // tasks that workers have done
  alignas(64) std::atomic<bool> is_used{false};
  long started = 1;
  Part parts[max_threads];

  static uint64_t begin_of(uint32_t number) { return uint64_t(number) << count_bits; }

  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }

  // A forked child has no workers: it gets a pool of its own. None is ever freed, as its workers look into it.
  static Pool* instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); });
    (void)registered;
    Pool* pool = current().load();
    if (pool) return pool;
    auto* made = new Pool;
    if (current().compare_exchange_strong(pool, made)) return made;
    delete made;
    return pool;
  }

  // Sees that so many threads are there, the caller included. -> how many there are
  long start(long threads) {
    threads = std::min(threads, max_threads);
    for (; started < threads; started++) {
      auto* own = new std::pair<Pool*, long>(this, started);
      pthread_t thread;
      sigset_t all, before;
      sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);  // signals go to the threads of the program
      const int error = pthread_create(&thread, nullptr, work, own);
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (error) {
        delete own;
        return started;
      }
      pthread_detach(thread);
    }
    return threads;
  }

#ifdef __linux__
  // The system may run two threads on one CPU for long while another process has the other CPU, and wakes a worker
  // where the caller is. So one that ran where another thread does must go elsewhere.
  void spread(long threads) {
    const auto add = [](cpu_set_t& set, int cpu) {
      if (cpu >= 0) CPU_SET(cpu, &set);
    };
    cpu_set_t used;
    CPU_ZERO(&used);
    add(used, sched_getcpu());
    for (long i = 1; i < std::min(threads, started); i++) {
      const int cpu = parts[i].cpu.load(std::memory_order_relaxed);
      if (cpu < 0 || !CPU_ISSET(cpu, &used)) {
        add(used, cpu);
        continue;
      }
      cpu_set_t others = used, free;
      for (long k = i + 1; k < std::min(threads, started); k++)
        add(others, parts[k].cpu.load(std::memory_order_relaxed));
      if (sched_getaffinity(0, sizeof free, &free)) return;
      CPU_AND(&others, &others, &free);
      CPU_XOR(&free, &free, &others);
      if (CPU_COUNT(&free)) sched_setaffinity(parts[i].thread.load(), sizeof free, &free);
    }
  }
  static void remember_place(Part& own) { own.cpu.store(sched_getcpu(), std::memory_order_relaxed); }
  static void remember_thread(Part& own) { own.thread.store(int(syscall(SYS_gettid))); }
#else
  void spread(long) {}
  static void remember_place(Part&) {}
  static void remember_thread(Part&) {}
#endif

  static void* work(void* argument) {
    const auto [pool, own] = *static_cast<std::pair<Pool*, long>*>(argument);
    delete static_cast<std::pair<Pool*, long>*>(argument);
    remember_thread(pool->parts[own]);
    for (uint32_t seen = 0;;) seen = pool->help(own, seen);
  }

  void sleep(std::atomic<bool>& is_asleep, uint32_t number) {
    is_asleep.store(true);
    if (round.load() == number) is_asleep.wait(true);
    else is_asleep.store(false);
  }

  // Takes tasks of a loop until there are none. -> how many it ran
  long take_all(const Loop& loop, long threads, long own, uint32_t number) {
    long ran = 0;
    for (long i = own; i < own + threads; i++) {
      const long part = i % threads, begin = part * loop.count / threads;
      const long size = (part + 1) * loop.count / threads - begin;
      for (;;) {
        const auto [from, until] = take(parts[part].taken, number, size);
        if (from == until) break;
        loop.run(loop.closure, begin + from, begin + until);
        ran += until - from;
      }
    }
    return ran;
  }

  // The next tasks [from, until) of a part of `size`: half of what is left. Empty if none is left, or if the loop is
  // over.
  static std::pair<long, long> take(std::atomic<uint64_t>& taken, uint32_t number, long size) {
    for (uint64_t seen = taken.load();;) {
      const long from = uint32_t(seen), until = from + (size - from + 1) / 2;
      if (seen >> count_bits != number || from >= size) return {size, size};
      if (taken.compare_exchange_weak(seen, begin_of(number) + until)) return {from, until};
    }
  }

  // Helps with the loop that follows number `seen`, or a later one. -> its number
  uint32_t help(long own, uint32_t seen) {
    uint32_t number;
    while ((number = round.load(std::memory_order_acquire)) == seen || number % 2)
      if (!changes(round, number)) sleep(parts[own].is_asleep, number);
    const Loop loop{run_.load(std::memory_order_acquire), closure.load(std::memory_order_acquire),
                    count.load(std::memory_order_acquire)};
    const long threads = threads_.load(std::memory_order_acquire);
    if (round.load(std::memory_order_relaxed) != number) return seen;
    if (own >= threads) return number;
    remember_place(parts[own]);
    if (const long ran = take_all(loop, threads, own, number)) {
      done.fetch_add(uint32_t(ran), std::memory_order_acq_rel);
      done.notify_one();
    }
    return number;
  }
};

// Memory that grows as it is asked for, and is kept for later: as one block, as large as what was in use at once.
class Memory {
  static constexpr size_t least_block = 1 << 16;

  struct Block {
    std::unique_ptr<char[]> memory;
    char* begin;
    size_t size, used = 0;

    explicit Block(size_t size) : memory(new char[size + alignment]), begin(memory.get()), size(size) {
      begin += -reinterpret_cast<uintptr_t>(begin) % alignment;
    }
  };
  std::vector<Block> blocks;
  size_t taken = 0, most = 0;  // bytes in use now, and at most so far

 public:
  static constexpr size_t alignment = 64;

  char* take(size_t bytes) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
    if (blocks.empty() || blocks.back().used + bytes > blocks.back().size)
      blocks.emplace_back(std::max(bytes, least_block));
    Block& last = blocks.back();
    last.used += bytes, taken += bytes, most = std::max(most, taken);
    return last.begin + last.used - bytes;
  }

  // What is taken until the end of a scope is free after it.
  class Scope {
    Memory& memory;
    const size_t blocks, used, taken;

   public:
    explicit Scope(Memory& memory)
        : memory(memory),
          blocks(memory.blocks.size()),
          used(blocks ? memory.blocks.back().used : 0),
          taken(memory.taken) {}
    ~Scope() {
      memory.blocks.erase(memory.blocks.begin() + blocks, memory.blocks.end());
      if (blocks) memory.blocks.back().used = used;
      memory.taken = taken;
    }
    Scope(const Scope&) = delete;
  };

  // All of it is free again, as one block.
  void reset() {
    if (blocks.size() != 1 || blocks[0].size < most) {
      blocks.clear();
      if (most) blocks.emplace_back(most);
    }
    if (most) blocks[0].used = 0;
    taken = 0;
  }
};

// Memory of the calling thread, aligned as registers are, kept from call to call. Two buffers that are in use at the
// same time have different names.
enum class Use { panel, sums, queries, scores, words, floats, group };

template <class T, Use use>
T* scratch(long count) {
  thread_local Memory memory;
  memory.reset();
  return reinterpret_cast<T*>(memory.take(count * sizeof(T)));
}

// One call of a kernel: the threads that compute it, and memory until it ends.
class Team {
  Pool* const pool;
  const long threads;
  Memory& memory_;

  static Memory& own_memory() {
    thread_local Memory memory;
    return memory;
  }

 public:
  // Up to so many threads: one, if another call has the pool.
  explicit Team(long threads)
      : pool(threads > 1 ? Pool::acquire(threads) : nullptr), threads(pool ? threads : 1), memory_(own_memory()) {
    memory_.reset();
  }
  ~Team() {
    if (pool) pool->release();
  }
  Team(const Team&) = delete;

  long size() const { return threads; }
  Memory::Scope scope() const { return Memory::Scope(memory_); }

  template <class T>
  T* memory(long count) {
    return reinterpret_cast<T*>(memory_.take(count * sizeof(T)));
  }

  void run(const Loop& loop) {
    if (threads == 1 || loop.count == 1) loop.run(loop.closure, 0, loop.count);
    else if (loop.count) pool->run(loop, threads);
  }

  // Calls run(task) for each of `count` tasks, which read `numbers` each, and returns when all are done.
  template <class Run>
  void for_each(long count, long numbers, const Run& run) {
    const auto run_some = [](const void* closure, long begin, long end) {
      for (long task = begin; task < end; task++) (*static_cast<const Run*>(closure))(task);
    };
    const Loop loop{run_some, &run, count};
    if (count * numbers < min_shared) run_some(&run, 0, count);
    else this->run(loop);
  }
};

// Loops that a team shares as if they were one, so that none waits for the end of another; those whose results they
// need come before, those that need theirs after.
class Phase {
  // Numbers that a task reads make units, so that a thread's share of loops with large and small tasks is fair.
  static constexpr long unit = 1 << 14;
  struct Part {
    Loop loop;
    long units;  // of a task
  };
  struct Loops {
    std::vector<Part> parts;
    long units = 0, numbers = 0;
  };
  Loops before, main, after;

  template <class Run>
  void add(Loops& loops, long count, long numbers, const Run& run) {
    static_assert(std::is_trivially_copyable_v<Run> && std::is_trivially_destructible_v<Run>);
    const auto* closure = new (team.memory<Run>(1)) Run(run);
    const auto run_some = [](const void* own, long begin, long end) {
      for (long task = begin; task < end; task++) (*static_cast<const Run*>(own))(task);
    };
    const long units = std::max(numbers / unit, 1l);
    loops.parts.push_back({{run_some, closure, count}, units});
    loops.units += count * units, loops.numbers += count * numbers;
  }

  void run(const Loops& loops) {
    const auto run_some = [](const void* closure, long begin, long end) {  // tasks whose first unit is there
      for (const auto& [loop, units] : static_cast<const Loops*>(closure)->parts) {
        const long from = (std::max(begin, 0l) + units - 1) / units, to = (end + units - 1) / units;
        if (from < std::min(to, loop.count)) loop.run(loop.closure, from, std::min(to, loop.count));
        begin -= loop.count * units, end -= loop.count * units;
        if (end <= 0) return;
      }
    };
    if (loops.numbers < min_shared) run_some(&loops, 0, loops.units);
    else team.run({run_some, &loops, loops.units});
  }

 public:
  Team& team;

  explicit Phase(Team& team) : team(team) {}

  // Calls run(task) for each of `count` tasks, which read or multiply `numbers` each.
  template <class Run>
  void add(long count, long numbers, const Run& run) {
    add(main, count, numbers, run);
  }
  // What these write, tasks of `add` may read; and so on.
  template <class Run>
  void add_before(long count, long numbers, const Run& run) {
    add(before, count, numbers, run);
  }
  template <class Run>
  void add_after(long count, long numbers, const Run& run) {
    add(after, count, numbers, run);
  }
  void run() { run(before), run(main), run(after); }
};

}  // namespace
