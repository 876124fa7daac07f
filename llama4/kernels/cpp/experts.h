// A layer's experts on rows that are sorted by expert: products of all experts are shared among threads as one loop.

#pragma once

#include <numeric>
#include <span>

#include "elementwise.h"
#include "matrix.h"

namespace {

// Adds swiglu for rows of gate and up, `stride` apart, a piece at a time.
template <class X>
void swiglu_rows(Phase& phase, const X* gate, const X* up, long count, long F, long stride, X* y) {
  constexpr long piece = 256;
  const long pieces = (F + piece - 1) / piece;
  phase.add(count * pieces, piece, [=](long i) {
    const long n = i / pieces, f = i % pieces * piece;
    swiglu(gate + n * stride + f, up + n * stride + f, std::min(piece, F - f), y + n * F + f);
  });
}

// Experts from `first` on, as many as there are counts of rows.
template <class X>
void experts_together(Team& team, const Matrix& gate_up, const Matrix& down, long first, std::span<const long> counts,
                      const X* x, X* y) {
  const auto scope = team.scope();
  const long F = down.I, R = std::accumulate(counts.begin(), counts.end(), 0l);
  X *wide = team.memory<X>(R * 2 * F), *inner = team.memory<X>(R * F);
  const auto multiply_all = [&](const Matrix& matrix, const X* rows, X* to) {
    const auto scope = team.scope();
    Phase phase(team);
    for (long e = first; const long count : counts) {
      if (count) multiply(phase, {{matrix.expert(e), to}}, rows, count);
      rows += count * matrix.I, to += count * matrix.O, e++;
    }
    phase.run();
  };
  multiply_all(gate_up, x, wide);
  Phase between(team);
  swiglu_rows(between, wide, wide + F, R, F, 2 * F, inner);
  between.run();
  multiply_all(down, inner, y);
}

// Rows of several experts that are computed at once: beside them threads have enough to do between two points where
// they wait for each other, and what lies between two products stays in the caches.
constexpr long most_together = 1024;

// y = down(silu(gate(x)) * up(x)) for rows sorted by expert, counts [E] of each.
template <class X>
void experts(Team& team, const Matrix& gate_up, const Matrix& down, const long* counts, long E, const X* x, X* y) {
  for (long e = 0, end; e < E; e = end) {
    long rows = counts[e];
    for (end = e + 1; end < E && rows + counts[end] <= most_together; end++) rows += counts[end];
    experts_together(team, gate_up, down, e, {counts + e, counts + end}, x, y);
    x += rows * gate_up.I, y += rows * gate_up.I;
  }
}

}  // namespace
