// Matrices of any layout and format, and their products with any number of rows.

#pragma once

#include <initializer_list>
#include <vector>

#include "gemm.h"
#include "gemm_unpacked.h"
#include "gemv.h"
#include "gemv_in_out.h"
#include "gemv_int4.h"

namespace {

enum Layout : int64_t { OUT_IN, IN_OUT, INT8, FP8, INT4 };

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

// Most rows of a product that takes as long as reading its matrix does: with more it computes for longer.
constexpr long max_gemv_rows = 12;

// Whether rows go in tiles. W [I, O] is packed so fast that tiles pay off as soon as one is full.
template <class X>
bool uses_gemm(const Matrix& a, long N) {
  const bool fits = a.O % strip == 0 && a.I % numbers_per_word<X> == 0;
  return fits && N > (a.layout == IN_OUT ? tile_rows : max_gemv_rows);
}

// Inputs of which the rows of a matrix must be a multiple, whatever the dtype of x and the machine.
constexpr long float32_inputs = 16, bfloat16_inputs = 32, int8_inputs = 64, fp8_inputs = 64, int4_inputs = 128;

template <class F, class X>
constexpr bool reads(long inputs) {  // in whole blocks, and when packed
  return inputs % F::inputs == 0 && inputs % (16 * numbers_per_word<X>) == 0;
}
template <class X>
constexpr bool reads_quantized = reads<typename FormatsFor<X>::Int8, X>(int8_inputs) && reads<Int8, X>(int8_inputs) &&
                                 reads<typename FormatsFor<X>::Fp8, X>(fp8_inputs) && reads<Fp8, X>(fp8_inputs) &&
                                 reads<Int4, X>(int4_inputs);
static_assert(reads<FormatsFor<float>::Dense, float>(float32_inputs));
static_assert(reads<FormatsFor<bf16>::Dense, bf16>(bfloat16_inputs));
static_assert(reads_quantized<float> && reads_quantized<bf16>);
static_assert(strip % 16 == 0 && strip % Int4::interleave == 0 && task_outputs % Int4::interleave == 0);

// Memory that a team shares while it multiplies.
template <class X>
struct Workspace {
  float* partial;         // of each thread: partial_floats
  WordNumber<X>* inputs;  // x as a product wants it: padded_rows(N) rows of I
  float* row_scales;      // [N]

  // For rows of an expert, from row n of all routed rows on.
  Workspace from(const Matrix& a, long n) const;
  // For other rows, behind n routed ones of at most I inputs.
  Workspace behind(long n, long I) const { return {nullptr, inputs + padded_rows(n) * I, row_scales + n}; }
};

inline long partial_floats(const Matrix& a, long N) { return a.layout == IN_OUT ? omp_get_max_threads() * N * a.O : 0; }

template <class X>
Workspace<X> Workspace<X>::from(const Matrix& a, long n) const {
  return {partial + partial_floats(a, n), inputs + padded_rows(n) * a.I, row_scales + n};
}

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

template <class X>
void multiply_gemv(WorkStealing& work, const MatrixProduct<X>* begin, const MatrixProduct<X>* end, const X* x, long N,
                   float* partial) {
  using Formats = FormatsFor<X>;
  const Matrix& a = begin->matrix;
  const auto in_format = [&](auto format) {
    std::vector<Product<decltype(format(a)), X>> products;
    for (auto p = begin; p != end; p++)
      products.push_back({format(p->matrix), p->matrix.O, p->matrix.scales, p->y});
    return products;
  };
  const long count = end - begin;
  switch (a.layout) {
    case OUT_IN: {
      const auto dense = [](const Matrix& b) { return typename Formats::Dense{(const X*)b.w, b.I}; };
      return gemv(work, in_format(dense).data(), count, x, N);
    }
    case IN_OUT: return gemv_in_out((const X*)a.w, x, N, a.I, a.O, partial);
    case INT8: {
      const auto int8 = [](const Matrix& b) { return typename Formats::Int8{(const uint8_t*)b.w, b.I}; };
      return gemv(work, in_format(int8).data(), count, x, N);
    }
    case FP8: {
      const auto fp8 = [](const Matrix& b) { return typename Formats::Fp8{(const uint8_t*)b.w, b.I}; };
      float* row_scales = scratch<float, Use::gemv_row_scales>(N);
      auto* rows = scratch<WordNumber<X>, Use::gemv_fp8_rows>(N * a.I);
      for (long n = 0; n < N; n++) row_scales[n] = quantize_row_e4m3(x + n * a.I, a.I, rows + n * a.I);
      return gemv(work, in_format(fp8).data(), count, rows, N, row_scales);
    }
    case INT4: {
      const auto int4 = [](const Matrix& b) { return Int4{(const uint8_t*)b.w, b.I, b.scales, b.group_size}; };
      return gemv_int4(work, in_format(int4).data(), count, x, N);
    }
  }
}

template <class X>
void multiply_gemm(const MatrixProduct<X>* begin, const MatrixProduct<X>* end, const X* x, long N,
                   const Workspace<X>& workspace) {
  const long I = begin->matrix.I, layout = begin->matrix.layout;
  if constexpr (std::is_same_v<X, float>)
    if (layout == IN_OUT && N <= max_unpacked_rows) {
      const Matrix& a = begin->matrix;
      return gemm_unpacked(x, N, I, a.O, (const float*)a.w, workspace.inputs, begin->y);
    }
  const Word* words = nullptr;
  switch (layout) {
    case OUT_IN:
    case IN_OUT: words = arrange_words<Float32>(x, N * I, workspace.inputs); break;
    case INT8: words = arrange_words<Int8>(x, N * I, workspace.inputs); break;
    case FP8:
#pragma omp for schedule(static)
      for (long n = 0; n < N; n++)
        workspace.row_scales[n] = quantize_row_e4m3(x + n * I, I, workspace.inputs + n * I);
      words = (const Word*)workspace.inputs;
      break;
    case INT4: words = arrange_words<Int4>(x, N * I, workspace.inputs);
  }
  for (auto p = begin; p != end; p++) {
    const Matrix& a = p->matrix;
    const auto* values = (const uint8_t*)a.w;
    const auto linear = [&](const auto& pack_half, Scales scales, const float* row_scales) {
      gemm_out_in(words, N, I, a.O, pack_half, scales, row_scales, p->y);
    };
    const auto packer = [](const auto& format) {
      return [=](long o, Word* to) { pack_format<X>(format, o, to); };
    };
    switch (layout) {
      case OUT_IN: linear([&](long o, Word* to) { pack_dense((const X*)a.w, I, o, to); }, Scales{}, nullptr); break;
      case IN_OUT: gemm_in_out(words, N, I, a.O, (const X*)a.w, p->y); break;
      case INT8: linear(packer(Int8{values, I}), a.scales, nullptr); break;
      case FP8: linear(packer(Fp8{values, I}), a.scales, workspace.row_scales); break;
      case INT4: linear(packer(Int4{values, I, a.scales, a.group_size}), Scales{}, nullptr);
    }
  }
}

// Products with N rows of x, those side by side that go with each other. Of those in x out that do not use tiles only partial results, which
// finish_product adds up after a barrier. Of a team, of which each thread may pass a copy of x of its own.
template <class X>
void multiply(WorkStealing& work, std::initializer_list<MatrixProduct<X>> all, const X* x, long N,
              const Workspace<X>& workspace) {
  for (auto first = all.begin(), end = first; first != all.end(); first = end) {
    for (end = first + 1; end != all.end() && first->goes_with(*end, N);) end++;
    if (uses_gemm<X>(first->matrix, N))
      multiply_gemm(first, end, x, N, workspace);
    else
      multiply_gemv(work, first, end, x, N, workspace.partial);
  }
}

template <class X>
bool is_partial(const Matrix& a, long N) {
  return a.layout == IN_OUT && !uses_gemm<X>(a, N);
}

template <class X>
void finish_product(const Matrix& a, long N, const Workspace<X>& workspace, X* y) {
  if (is_partial<X>(a, N)) sum_partial_results(workspace.partial, N, a.O, y);
}

// y = x W or x W^T, for any number of rows.
template <class X>
void linear(const Matrix& a, const X* x, long N, X* y) {
  const bool is_tiled = uses_gemm<X>(a, N), is_native = std::is_same_v<X, WordNumber<X>>;
  const bool is_dense = a.layout == OUT_IN || a.layout == IN_OUT;
  const bool converts = is_tiled && !(is_dense && is_native && N > max_unpacked_rows);
  const Workspace<X> workspace{
      scratch<float, Use::partial_results>(is_tiled ? 0 : partial_floats(a, N)),
      scratch<WordNumber<X>, Use::gemm_inputs>(converts ? padded_rows(N) * a.I : 0),
      scratch<float, Use::row_scales>(N),
  };
  WorkStealing work;
#pragma omp parallel if (a.numbers() > min_parallel)
  {
    multiply(work, {{a, y}}, x, N, workspace);
    if (is_partial<X>(a, N)) barrier();
    finish_product(a, N, workspace, y);
  }
}

}  // namespace
