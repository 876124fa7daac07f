// y = x W^T for few rows x [N, I] and W [O, I]: as fast as W is read from memory, if every byte is read once, in order,
// by all cores, and converted in registers.
//
// An output is the dot product of a row of x with a row of W.

#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "formats.h"

namespace {

// Whether a block of a dense matrix is a line of memory, of which a sum takes one product, or two in floats.
template <class F>
constexpr bool is_dense_line = F::inputs == 64 / sizeof(*F::w) && sizeof(*F::w) > 1;

// Rows of x that meet a row of W at once. Eight, where sums of one block at a time leave registers for them.
template <class F>
constexpr int gemv_rows = is_dense_line<F> && vectors_in_registers > 16 ? 8 : 4;

// x in the order of a format's planes and in their precision. For each gemv_rows (or those that are left): all rows'
// inputs of the first block, then of the next, so that what is multiplied with a block of W is contiguous.
template <class F, class X>
const typename F::Plane* arrange_inputs(Team& team, const X* x, long N, long I) {
  constexpr int plane_inputs = F::inputs / F::planes;
  using To = std::conditional_t<plane_inputs == 32, bf16, float>;
  To *first = team.memory<To>(N * I), *to = first;
  for_each_rows<gemv_rows<F>>(N, [&](auto rows, long n) {
    for (long block = 0; block < I; block += F::inputs)
      for (int row = 0; row < rows; row++)
        for (int plane = 0; plane < F::planes; plane++)
          for (int lane = 0; lane < plane_inputs; lane += F::run, to += F::run) {
            const X* from = x + (n + row) * I + block + F::place(plane, lane);
            if constexpr (std::is_same_v<X, To>) __builtin_memcpy(to, from, F::run * sizeof(To));
            else
              for (int i = 0; i < F::run; i++) assign(to[i], upcast(from[i]));
          }
  });
  return reinterpret_cast<const typename F::Plane*>(first);
}

constexpr long prefetch_bytes = 8192;  // how far ahead; less is slower
constexpr long task_outputs = 32;  // rows of W of a task: read from memory once, and from the cache for more rows of x

// Whether a core that only sums what it reads does not look far enough ahead by itself: Intel's. For AMD's prefetching
// costs more than it gives.
#ifdef __x86_64__
const bool sums_need_prefetch = [] {
  unsigned most, vendor, others[2];
  return __get_cpuid(0, &most, &vendor, &others[0], &others[1]) && vendor == signature_INTEL_ebx;
}();
#else
constexpr bool sums_need_prefetch = false;
#endif

// Calls run(whether to prefetch), an integral_constant: a branch for each line would cost 8% of a sum's time.
template <bool computes_more, class Run>
INLINE void choose_prefetch(const Run& run) {
  if constexpr (computes_more) run(std::true_type());
  else if (sums_need_prefetch) run(std::true_type());
  else run(std::false_type());
}

// Blocks that are multiplied at once, each to sums of its own. Like all that the order of a sum depends on, it does not
// depend on how many rows of x there are, where registers suffice (not with AVX2): the result for a row is the same
// bits, whatever stands beside it. One, where a block is one product: a core that requests more lines than it can wait
// for is slower; or where eight rows of x are to meet two of W.
template <class F, int N>
constexpr int unrolled_blocks =
    is_dense_line<F> && (F::planes == 1 || gemv_rows<F> == 8) ? 1
                                                              : std::min(4, std::max(1, vectors_in_registers / 2 / N));

// Blocks of a row, a multiple of 16, of which the inputs of so many rows of x stay in the nearest cache.
template <class F>
constexpr long max_segment = std::max<long>(1024 / (gemv_rows<F> * F::planes * sizeof(typename F::Plane)), 1) * 16;

// Adds U blocks of a row of W times N rows of x, each block to its own sums: a sum is not waited for. What it
// prefetches lies `ahead` bytes behind.
template <int U, bool prefetches, class F, int N>
inline __attribute__((always_inline)) void add_blocks(const F& f, long o, long block, const typename F::Plane* x,
                                                      long ahead, f32x16 (*sums)[N]) {
  typename F::Plane w[U][F::planes];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) {
    f.read(o, block + u, w[u]);
    const bool begins_line = u * F::inputs * sizeof(*F::w) % 64 == 0;
    if (prefetches && begins_line) __builtin_prefetch((const char*)f.at(o, block + u) + ahead, 0, 2);
  }
#pragma GCC unroll 8
  for (int plane = 0; plane < F::planes; plane++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const auto* inputs = x + ((block + u) * N + n) * F::planes + plane;
        if constexpr (N * F::planes == 1)  // one instruction more, for the same reason as one block at a time
          sums[u][n] = multiply_add(sums[u][n], w[u][plane], load<typename F::Plane>(inputs));
        else sums[u][n] = multiply_add(sums[u][n], w[u][plane], inputs);
      }
}

// Blocks [from, until) of `count` <= 16 rows of W times N rows of x, added to results, of which the lanes add up to the
// dot product; a segment's are added up first. Rows of W are read one after the other: several at once are read at half
// the rate. Nothing stands between two rows that can stand before them: it would cost 10%.
template <class F, int N, bool prefetches>
__attribute__((noinline)) void dot_segments(const F f, long first, long count, long from, long until, long segment,
                                            const typename F::Plane* x, long ahead, f32x16 (*results)[16]) {
  constexpr int U = unrolled_blocks<F, N>;
  for (long i = 0; i < count; i++)
    for (long block = from; block < until;) {
      const long end = std::min(block + segment, until);
      f32x16 sums[U][N] = {};
      for (; block + U <= end; block += U) add_blocks<U, prefetches, F, N>(f, first + i, block, x, ahead, sums);
      for (; U > 1 && block < end; block++) add_blocks<1, prefetches, F, N>(f, first + i, block, x, ahead, sums);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        f32x16 total = sums[0][n];
#pragma GCC unroll 4
        for (int u = 1; u < U; u++) total += sums[u][n];
        results[n][i] += total;
      }
    }
}

// Rows of W that share what is read of N rows of x, where a core computes for longer than it reads: as many as have
// their sums in registers. Less than five rows of x that are not the first meet rows of W that are in its caches.
template <class F, int N>
constexpr int rows_together = gemv_rows<F> == 4 ? 1
                              : N > 4           ? 2
                                                : 4;

// The same for sixteen rows, in the same order of sums.
template <class F, int N>
__attribute__((noinline)) void dot_rows_together(const F f, long first, long from, long until, long segment,
                                                 const typename F::Plane* x, long ahead, f32x16 (*results)[16]) {
  constexpr int R = rows_together<F, N>;
  for (long i = 0; i < 16; i += R)
    for (long block = from; block < until;) {
      const long end = std::min(block + segment, until);
      f32x16 sums[R][N] = {};
      for (; block < end; block++) {
        typename F::Plane w[R][F::planes];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          f.read(first + i + r, block, w[r]);
          if (N > 4) __builtin_prefetch((const char*)f.at(first + i + r, block) + ahead, 0, 2);
        }
#pragma GCC unroll 2
        for (int plane = 0; plane < F::planes; plane++)
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) {
            auto inputs = load<typename F::Plane>(x + (block * N + n) * F::planes + plane);
            keep_in_register(inputs);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r][n] = multiply_add(sums[r][n], w[r][plane], inputs);
          }
      }
      asm volatile("" ::: "memory");  // GCC would load `results` before the loop, and w again for every product
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) results[n][i + r] += sums[r][n];
    }
}

// Outputs `first` to `first + count - 1`, at most 16, of a row of y, times their scales if there are any.
template <class Y>
void store_outputs(f32x16 totals, Scales scales, long first, long count, Y* y) {
  if (count == 16) return store_floats(y + first, scales ? totals * scales.load(first) : totals);
  for (long i = 0; i < count; i++) assign(y[first + i], scales ? totals[i] * scales[first + i] : totals[i]);
}

// `count` <= 16 outputs from `first` on. Long rows are read in equal segments, so that a segment of several rows of x
// stays in the nearest cache. What is prefetched is the next segment of the same row, or the first one 16 rows later;
// nothing is read behind the end of W.
template <class F, int N, class Y>
void gemv_outputs(const F& f, const typename F::Plane* x, bool is_cached, long first, long count, long O, Scales scales,
                  const float* row_scales, Y* y) {
  constexpr long rows = 16, longest = max_segment<F>, together = gemv_rows<F> / N;
  const long blocks = f.I / F::inputs, segments = std::max((blocks + longest - 1) / longest, 1l);
  const long segment = (blocks + segments * 4 - 1) / (segments * 4) * 4;
  const long row_bytes = (const char*)f.at(1, 0) - (const char*)f.at(0, 0);
  const long segment_bytes = blocks ? segment * row_bytes / blocks : 0;
  f32x16 results[N][rows] = {};
  const auto add = [&](long from, long until, long ahead) {
    if constexpr (rows_together<F, N> > 1)
      if ((N > 4 || is_cached) && count == rows)
        return dot_rows_together<F, N>(f, first, from, until, segment, x, ahead, results);
    choose_prefetch<(N > 1 || F::planes > 2)>([&](auto prefetches) {
      dot_segments<F, N, prefetches>(f, first, count, from, until, segment, x, ahead, results);
    });
  };
  if (N == 1 || segments <= together) {
    add(0, blocks, prefetch_bytes);
  } else {
    for (long s = 0; s < segments; s += together) {
      const long ahead = s + together < segments ? together * segment_bytes : rows * row_bytes - s * segment_bytes;
      add(s * segment, std::min(blocks, (s + together) * segment), ahead);
    }
  }
  for (int n = 0; n < N; n++) {
    const f32x16 totals = horizontal_sums(results[n]) * (row_scales ? row_scales[n] : 1);
    store_outputs(totals, scales, first, count, y + n * O);
  }
}

// A matrix, its outputs' scales if any, and where its products [N, O] go.
template <class F, class Y>
struct Product {
  F f;
  long O;
  Scales scales;
  Y* y;
};

// Adds run(product, begin, end) for all outputs of several products.
template <class F, class Y, class Run>
void add_products(Phase& phase, const Product<F, Y>* products, long count, const Run& run) {
  for (long i = 0; i < count; i++)
    phase.add((products[i].O + task_outputs - 1) / task_outputs, task_outputs * products[i].f.I,
              [own = products[i], run](long task) {
                run(own, task * task_outputs, std::min(own.O, (task + 1) * task_outputs));
              });
}

// y = x W^T for matrices of one format with equally many inputs.
template <class F, class X, class Y>
void gemv(Phase& phase, const Product<F, Y>* products, long count, const X* x, long N,
          const float* row_scales = nullptr) {
  const long blocks = products->f.I / F::inputs;
  const auto* inputs = arrange_inputs<F>(phase.team, x, N, products->f.I);
  add_products(phase, products, count, [=](const Product<F, Y>& own, long begin, long end) {
    for (long o = begin; o < end; o += 16)
      for_each_rows<gemv_rows<F>>(N, [&](auto rows, long n) {
        gemv_outputs<F, rows>(own.f, inputs + n * blocks * F::planes, n > 0, o, std::min(end - o, 16l), own.O,
                              own.scales, row_scales ? row_scales + n : nullptr, own.y + n * own.O);
      });
  });
}

}  // namespace
