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

// A step alone in the loop's body leaves a tenth of the instructions to the loop, and those are
// scarce where the core serves a second thread, of this program or, on a rented machine, of
// anybody's. But the more steps it sees, the sooner GCC keeps sums in memory: at four everywhere.
#if defined(__AVX512F__)
constexpr int kSteps = 1;  // others not measured
#else
constexpr int kSteps = 3;
#endif

// Whether the next rows are fetched meanwhile, not for the first panel of columns alone, for which
// they come from memory. Lines of 12 rows, whose distance is often a multiple of 4 KB, do not fit
// into one set of a cache of 8 ways, as many processors without AVX-512 have.
#if defined(__AVX512F__)
constexpr bool kNextRows = true;
#else
constexpr bool kNextRows = false;
#endif

// sum[r][j] += v[r·row_stride] · u[j], vectors j
template <int kRows, int kVectors>
RESFAST_INLINE void product_step(const float* v, int64_t row_stride, const float* u,
                                 FloatVec (&sum)[kRows][kVectors]) {
  const float* const lower = v + 3 * row_stride;  // three rows from one address: strides 0, 1, 2
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
}

// sum[r][j] = Σ over segments and steps v[r·row_stride + segment·v_segment + step·v_step] ·
// u[segment·u_segment + step·u_step + j], vectors j; each sum goes to finish(r, j, sum).
// kStepsAtOnce: in the loop's body. kFetchRows: v_step is 1, and the rows after these are fetched,
// which come next. kLinesAhead: fetched with these steps, from `ahead` on. Returns what follows the
// lines fetched.
template <int kStepsAtOnce, int kRows, int kVectors, bool kFetchRows, int kLinesAhead, class Finish>
RESFAST_INLINE const float* product_block(const float* v, int64_t row_stride, int64_t v_step,
                                          const float* u, int64_t u_step, int64_t steps,
                                          int64_t segments, int64_t v_segment, int64_t u_segment,
                                          const float* ahead, Finish finish) {
  FloatVec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[r][j] = FloatVec{};
  }
  for (int64_t segment = 0; segment < segments; ++segment) {
    const float *v_at = v + segment * v_segment, *u_at = u + segment * u_segment;
    int64_t step = 0;
    for (; step + kStepsAtOnce <= steps; step += kStepsAtOnce) {
      if (kFetchRows && step % kLineFloats < kStepsAtOnce) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(v_at + (kRows + r) * row_stride);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kLinesAhead; ++i) __builtin_prefetch(ahead + i * kLineFloats, 0, 2);
      ahead += kLinesAhead * kLineFloats;
#pragma GCC unroll 8
      for (int i = 0; i < kStepsAtOnce; ++i) {
        product_step(v_at + i * v_step, row_stride, u_at + i * u_step, sum);
      }
      v_at += kStepsAtOnce * v_step;
      u_at += kStepsAtOnce * u_step;
    }
    for (; step < steps; ++step) {
      product_step(v_at, row_stride, u_at, sum);
      v_at += v_step;
      u_at += u_step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) finish(r, j, sum[r][j]);
  }
  return ahead;
}

// Where a block's sums go: act(sum + added + shift), the first of them at out. Held apart from the
// tile, since vector stores may alias anything: what lies in memory is read again after each.
struct BlockOutput {
  float* out;
  const float* added;  // rows `stride` apart, or nullptr
  const float* shift;  // or nullptr
  bool relu;
  int64_t stride;

  // Reads what will be added, which comes from memory meanwhile.
  template <int kRows, int kVectors>
  RESFAST_INLINE void fetch() const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors * kProductLanes; j += kLineFloats) {
        __builtin_prefetch(added + r * stride + j);
      }
    }
  }

  RESFAST_INLINE void store(int r, int j, FloatVec sum) const {
    const int64_t at = r * stride + j * kProductLanes;
    if (added) sum += load_raw<FloatVec>(added + at);
    if (shift) sum += load_raw<FloatVec>(shift + j * kProductLanes);
    if (relu) sum = sum < 0.0f ? FloatVec{} : sum;  // NaN stays
    store_raw(out + at, sum);
  }
};

// The number of rows of the next block: the rest in blocks as equal as can be, 8 as 4 + 4.
RESFAST_INLINE int64_t next_rows(int64_t rest) {
  const int64_t blocks = (rest + kProductRows - 1) / kProductRows;
  return (rest + blocks - 1) / blocks;
}

// Memory to be fetched while blocks of rows are multiplied, a few lines at a time until it is all
// fetched: memory gives filters more slowly than one block takes them, and caches serve the further
// blocks.
template <int kLinesAhead>
struct LinesAhead {
  const float *next, *end;

  LinesAhead(const float* from, int64_t floats) : next(from), end(from + floats) {}

  // block(Int<lines>, next), which returns what follows the lines it fetched
  template <class Block>
  RESFAST_INLINE void with_fetching(Block block) {
    if (next < end) {
      next = block(Int<kLinesAhead>{}, next);
    } else {
      block(Int<0>{}, nullptr);
    }
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

// to[j·to_stride + i] = from[i·from_stride + j], of as many rows and columns as there are lanes
RESFAST_INLINE void transpose(const float* from, int64_t from_stride, float* to,
                              int64_t to_stride) {
  FloatVec v[kProductLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kProductLanes; ++i) v[i] = load_raw<FloatVec>(from + i * from_stride);
  // Blocks beside the diagonal change places, from halves down to single values.
#pragma GCC unroll 4
  for (int size = kProductLanes / 2; size >= 1; size /= 2) {
    IntVec upper, lower;
#pragma GCC unroll 16
    for (int lane = 0; lane < kProductLanes; ++lane) {
      upper[lane] = lane & size ? lane - size + kProductLanes : lane;
      lower[lane] = lane & size ? lane + kProductLanes : lane + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kProductLanes; ++i) {
      if (i & size) continue;
      const FloatVec a = v[i], b = v[i + size];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kProductLanes; ++i) store_raw(to + i * to_stride, v[i]);
}

// A panel of filters, to[channel][kPanelColumns] of from[column·column_stride +
// channel·channel_stride], each column times its factor; zero beyond the columns there are.
inline void pack_panel(const float* from, int64_t column_stride, int64_t channel_stride,
                       int64_t columns, int64_t channels, const float* factors, float* to) {
  int64_t column = 0;
  for (; column + kProductLanes <= columns; column += kProductLanes) {
    const FloatVec factor = factors ? load_raw<FloatVec>(factors + column) : splat(1.0f);
    const float* const at = from + column * column_stride;
    float* const panel = to + column;
    int64_t channel = 0;
    if (channel_stride == 1) {
      for (; channel + kProductLanes <= channels; channel += kProductLanes) {
        float block[kProductLanes * kProductLanes];
        transpose(at + channel, column_stride, block, kProductLanes);
        for (int64_t i = 0; i < kProductLanes; ++i) {
          store_raw(panel + (channel + i) * kPanelColumns,
                    load_raw<FloatVec>(block + i * kProductLanes) * factor);
        }
      }
    } else if (column_stride == 1) {
      for (; channel < channels; ++channel) {
        store_raw(panel + channel * kPanelColumns,
                  load_raw<FloatVec>(at + channel * channel_stride) * factor);
      }
    }
    for (; channel < channels; ++channel) {
      for (int64_t j = 0; j < kProductLanes; ++j) {
        panel[channel * kPanelColumns + j] =
            at[j * column_stride + channel * channel_stride] * factor[j];
      }
    }
  }
  for (; column < kPanelColumns; ++column) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      to[channel * kPanelColumns + column] =
          column < columns ? from[column * column_stride + channel * channel_stride] *
                                 (factors ? factors[column] : 1.0f)
                           : 0.0f;
    }
  }
}

}  // namespace
}  // namespace resfast
