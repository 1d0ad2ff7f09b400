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
RESFAST_INLINE const float* pointwise_block(const PointwiseTile& t, int64_t row, int64_t column,
                                            int64_t first, int64_t channels, const float* ahead) {
  const bool last = first + channels == t.channels;
  const int64_t place = row * t.out_stride + column;
  const float* const residual = t.residual ? t.residual + place : nullptr;
  const BlockOutput output{t.out + place, first > 0 ? t.out + place : residual,
                           last && t.shift ? t.shift + column : nullptr, last && t.relu,
                           t.out_stride};
  if (first == 0 && residual) output.fetch<kRows, kVectors>();
  return product_block<kSteps, kRows, kVectors, kFetchRows, kLines>(
      t.x + row * t.x_stride + first, t.x_stride, 1,
      t.u + column * t.channels + first * kPanelColumns, kPanelColumns, channels, 1, 0, 0, ahead,
      [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA { output.store(r, j, sum); });
}

template <int kVectors, bool kFetchRows>
RESFAST_INLINE void pointwise_panel(const PointwiseTile& t, int64_t column, int64_t first,
                                    int64_t channels, const float* next) {
  LinesAhead<kLinesAhead> lines(next, channels * kPanelColumns);
  for (int64_t row = 0; row < t.rows;) {
    const int64_t rows = next_rows(t.rows - row);
    with_rows(rows, [&](auto count) RESFAST_INLINE_LAMBDA {
      constexpr int kRows = decltype(count)::value;
      lines.with_fetching([&](auto lines_ahead, const float* ahead) RESFAST_INLINE_LAMBDA {
        return pointwise_block<kRows, kVectors, kFetchRows, decltype(lines_ahead)::value>(
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

// call(Int<channels of a block>, first block, first channel, blocks) for the larger blocks of d's
// channels, and for those smaller by one
template <class Call>
RESFAST_INLINE void equal_blocks(int64_t channels, Call call) {
  const int64_t blocks = (channels + kProductRows - 1) / kProductRows;
  if (blocks == 0) return;
  const int64_t least = channels / blocks, larger = channels % blocks;
  const auto with = [&](int64_t count, int64_t block, int64_t channel, int64_t times) {
    if (times == 0) return;
    with_rows(count, [&](auto rows) RESFAST_INLINE_LAMBDA { call(rows, block, channel, times); });
  };
  with(least + 1, 0, 0, larger);
  with(least, larger, larger * (least + 1), blocks - larger);
}

// A block's values are read once for each panel of columns: row by row as they lie, they would
// share a few sets of the cache.
inline void pack_blocks(const float* d, int64_t d_stride, int64_t rows, int64_t channels,
                        int64_t block_stride, float* to) {
  equal_blocks(channels, [&](auto count, int64_t block, int64_t channel, int64_t times)
                             RESFAST_INLINE_LAMBDA {
                               constexpr int kCount = decltype(count)::value;
                               for (int64_t row = 0; row < rows; ++row) {
                                 const float* from = d + row * d_stride + channel;
                                 float* packed = to + block * block_stride + row * kCount;
                                 for (int64_t i = 0; i < times; ++i) {
                                   __builtin_memcpy(packed, from, kCount * sizeof(float));
                                   from += kCount;
                                   packed += block_stride;
                                 }
                               }
                             });
}

template <int kVectors>
void pointwise_correlation_rows(const PointwiseCorrelation& t) {
  equal_blocks(t.channels, [&](auto count, int64_t block, int64_t channel,
                               int64_t times) RESFAST_INLINE_LAMBDA {
    constexpr int kCount = decltype(count)::value;
    for (int64_t i = 0; i < times; ++i) {
      float* const sums = t.sums + (channel + i * kCount) * t.sum_stride;
      const BlockOutput output{sums, t.add ? sums : nullptr, nullptr, false, t.sum_stride};
      if (t.add) output.fetch<kCount, kVectors>();
      product_block<kSteps, kCount, kVectors, false, 0>(
          t.d + (block + i) * t.block_stride, 1, kCount, t.x, kPanelColumns, t.rows, 1, 0, 0,
          nullptr,
          [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA { output.store(r, j, sum); });
    }
  });
}

inline void pointwise_correlation(const PointwiseCorrelation& t) {
  with_vectors(t.columns / kProductLanes,
               [&](auto vectors) { pointwise_correlation_rows<decltype(vectors)::value>(t); });
}

}  // namespace
}  // namespace resfast

#define RESFAST_POINTWISE_KERNELS                                    \
  {kProductLanes, kPanelColumns, &pointwise_product,    &pack_panel, \
   kProductRows,  &pack_blocks,  &pointwise_correlation}
