// The kernels of direct convolution, compiled once per instruction set by direct_<isa>.cpp.
#pragma once

#include "cpu/direct_kernels.h"
#include "cpu/product.h"

namespace resfast {
namespace {

// Longer sums are cut, and added up apart: a panel's part then stays in the L2 cache, and rounding
// errors grow with the longest chain.
constexpr int64_t kChainValues = 512;
constexpr int kLinesAhead = 1;

// A part of every window: channels [channel, channel + channels) of segments [first, last).
struct Part {
  int64_t first, last, channel, channels;
};

// Of a line's windows, what one call of the product takes and where it goes.
struct Windows {
  const float *x, *u;
  int64_t segments;
  int64_t at;         // the first output
  bool starts, ends;  // the sums: with this part
};

template <int kRows, int kVectors, bool kFetchRows, int kLines>
RESFAST_INLINE const float* direct_block(const DirectTile& t, const DirectLine& line,
                                         const Windows& w, int64_t channels, int64_t column,
                                         const float* ahead) {
  const float* const residual = t.residual ? t.residual + w.at : nullptr;
  const BlockOutput output{t.out + w.at, w.starts ? residual : t.out + w.at,
                           w.ends && t.shift ? t.shift + column : nullptr, w.ends && t.relu,
                           line.out_stride};
  if (w.starts && residual) output.fetch<kRows, kVectors>();
  return product_block<1, kRows, kVectors, kFetchRows, kLines>(
      w.x, line.x_stride, 1, w.u, kPanelColumns, channels, w.segments, line.segment_stride,
      t.channels * kPanelColumns, ahead,
      [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA { output.store(r, j, sum); });
}

template <int kVectors, bool kFetchRows>
RESFAST_INLINE void direct_panel(const DirectTile& t, int64_t column, const Part& part) {
  const int64_t segment_floats = t.channels * kPanelColumns;
  const float* const panel = t.u + column * t.segments * t.channels;
  const auto at = [&](const float* from, int64_t segment) {
    return from + segment * segment_floats + part.channel * kPanelColumns;
  };
  // The same part of the next panel, or, behind the last one, what comes next of the first.
  const bool last_panel = column + kPanelColumns >= t.columns;
  const bool last_channels = part.channel + part.channels == t.channels;
  const float* next = at(panel + t.segments * segment_floats, part.first);
  if (last_panel) {
    next = last_channels ? t.u + part.last * segment_floats
                         : at(t.u, part.first) + part.channels * kPanelColumns;
  }
  LinesAhead<kLinesAhead> lines(next, (part.last - part.first) * part.channels * kPanelColumns);
  for (int64_t i = 0; i < t.line_count; ++i) {
    const DirectLine& line = t.lines[i];
    const int64_t first = line.first > part.first ? line.first : part.first;
    const int64_t last = line.last < part.last ? line.last : part.last;
    if (first >= last) continue;
    Windows w;
    w.u = at(panel, first);
    w.segments = last - first;
    w.starts = first == line.first && part.channel == 0;
    w.ends = last == line.last && last_channels;
    for (int64_t row = 0; row < line.windows;) {
      const int64_t rows = next_rows(line.windows - row);
      w.x = line.x + row * line.x_stride + first * line.segment_stride + part.channel;
      w.at = line.out + row * line.out_stride + column;
      with_rows(rows, [&](auto count) RESFAST_INLINE_LAMBDA {
        constexpr int kRows = decltype(count)::value;
        lines.with_fetching([&](auto lines_ahead, const float* ahead) RESFAST_INLINE_LAMBDA {
          return direct_block<kRows, kVectors, kFetchRows, decltype(lines_ahead)::value>(
              t, line, w, part.channels, column, ahead);
        });
      });
      row += rows;
    }
  }
}

inline void direct_product(const DirectTile& t) {
  const bool whole = t.channels <= kChainValues;
  const int64_t segments = whole && t.channels > 0 ? kChainValues / t.channels : 1;
  const int64_t channels = whole ? t.channels : kChainValues;
  for (int64_t first = 0; first < t.segments; first += segments) {
    const int64_t last = first + segments < t.segments ? first + segments : t.segments;
    for (int64_t channel = 0; channel < t.channels; channel += channels) {
      const int64_t left = t.channels - channel;
      const Part part{first, last, channel, left < channels ? left : channels};
      for (int64_t column = 0; column < t.columns; column += kPanelColumns) {
        const int64_t columns = t.columns - column;
        with_vectors(columns < kPanelColumns ? columns / kProductLanes : kProductVectors,
                     [&](auto vectors) {
                       constexpr int kVectors = decltype(vectors)::value;
                       if (kNextRows || column == 0) {
                         direct_panel<kVectors, true>(t, column, part);
                       } else {
                         direct_panel<kVectors, kNextRows>(t, column, part);
                       }
                     });
      }
    }
  }
}

}  // namespace
}  // namespace resfast

#define RESFAST_DIRECT_KERNELS {kProductLanes, kPanelColumns, &direct_product, &pack_panel}
