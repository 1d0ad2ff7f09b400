// The product under the convolutions: a few rows by a few vectors of columns, held in registers for
// the length of one chain of sums. Included by kernel sources only (see vec.h).
#pragma once

#include "cpu/vec.h"

namespace resfast {
namespace {

constexpr int kProductLanes = kVectorBytes / 4;
#if defined(__AVX512F__)
constexpr int kProductVectors = 4;  // 6×4 sums, 4 vectors of columns, 1 value: 29 of 32 registers
#else
constexpr int kProductVectors = 2;  // 6×2 sums, 2 and 1: 15 of 16
#endif
constexpr int kProductRows = 6;
constexpr int64_t kLineFloats = 16;  // of a cache line
constexpr int kPanelColumns = kProductVectors * kProductLanes;

RESFAST_INLINE FloatVec splat(float x) {
  return x - FloatVec{};  // unlike x + 0, no instruction: −0 stays −0
}

// Left to itself, GCC reads the columns again with each multiplication: loads are then the limit.
RESFAST_INLINE FloatVec in_register(FloatVec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE__)
  asm("" : "+x"(v));
#endif
  return v;
}

// sum[r][j] = Σ over steps v[r·row_stride + step·v_step]·u[step·u_step + j], vectors j; each sum
// goes to finish(r, j, sum). kLinesAhead: fetched with each step, from `ahead` on; and v_step is
// 1, and the rows after these come next. Or 0: nothing is fetched.
template <int kRows, int kVectors, int kLinesAhead, class Finish>
RESFAST_INLINE void product_block(const float* v, int64_t row_stride, int64_t v_step,
                                  const float* u, int64_t u_step, int64_t steps, const float* ahead,
                                  Finish finish) {
  FloatVec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[r][j] = FloatVec{};
  }
  const float* lower = v + 3 * row_stride;  // three rows from one address: strides of 0, 1, 2
  for (int64_t step = 0; step < steps; ++step) {
    if (kLinesAhead > 0 && step % kLineFloats == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(v + (kRows + r) * row_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLinesAhead; ++i) __builtin_prefetch(ahead + i * kLineFloats, 0, 2);
    ahead += kLinesAhead * kLineFloats;
    FloatVec columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      columns[j] = in_register(load_raw<FloatVec>(u + j * kProductLanes));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const FloatVec value = splat(r < 3 ? v[r * row_stride] : lower[(r - 3) * row_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] += value * columns[j];
    }
    v += v_step;
    lower += v_step;
    u += u_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) finish(r, j, sum[r][j]);
  }
}

// The number of rows of the next block: the rest in blocks as equal as can be, 8 as 4 + 4.
RESFAST_INLINE int64_t next_rows(int64_t rest) {
  const int64_t blocks = (rest + kProductRows - 1) / kProductRows;
  return (rest + blocks - 1) / blocks;
}

// Lines of memory to be fetched while blocks of rows are multiplied: memory gives filters more
// slowly than one block takes them, and caches serve the further blocks.
template <int kLinesAhead>
struct LinesAhead {
  const float* next;
  int64_t lines;

  // Where a block of so many steps starts; `hot`, which costs nothing, when all are fetched.
  RESFAST_INLINE const float* take(int64_t steps, const float* hot) {
    if (lines <= 0) return hot;
    const float* const from = next;
    next += steps * kLinesAhead * kLineFloats;
    lines -= steps * kLinesAhead;
    return from;
  }
};

// call(Int<rows>), for rows up to kProductRows
template <class Call>
RESFAST_INLINE void with_rows(int64_t rows, Call call) {
  switch (rows) {
    case 6:
      return call(Int<6>{});
    case 5:
      return call(Int<5>{});
    case 4:
      return call(Int<4>{});
    case 3:
      return call(Int<3>{});
    case 2:
      return call(Int<2>{});
    default:
      return call(Int<1>{});
  }
}

// call(Int<vectors>), for up to kProductVectors
template <class Call>
RESFAST_INLINE void with_vectors(int64_t vectors, Call call) {
  switch (vectors) {
#if defined(__AVX512F__)
    case 4:
      return call(Int<4>{});
    case 3:
      return call(Int<3>{});
#endif
    case 2:
      return call(Int<2>{});
    default:
      return call(Int<1>{});
  }
}

}  // namespace
}  // namespace resfast
