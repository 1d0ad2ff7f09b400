// Products of bfloat16 pairs with float32 sums (vdpbf16ps), six rows by four vectors of columns.
#include <cstring>

#include "cpu/bf16_conv_kernels.h"
#include "cpu/product.h"

namespace resfast {
namespace {

// Longer rows are cut: a panel's part then stays in the L2 cache.
constexpr int64_t kPairsInPart = 512;
constexpr int kLinesAhead = 1;

RESFAST_INLINE FloatVec multiply_pairs(FloatVec sum, FloatVec x, FloatVec u) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)u);
}

// Both values of a pair, in every lane.
RESFAST_INLINE FloatVec splat_pair(const uint16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return (FloatVec)_mm512_set1_epi32(bits);
}

// To nearest even; NaN stays one, subnormal numbers become 0.
RESFAST_INLINE ShortVec round_to_bf16(FloatVec v) {
  return (ShortVec)_mm512_cvtneps_pbh((__m512)v);
}

// The tile by value, since stores may alias anything that is not local. Returns what follows the
// lines that it fetched from `ahead` on.
template <int kRows, int kVectors, int kLines>
RESFAST_INLINE const float* product_block(const Bf16Tile t, int64_t row, int64_t column,
                                          int64_t first, int64_t pairs, const float* ahead) {
  const bool last = first + pairs == t.pairs;
  if (last && t.residual) {  // comes from memory meanwhile
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* const residual = t.residual + (row + r) * t.out_stride + column;
      __builtin_prefetch(residual);
      if (kVectors > 2) __builtin_prefetch(residual + 2 * kProductLanes);
    }
  }
  const uint16_t* x = t.x + row * t.x_stride + 2 * first;
  const uint16_t* u = t.u + 2 * (column * t.pairs + first * kPanelColumns);
  float* const sums = t.sums + row * kPanelColumns;
  FloatVec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] =
          first > 0 ? load_raw<FloatVec>(sums + r * kPanelColumns + j * kProductLanes) : FloatVec{};
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (pair % kLineFloats == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(x + (kRows + r) * t.x_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * kLineFloats, 0, 2);
    ahead += kLines * kLineFloats;
    FloatVec columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      columns[j] = in_register(
          load_raw<FloatVec>(reinterpret_cast<const float*>(u + 2 * j * kProductLanes)));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const FloatVec value = splat_pair(x + r * t.x_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = multiply_pairs(sum[r][j], value, columns[j]);
    }
    x += 2;
    u += 2 * kPanelColumns;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      FloatVec y = sum[r][j];
      if (!last) {
        store_raw(sums + r * kPanelColumns + j * kProductLanes, y);
        continue;
      }
      const int64_t c = column + j * kProductLanes, at = (row + r) * t.out_stride + c;
      y = y * load_raw<FloatVec>(t.scale + c) + load_raw<FloatVec>(t.shift + c);
      if (t.residual) y += widen(BFloat16{}, load_raw<ShortVec>(t.residual + at));
      if (t.relu) y = y < 0.0f ? FloatVec{} : y;  // NaN stays
      store_raw(t.out + at, round_to_bf16(y));
    }
  }
  return ahead;
}

template <int kVectors>
RESFAST_INLINE void product_panel(const Bf16Tile& t, int64_t column) {
  for (int64_t first = 0; first < t.pairs; first += kPairsInPart) {
    const int64_t left = t.pairs - first, pairs = left < kPairsInPart ? left : kPairsInPart;
    const int64_t pair_floats = kPanelColumns;  // a pair takes as many bytes
    const float* const u =
        reinterpret_cast<const float*>(t.u) + column * t.pairs + first * pair_floats;
    LinesAhead<kLinesAhead> lines(u + pairs * pair_floats, pairs * pair_floats);
    for (int64_t row = 0; row < t.rows;) {
      const int64_t rows = next_rows(t.rows - row);
      with_rows(rows, [&](auto count) RESFAST_INLINE_LAMBDA {
        constexpr int kRows = decltype(count)::value;
        lines.with_fetching([&](auto lines_ahead, const float* ahead) RESFAST_INLINE_LAMBDA {
          return product_block<kRows, kVectors, decltype(lines_ahead)::value>(t, row, column, first,
                                                                              pairs, ahead);
        });
      });
      row += rows;
    }
  }
}

void bf16_product(const Bf16Tile& t) {
  for (int64_t column = 0; column < t.columns; column += kPanelColumns) {
    const int64_t columns = t.columns - column;
    with_vectors(columns < kPanelColumns ? columns / kProductLanes : kProductVectors,
                 [&](auto vectors) { product_panel<decltype(vectors)::value>(t, column); });
  }
}

}  // namespace

const Bf16Kernels bf16_kernels_avx512bf16 = {kProductLanes, kPanelColumns, &bf16_product};

}  // namespace resfast
