// A layer's experts on rows that are sorted by expert: products of all experts are shared among threads as one loop.

#pragma once

#include <numeric>

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

// y = down(silu(gate(x)) * up(x)) by experts [begin, end), of which each has counts[e] rows.
template <class X>
void experts(Team& team, const Matrix& gate_up, const Matrix& down, long begin, long end, const long* counts,
             const X* x, X* y) {
  const auto scope = team.scope();
  const long F = down.I, R = std::accumulate(counts + begin, counts + end, 0l);
  X *wide = team.memory<X>(R * 2 * F), *inner = team.memory<X>(R * F);
  const auto multiply_all = [&](const Matrix& matrix, const X* rows, X* to) {
    Phase phase(team);
    for (long e = begin; e < end; rows += counts[e] * matrix.I, to += counts[e] * matrix.O, e++)
      if (counts[e]) multiply(phase, {{matrix.expert(e), to}}, rows, counts[e]);
    phase.run();
  };
  multiply_all(gate_up, x, wide);
  Phase between(team);
  swiglu_rows(between, wide, wide + F, R, F, 2 * F, inner);
  between.run();
  multiply_all(down, inner, y);
}

}  // namespace
