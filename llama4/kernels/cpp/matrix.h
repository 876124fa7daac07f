// Matrices of any layout and format, and their products with any number of rows.

#pragma once

#include <initializer_list>
#include <vector>

#include "gemm.h"
#include "gemm_bytes.h"
#include "gemm_unpacked.h"
#include "gemv.h"
#include "gemv_blocks.h"
#include "gemv_bytes.h"
#include "gemv_halves.h"
#include "gemv_in_out.h"
#include "gemv_int4.h"

namespace {

enum Layout : int64_t { OUT_IN, IN_OUT };  // other numbers are those of QuantizedFormats

// A matrix, or all of a layer's experts, which lie `stride` bytes apart, and their scales `scale_stride`.
struct Matrix {
  const char* w;
  Scales scales;
  int64_t layout, group_size, I, O, stride, scale_stride;

  Matrix expert(long e) const {
    Matrix own = *this;
    own.w += e * stride;
    if (scales) own.scales.numbers = static_cast<const char*>(scales.numbers) + e * scale_stride;
    return own;
  }
  long numbers() const { return I * O; }
};

// Most rows of a product with any matrix that do not go in tiles: it takes as long as reading the matrix does.
constexpr long max_gemv_rows = 12;

// The same with a matrix: as long as tiles do not pay. W [I, O] is packed so fast that they soon do; of the others some
// need many rows, where registers suffice, unless tiles are AMX's.
template <class X>
long gemv_rows_of(const Matrix& a) {
  if (a.layout == IN_OUT) return 8;
  if (vectors_in_registers <= 16) return max_gemv_rows;
  long rows = a.layout == OUT_IN ? 64 : max_gemv_rows;
  bool goes_by_amx = amx && numbers_per_word<X> == 2;
  QuantizedFormats::visit(a.layout, [&](auto format) {
    using F = decltype(format);
    goes_by_amx |= amx && has_int8_inputs<F> && a.group_size % 32 == 0;
    if constexpr (is_block_format<F>) return;
    else if constexpr (F::interleaved) rows = has_int8_inputs<F> && a.group_size < 128 ? max_gemv_rows : 64;
    else if constexpr (!has_int8_inputs<F>) rows = 16;
  });
  return goes_by_amx ? std::min(rows, amx_rows - 1) : rows;
}

// Whether rows go in tiles.
template <class X>
bool uses_gemm(const Matrix& a, long N) {
  return a.O % strip == 0 && a.I % numbers_per_word<X> == 0 && N > gemv_rows_of<X>(a);
}

// Inputs of which the rows of a dense matrix must be a multiple, whatever the machine.
constexpr long float32_inputs = 16, bfloat16_inputs = 32;

template <class F, class X>
constexpr bool reads(long inputs) {  // in whole blocks, and when packed
  if constexpr (requires { F::inputs; })
    if (inputs % F::inputs) return false;
  return inputs % (16 * numbers_per_word<X>) == 0;
}
template <class X, long first, class... F>
constexpr bool reads_all(FormatList<first, F...>) {
  return ((reads<F, X>(F::multiple) && reads<Fastest<F, X>, X>(F::multiple)) && ...);
}
static_assert(reads<Fastest<Float32, float>, float>(float32_inputs));
static_assert(reads<Fastest<Float32, bf16>, bf16>(bfloat16_inputs));
static_assert(reads_all<float>(QuantizedFormats()) && reads_all<bf16>(QuantizedFormats()));
static_assert(strip % 16 == 0 && strip % Int4::interleave == 0 && task_outputs % Int4::interleave == 0);

// A matrix, and where its product [N, O] goes.
template <class X>
struct MatrixProduct {
  const Matrix& matrix;
  X* y;

  // Whether both can be computed together, from x in one arrangement.
  bool goes_with(const MatrixProduct& other, long N) const {
    const Matrix &a = matrix, &b = other.matrix;
    return a.layout == b.layout && a.group_size == b.group_size && a.layout != IN_OUT &&
           uses_gemm<X>(a, N) == uses_gemm<X>(b, N);
  }
};

// A matrix in a format that reads numbers of a type.
template <class F, class W>
F read_as(const Matrix& a) {
  if constexpr (F::grouped && !is_block_format<F>) return F{(const W*)a.w, a.I, a.scales, a.group_size};
  else return F{(const W*)a.w, a.I};
}

// Row o of a matrix in blocks, in float32.
inline void read_row(const Matrix& a, long o, float* to) {
  QuantizedFormats::visit(a.layout, [&](auto format) {
    using F = decltype(format);
    if constexpr (is_block_format<F>) read_row(read_as<F, uint8_t>(a), o, to);
  });
}

// Rows of x rounded to e4m3, and a scale for each.
template <class X>
struct RoundedRows {
  WordNumber<X>* rows;
  float* scales;
  RoundedRows(Team& team, const X* x, long N, long I)
      : rows(team.memory<WordNumber<X>>(N * I)), scales(team.memory<float>(N)) {
    team.for_each(N, I, [=, *this](long n) { scales[n] = quantize_row_e4m3(x + n * I, I, rows + n * I); });
  }
};

template <class X>
void multiply_gemv(Phase& phase, const MatrixProduct<X>* begin, const MatrixProduct<X>* end, const X* x, long N) {
  const Matrix& a = begin->matrix;
  const auto products_of = [&](auto read) {
    std::vector<Product<decltype(read(a)), X>> products;
    for (auto p = begin; p != end; p++) products.push_back({read(p->matrix), p->matrix.O, p->matrix.scales, p->y});
    return products;
  };
  const long count = end - begin;
  if (a.layout == OUT_IN) return gemv(phase, products_of(read_as<Fastest<Float32, X>, X>).data(), count, x, N);
  if (a.layout == IN_OUT) return gemv_in_out(phase, (const X*)a.w, x, N, a.I, a.O, begin->y);
  QuantizedFormats::visit(a.layout, [&](auto format) {
    using F = decltype(format);
    const auto products = products_of(read_as<Fastest<F, X>, uint8_t>);
    if constexpr (is_block_format<F>) {
      gemv_blocks(phase, products.data(), count, x, N);
    } else if constexpr (F::rounds_inputs) {
      const RoundedRows<X> rounded(phase.team, x, N, a.I);
      gemv(phase, products.data(), count, rounded.rows, N, rounded.scales);
    } else if constexpr (has_int8_inputs<F>) {
      gemv_bytes(phase, products.data(), count, x, N);
    } else if constexpr (F::interleaved) {
      gemv_int4(phase, products.data(), count, x, N);
    } else if constexpr (has_half_inputs<Fastest<F, X>>) {
      gemv_halves(phase, products.data(), count, x, N);
    } else {
      gemv(phase, products.data(), count, x, N);
    }
  });
}

// Whether few rows of float32 go in tiles of their own.
template <class X>
bool is_unpacked(const Matrix& a, long N) {
  return std::is_same_v<X, float> && a.layout == IN_OUT && N <= max_unpacked_rows;
}

template <class X>
void multiply_gemm(Phase& phase, const MatrixProduct<X>* begin, const MatrixProduct<X>* end, const X* x, long N,
                   bool is_invariant) {
  const long I = begin->matrix.I, layout = begin->matrix.layout;
  if (layout == IN_OUT) {
    const Matrix& a = begin->matrix;
    if constexpr (std::is_same_v<X, float>)
      if (is_unpacked<X>(a, N)) return gemm_unpacked(phase, x, N, I, a.O, (const float*)a.w, begin->y);
    return gemm_in_out(phase, x, N, I, a.O, (const X*)a.w, begin->y, is_invariant);
  }
  if (layout == OUT_IN) {
    const PackedInputs packed = pack_rows<X>(phase, x, N, I);
    for (auto p = begin; p != end; p++) {
      const auto pack_half = [=, w = (const X*)p->matrix.w](long o, long first, long words, Word* to) {
        pack_dense(w, I, o, first, words, to);
      };
      gemm_out_in(phase, packed, p->matrix.O, pack_half, Scales{}, nullptr, p->y);
    }
    return;
  }
  QuantizedFormats::visit(layout, [&](auto format) {
    using F = decltype(format);
    PackedInputs packed;
    const float* row_scales = nullptr;
    if constexpr (has_int8_inputs<F>) {
      const Word* words = pack_byte_rows(phase, read_as<F, uint8_t>(begin->matrix), x, N);
      for (auto p = begin; p != end; p++)
        gemm_bytes(phase, words, N, read_as<F, uint8_t>(p->matrix), p->matrix.O, p->matrix.scales, p->y);
      return;
    } else if constexpr (F::rounds_inputs) {
      const RoundedRows<X> rounded(phase.team, x, N, I);
      packed = pack_rows<X>(phase, rounded.rows, N, I), row_scales = rounded.scales;
    } else if constexpr (std::conditional_t<F::grouped, Float32, F>::planes == 1) {
      packed = pack_rows<X>(phase, x, N, I);
    } else {
      packed = pack_rows<X>(phase, arrange_planes<F>(phase.team, x, N * I), N, I);
    }
    for (auto p = begin; p != end; p++) {
      const Matrix& a = p->matrix;
      const auto pack_half = [f = read_as<F, uint8_t>(a)](long o, long first, long words, Word* to) {
        if constexpr (is_block_format<F>) pack_blocks<X>(f, o, first, words, to);
        else if constexpr (F::interleaved) pack_int4<X>(f, o, first, words, to);
        else pack_format<X>(f, o, first, words, to);
      };
      gemm_out_in(phase, packed, a.O, pack_half, F::grouped ? Scales{} : a.scales, row_scales, p->y);
    }
  });
}

// Adds products with N rows of x, those side by side that go with each other. If they are invariant, a row's are the
// same bits, whatever rows stand beside it: they go in tiles only where these add in the order of few rows.
template <class X>
void multiply(Phase& phase, std::initializer_list<MatrixProduct<X>> all, const X* x, long N,
              bool is_invariant = false) {
  for (auto first = all.begin(), end = first; first != all.end(); first = end) {
    for (end = first + 1; end != all.end() && first->goes_with(*end, N);) end++;
    const bool keeps_order = first->matrix.layout == IN_OUT && !is_unpacked<X>(first->matrix, N);
    if (uses_gemm<X>(first->matrix, N) && (keeps_order || !is_invariant))
      multiply_gemm(phase, first, end, x, N, is_invariant);
    else multiply_gemv(phase, first, end, x, N);
  }
}

// y = x W or x W^T, for any number of rows.
template <class X>
void linear(long threads, const Matrix& a, const X* x, long N, X* y) {
  Team team(a.numbers() > min_parallel ? threads : 1);
  Phase phase(team);
  multiply(phase, {{a, y}}, x, N);
  phase.run();
}

}  // namespace
