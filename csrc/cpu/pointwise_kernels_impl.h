// The 1×1 convolution kernels, compiled once per instruction set by pointwise_<isa>.cpp.
#pragma once

#include "cpu/pointwise_kernels.h"
#include "cpu/product.h"

namespace resfast {
namespace {

// Longer sums are cut, and added up apart: a panel's part then stays in the L2 cache, and rounding
// errors grow with the longest chain.
constexpr int64_t kChainChannels = 512;
constexpr int kLinesAhead = 1;

template <int kRows, int kVectors, bool kFetchRows, int kLines>
RESFAST_INLINE void pointwise_block(const PointwiseTile& t, int64_t row, int64_t column,
                                    int64_t first, int64_t channels, const float* ahead) {
  const bool last = first + channels == t.channels;
  const int64_t place = row * t.out_stride + column;
  if (first == 0 && t.residual) {  // comes from memory meanwhile
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        __builtin_prefetch(t.residual + place + r * t.out_stride + j * kProductLanes);
      }
    }
  }
  product_block<kRows, kVectors, kFetchRows, kLines>(
      t.x + row * t.x_stride + first, t.x_stride, 1,
      t.u + column * t.channels + first * kPanelColumns, kPanelColumns, channels, 1, 0, 0, ahead,
      [&](int r, int j, FloatVec y) RESFAST_INLINE_LAMBDA {
        const int64_t at = place + r * t.out_stride + j * kProductLanes;
        if (first > 0) {
          y += load_raw<FloatVec>(t.out + at);
        } else if (t.residual) {
          y += load_raw<FloatVec>(t.residual + at);
        }
        if (last && t.shift) y += load_raw<FloatVec>(t.shift + column + j * kProductLanes);
        if (last && t.relu) y = y < 0.0f ? FloatVec{} : y;  // NaN stays
        store_raw(t.out + at, y);
      });
}

template <int kVectors, bool kFetchRows>
RESFAST_INLINE void pointwise_panel(const PointwiseTile& t, int64_t column, int64_t first,
                                    int64_t channels, const float* next) {
  const float* const u = t.u + column * t.channels + first * kPanelColumns;
  LinesAhead<kLinesAhead> lines{next, channels * kPanelColumns / kLineFloats};
  for (int64_t row = 0; row < t.rows;) {
    const int64_t rows = next_rows(t.rows - row);
    const float* const ahead = lines.take(channels, nullptr);
    with_fetching<kLinesAhead>(ahead, [&](auto lines_ahead) RESFAST_INLINE_LAMBDA {
      with_rows(rows, [&](auto count) RESFAST_INLINE_LAMBDA {
        pointwise_block<decltype(count)::value, kVectors, kFetchRows, decltype(lines_ahead)::value>(
            t, row, column, first, channels, ahead);
      });
    });
    row += rows;
  }
}

inline void pointwise_product(const PointwiseTile& t) {
  for (int64_t first = 0; first < t.channels; first += kChainChannels) {
    const int64_t left = t.channels - first;
    const int64_t channels = left < kChainChannels ? left : kChainChannels;
    for (int64_t column = 0; column < t.columns; column += kPanelColumns) {
      const int64_t columns = t.columns - column;
      // the same channels of the next panel, or the first panel's next channels
      const float* const next =
          columns > kPanelColumns
              ? t.u + (column + kPanelColumns) * t.channels + first * kPanelColumns
              : t.u + (first + channels) * kPanelColumns;
      with_vectors(columns < kPanelColumns ? columns / kProductLanes : kProductVectors,
                   [&](auto vectors) {
                     constexpr int kVectors = decltype(vectors)::value;
                     if (kNextRows || column == 0) {
                       pointwise_panel<kVectors, true>(t, column, first, channels, next);
                     } else {
                       pointwise_panel<kVectors, kNextRows>(t, column, first, channels, next);
                     }
                   });
    }
  }
}

template <int kVectors>
void pointwise_correlation_rows(const PointwiseCorrelation& t) {
  const float* next = t.d + t.rows * t.d_stride;
  int64_t fetched = 0;
  for (int64_t k = 0; k < t.channels;) {
    const int64_t count = next_rows(t.channels - k);
    // The lines of rows far apart are no stream that the hardware would follow.
    for (; fetched * t.channels < t.next_rows * (k + count); ++fetched) {
      for (int64_t i = 0; i < t.channels; i += kLineFloats) {
        __builtin_prefetch(next + fetched * t.d_stride + i, 0, 2);
      }
    }
    with_rows(count, [&](auto rows) RESFAST_INLINE_LAMBDA {
      product_block<decltype(rows)::value, kVectors, false, 0>(
          t.d + k, 1, t.d_stride, t.x, kPanelColumns, t.rows, 1, 0, 0, nullptr,
          [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA {
            float* to = t.sums + (k + r) * t.sum_stride + j * kProductLanes;
            store_raw(to, t.add ? load_raw<FloatVec>(to) + sum : sum);
          });
    });
    k += count;
  }
}

inline void pointwise_correlation(const PointwiseCorrelation& t) {
  with_vectors(t.columns / kProductLanes,
               [&](auto vectors) { pointwise_correlation_rows<decltype(vectors)::value>(t); });
}

}  // namespace
}  // namespace resfast

#define RESFAST_POINTWISE_KERNELS \
  {kProductLanes, kPanelColumns, &pointwise_product, &pack_panel, &pointwise_correlation}
