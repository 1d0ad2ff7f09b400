// The Winograd kernels, compiled once per instruction set by winograd_<isa>.cpp. Channels are the
// lanes everywhere, so that each transform is the same few operations on vectors.
#pragma once

#include "cpu/product.h"
#include "cpu/vec.h"
#include "cpu/winograd_kernels.h"
#include "cpu/winograd_points.h"

namespace resfast {
namespace {

// ---- the transforms of one line, in place of registers

// Bᵀ: a line of inputs `d` at the points, in up to two groups of neighbours with no work in common

RESFAST_INLINE void to_points(Int<kF2>, Int<0>, const FloatVec* d, FloatVec* out) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[3] - d[1];
}

RESFAST_INLINE void to_points(Int<kF4>, Int<0>, const FloatVec* d, FloatVec* out) {
  constexpr float a = kPointA, b = kPointB, aa = a * a, bb = b * b;
  const FloatVec even = d[4] - bb * d[2], odd = d[3] - bb * d[1];
  out[0] = d[4] - (aa + bb) * d[2] + (aa * bb) * d[0];
  out[1] = even + a * odd;
  out[2] = even - a * odd;
}

RESFAST_INLINE void to_points(Int<kF4>, Int<1>, const FloatVec* d, FloatVec* out) {
  constexpr float a = kPointA, b = kPointB, aa = a * a, bb = b * b;
  const FloatVec even = d[4] - aa * d[2], odd = d[3] - aa * d[1];
  out[0] = even + b * odd;
  out[1] = even - b * odd;
  out[2] = d[5] - (aa + bb) * d[3] + (aa * bb) * d[1];
}

RESFAST_INLINE void to_points(Int<kF2Stride2>, Int<0>, const FloatVec* d, FloatVec* out) {
  out[0] = d[0] - d[2];
  out[1] = d[2];
  out[2] = d[2] - d[4];
}

RESFAST_INLINE void to_points(Int<kF2Stride2>, Int<1>, const FloatVec* d, FloatVec* out) {
  out[0] = d[1];
  out[1] = d[3];
}

// Aᵀ: the m outputs from the products at the points
template <int kForm>
RESFAST_INLINE void from_points(const FloatVec* p, FloatVec* out);

template <>
RESFAST_INLINE void from_points<kF2>(const FloatVec* p, FloatVec* out) {
  out[0] = p[0] + (p[1] + p[2]);
  out[1] = (p[1] - p[2]) + p[3];
}

template <>
RESFAST_INLINE void from_points<kF2Stride2>(const FloatVec* p, FloatVec* out) {
  out[0] = (p[0] + p[1]) + p[3];
  out[1] = (p[1] - p[2]) + p[4];
}

template <>
RESFAST_INLINE void from_points<kF4>(const FloatVec* p, FloatVec* out) {
  constexpr float a = kPointA, b = kPointB;
  const FloatVec sum_a = p[1] + p[2], sum_b = p[3] + p[4];
  const FloatVec difference_a = a * (p[1] - p[2]), difference_b = b * (p[3] - p[4]);
  out[0] = p[0] + (sum_a + sum_b);
  out[1] = difference_a + difference_b;
  out[2] = (a * a) * sum_a + (b * b) * sum_b;
  out[3] = p[5] + ((a * a) * difference_a + (b * b) * difference_b);
}

// A: the m gradients of an output line `d` at the points, in up to two groups like Bᵀ's
RESFAST_INLINE void gradient_to_points(Int<kF2>, Int<0>, const FloatVec* d, FloatVec* out) {
  out[0] = d[0];
  out[1] = d[0] + d[1];
  out[2] = d[0] - d[1];
  out[3] = d[1];
}

RESFAST_INLINE void gradient_to_points(Int<kF4>, Int<0>, const FloatVec* d, FloatVec* out) {
  constexpr float a = kPointA;
  const FloatVec even = d[0] + (a * a) * d[2], odd = a * (d[1] + (a * a) * d[3]);
  out[0] = d[0];
  out[1] = even + odd;
  out[2] = even - odd;
}

RESFAST_INLINE void gradient_to_points(Int<kF4>, Int<1>, const FloatVec* d, FloatVec* out) {
  constexpr float b = kPointB;
  const FloatVec even = d[0] + (b * b) * d[2], odd = b * (d[1] + (b * b) * d[3]);
  out[0] = even + odd;
  out[1] = even - odd;
  out[2] = d[3];
}

// ---- kernels

struct TilePlace {
  int64_t n, y, x;  // image, first output row and column

  TilePlace(const TileGrid& g, int64_t tile, int m) {
    n = tile / (g.rows * g.columns);
    const int64_t in_image = tile % (g.rows * g.columns);
    y = in_image / g.columns * m;
    x = in_image % g.columns * m;
  }
};

typedef float FloatHalfVec __attribute__((vector_size(kVectorBytes / 2)));

// G: the 3 taps `f` at the points, in float64 so that the filters are rounded once
template <int kForm>
RESFAST_INLINE void filter_to_points(const DoubleVec* f, DoubleVec* out);

template <>
RESFAST_INLINE void filter_to_points<kF2Stride2>(const DoubleVec* f, DoubleVec* out) {
  out[0] = f[0];
  out[1] = f[0] + f[2];
  out[2] = f[2];
  out[3] = f[1];
}

template <>
RESFAST_INLINE void filter_to_points<kF2>(const DoubleVec* f, DoubleVec* out) {
  out[0] = f[0];
  out[1] = 0.5 * ((f[0] + f[2]) + f[1]);
  out[2] = 0.5 * ((f[0] + f[2]) - f[1]);
  out[3] = f[2];
}

template <>
RESFAST_INLINE void filter_to_points<kF4>(const DoubleVec* f, DoubleVec* out) {
  constexpr double a = kPointA, b = kPointB;
  const DoubleVec even_a = kWeightAtA * f[0] + (a * a * kWeightAtA) * f[2];
  const DoubleVec even_b = kWeightAtB * f[0] + (b * b * kWeightAtB) * f[2];
  const DoubleVec odd_a = (a * kWeightAtA) * f[1], odd_b = (b * kWeightAtB) * f[1];
  out[0] = kWeightAtZero * f[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = f[2];
}

template <int kForm>
void winograd_weight(const WinogradWeight& t) {
  constexpr int kSide = kWinogradForms[kForm].filters;
  constexpr int kColumns = kPanelColumns;
  constexpr int kDoubles = kProductLanes / 2;
  constexpr int64_t kBlock = kLineFloats;
  // Channels or columns are next to each other in memory: work along the columns.
  float taps[kBlock][9][kColumns] = {};
  for (int64_t first = 0; first < t.channels; first += kBlock) {
    const int64_t block = t.channels - first < kBlock ? t.channels - first : kBlock;
    for (int r = 0; r < 3; ++r) {
      for (int s = 0; s < 3; ++s) {
        const float* w = t.w + first * t.channel_stride + r * t.row_stride + s * t.tap_stride;
        float* const to = &taps[0][s * 3 + r][0];
        if (t.channel_stride == 1 && block % kProductLanes == 0) {
          for (int64_t i = 0; i < block; i += kProductLanes) {
            for (int64_t column = 0; column < t.columns; column += kProductLanes) {
              transpose(w + column * t.column_stride + i, t.column_stride,
                        to + i * 9 * kColumns + column, 9 * kColumns);
            }
          }
        } else if (t.column_stride == 1) {
          for (int64_t i = 0; i < block; ++i) {
            for (int64_t column = 0; column < t.columns; column += kProductLanes) {
              store_raw(to + i * 9 * kColumns + column,
                        load_raw<FloatVec>(w + i * t.channel_stride + column));
            }
          }
        } else {
          for (int64_t column = 0; column < t.columns; ++column) {
            for (int64_t i = 0; i < block; ++i) {
              to[i * 9 * kColumns + column] = w[column * t.column_stride + i * t.channel_stride];
            }
          }
        }
      }
    }
    for (int64_t c = 0; c < block; ++c) {
      float* u = t.u + (first + c) * kColumns;
      for (int column = 0; column < kColumns; column += kDoubles) {
        DoubleVec lines[3][kSide];
#pragma GCC unroll 8
        for (int s = 0; s < 3; ++s) {
          DoubleVec f[3];
#pragma GCC unroll 8
          for (int r = 0; r < 3; ++r) {
            f[r] = __builtin_convertvector(load_raw<FloatHalfVec>(&taps[c][s * 3 + r][column]),
                                           DoubleVec);
          }
          filter_to_points<kForm>(f, lines[s]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) {
          const DoubleVec f[3] = {lines[0][i], lines[1][i], lines[2][i]};
          DoubleVec points[kSide];
          filter_to_points<kForm>(f, points);
#pragma GCC unroll 8
          for (int j = 0; j < kSide; ++j) {
            store_raw(u + (i * kSide + j) * t.point_stride + column,
                      __builtin_convertvector(points[j], FloatHalfVec));
          }
        }
      }
    }
  }
}

// A tile of kLine values a side to kSide points a side. kWhole: all its columns are in the image;
// otherwise [left, right) are. transform(Int<group>, line, points): of a line's points one of
// kGroups groups.
template <int kSide, int kLine, int kGroups, bool kWhole, class Transform>
RESFAST_INLINE void tile_to_points(const WinogradInput& t, const float* const* row, int left,
                                   int right, float* v, const Transform& transform) {
  constexpr int kFirst = (kSide + kGroups - 1) / kGroups;  // points of the first group
  // Copies: for all the compiler knows, stores change t.
  const int64_t channels = t.channels, part = t.part, part_stride = t.part_stride;
  const int64_t point_stride = t.point_stride;
  for (int64_t c = 0, in_part = 0; c < channels; c += kProductLanes) {
    // Rows of points a group at a time: all would not fit into the registers.
    const auto rows = [&](auto group) RESFAST_INLINE_LAMBDA {
      constexpr int kBegin = decltype(group)::value * kFirst;
      constexpr int kRows = kGroups == 1 || kBegin > 0 ? kSide - kBegin : kFirst;
      FloatVec columns[kLine][kRows];  // by column, then row of points
      int64_t at = c;
#pragma GCC unroll 8
      for (int j = 0; j < kLine; ++j) {
        FloatVec d[kLine];
        if (kWhole || (j >= left && j < right)) {
#pragma GCC unroll 8
          for (int i = 0; i < kLine; ++i) d[i] = load_raw<FloatVec>(row[i] + at);
          transform(group, d, columns[j]);
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) columns[j][i] = FloatVec{};
        }
        at += channels;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        FloatVec d[kLine], points[kSide];
#pragma GCC unroll 8
        for (int j = 0; j < kLine; ++j) d[j] = columns[j][i];
        transform(Int<0>{}, d, points);
        if constexpr (kGroups == 2) transform(Int<1>{}, d, points + kFirst);
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) {
          store_raw(v + ((kBegin + i) * kSide + j) * point_stride + in_part, points[j]);
        }
      }
    };
    rows(Int<0>{});
    if constexpr (kGroups == 2) rows(Int<1>{});
    in_part += kProductLanes;
    if (in_part == part) {
      v += part_stride;
      in_part = 0;
    }
  }
}

// All tiles, kStep inputs apart, from kOffset on.
template <int kStep, int kSide, int kLine, int kOffset, int kGroups, class Transform>
RESFAST_INLINE void tiles_to_points(const WinogradInput& t, const Transform& transform) {
  const TileGrid& g = t.grid;
  for (int64_t tile = t.begin; tile < t.end; ++tile) {
    const TilePlace at(g, tile, kStep);
    const float* row[kLine];
    const int64_t x = at.x + kOffset;
    for (int i = 0; i < kLine; ++i) {
      const int64_t y = at.y + kOffset + i;
      row[i] = y >= 0 && y < g.h ? t.x + ((at.n * g.h + y) * g.w + x) * t.channels : t.zeros;
    }
    float* v = t.v + (tile - t.begin) * t.part;
    if (x >= 0 && x + kLine <= g.w) {
      tile_to_points<kSide, kLine, kGroups, true>(t, row, 0, kLine, v, transform);
    } else {
      tile_to_points<kSide, kLine, kGroups, false>(
          t, row, static_cast<int>(x < 0 ? -x : 0),
          static_cast<int>(g.w - x < kLine ? g.w - x : kLine), v, transform);
    }
  }
}

template <int kForm>
void winograd_input(const WinogradInput& t) {
  constexpr WinogradForm f = kWinogradForms[kForm];
  constexpr int kGroups = f.points > 4 ? 2 : 1;
  tiles_to_points<f.tile * f.stride, f.points, f.points, -1, kGroups>(
      t, [](auto group, const FloatVec* d, FloatVec* out)
             RESFAST_INLINE_LAMBDA { to_points(Int<kForm>{}, group, d, out); });
}

template <int kForm>
void winograd_gradient(const WinogradInput& t) {
  constexpr WinogradForm f = kWinogradForms[kForm];
  constexpr int kGroups = f.points > 4 ? 2 : 1;
  tiles_to_points<f.tile, f.points, f.tile, 0, kGroups>(
      t, [](auto group, const FloatVec* d, FloatVec* out)
             RESFAST_INLINE_LAMBDA { gradient_to_points(Int<kForm>{}, group, d, out); });
}

constexpr int kLinesAhead = kProductVectors / 2;

template <int kVectors>
void product_rows(const WinogradProduct& t) {
  for (int64_t first = 0; first < t.channels; first += t.chain) {
    const int64_t left = t.channels - first;
    const int64_t channels = left < t.chain ? left : t.chain;
    const float* u = t.u + first * kPanelColumns;
    const bool add = t.add || first > 0;
    const int64_t m_stride = t.m_stride;
    LinesAhead<kLinesAhead> lines(u + channels * kPanelColumns, channels * kPanelColumns);
    for (int64_t row = 0; row < t.tiles;) {
      const int64_t rows = next_rows(t.tiles - row);
      const float* v = t.v + row * t.v_stride + first;
      float* const m = t.m + row * m_stride;
      with_rows(rows, [&](auto count) RESFAST_INLINE_LAMBDA {
        constexpr int kRows = decltype(count)::value;
        lines.with_fetching([&](auto lines_ahead, const float* ahead) RESFAST_INLINE_LAMBDA {
          return product_block<kSteps, kRows, kVectors, kNextRows, decltype(lines_ahead)::value>(
              v, t.v_stride, 1, u, kPanelColumns, channels, 1, 0, 0, ahead,
              [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA {
                float* const to = m + r * m_stride + j * kProductLanes;
                store_raw(to, add ? load_raw<FloatVec>(to) + sum : sum);
              });
        });
      });
      row += rows;
    }
  }
}

inline void winograd_product(const WinogradProduct& t) {
  with_vectors(t.columns / kProductLanes,
               [&](auto vectors) { product_rows<decltype(vectors)::value>(t); });
}

// ---- the weight's gradient

template <int kVectors>
void correlation_rows(const WinogradCorrelation& t) {
  for (int64_t channel = 0; channel < t.channels;) {
    const int64_t channels = next_rows(t.channels - channel);
    float* const sums = t.sums + channel * t.sum_stride;
    const BlockOutput output{sums, t.add ? sums : nullptr, nullptr, false, t.sum_stride};
    with_rows(channels, [&](auto count) RESFAST_INLINE_LAMBDA {
      product_block<kSteps, decltype(count)::value, kVectors, false, 0>(
          t.v + channel, 1, t.v_stride, t.d, t.d_stride, t.tiles, 1, 0, 0, nullptr,
          [&](int r, int j, FloatVec sum) RESFAST_INLINE_LAMBDA { output.store(r, j, sum); });
    });
    channel += channels;
  }
}

inline void winograd_correlation(const WinogradCorrelation& t) {
  with_vectors(t.columns / kProductLanes,
               [&](auto vectors) { correlation_rows<decltype(vectors)::value>(t); });
}

// Gᵀ: the 3 taps from the points, in float64: sums are read from memory anyway
template <int kForm>
RESFAST_INLINE void points_to_filter(const DoubleVec* p, DoubleVec* out);

template <>
RESFAST_INLINE void points_to_filter<kF2>(const DoubleVec* p, DoubleVec* out) {
  out[0] = p[0] + 0.5 * (p[1] + p[2]);
  out[1] = 0.5 * (p[1] - p[2]);
  out[2] = 0.5 * (p[1] + p[2]) + p[3];
}

template <>
RESFAST_INLINE void points_to_filter<kF4>(const DoubleVec* p, DoubleVec* out) {
  constexpr double a = kPointA, b = kPointB;
  const DoubleVec sum_a = kWeightAtA * (p[1] + p[2]), sum_b = kWeightAtB * (p[3] + p[4]);
  out[0] = kWeightAtZero * p[0] + (sum_a + sum_b);
  out[1] = (a * kWeightAtA) * (p[1] - p[2]) + (b * kWeightAtB) * (p[3] - p[4]);
  out[2] = ((a * a) * sum_a + (b * b) * sum_b) + p[5];
}

template <int kForm>
void winograd_weight_gradient(const WinogradWeightGradient& t) {
  constexpr int kSide = kWinogradForms[kForm].points;
  constexpr int kDoubles = kProductLanes / 2;
  // Rows of sums lie along the columns, filters along the channels or their own taps: what is
  // written together is collected first.
  constexpr int64_t kBlock = kLineFloats;
  float taps[9][kBlock][kPanelColumns];
  for (int64_t first = 0; first < t.channels; first += kBlock) {
    const int64_t block = t.channels - first < kBlock ? t.channels - first : kBlock;
    for (int64_t i = 0; i < block; ++i) {
      const float* row = t.sums + (first + i) * t.sum_stride;
      for (int64_t column = 0; column < t.columns; column += kDoubles) {
        DoubleVec lines[kSide][3];  // by row of points
#pragma GCC unroll 8
        for (int y = 0; y < kSide; ++y) {
          DoubleVec p[kSide];
#pragma GCC unroll 8
          for (int x = 0; x < kSide; ++x) {
            p[x] = __builtin_convertvector(
                load_raw<FloatHalfVec>(row + (y * kSide + x) * t.point_stride + column), DoubleVec);
          }
          points_to_filter<kForm>(p, lines[y]);
        }
#pragma GCC unroll 8
        for (int s = 0; s < 3; ++s) {
          DoubleVec p[kSide], line[3];
#pragma GCC unroll 8
          for (int y = 0; y < kSide; ++y) p[y] = lines[y][s];
          points_to_filter<kForm>(p, line);
#pragma GCC unroll 8
          for (int r = 0; r < 3; ++r) {
            store_raw(&taps[r * 3 + s][i][column], __builtin_convertvector(line[r], FloatHalfVec));
          }
        }
      }
    }
    for (int r = 0; r < 3; ++r) {
      for (int s = 0; s < 3; ++s) {
        const float* const tap = &taps[r * 3 + s][0][0];
        float* const w = t.w + first * t.channel_stride + r * t.row_stride + s * t.tap_stride;
        if (t.channel_stride == 1 && block % kProductLanes == 0) {
          for (int64_t i = 0; i < block; i += kProductLanes) {
            for (int64_t column = 0; column < t.columns; column += kProductLanes) {
              transpose(tap + i * kPanelColumns + column, kPanelColumns,
                        w + column * t.column_stride + i, t.column_stride);
            }
          }
          continue;
        }
        for (int64_t column = 0; column < t.columns; ++column) {
          for (int64_t i = 0; i < block; ++i) {
            w[column * t.column_stride + i * t.channel_stride] = tap[i * kPanelColumns + column];
          }
        }
      }
    }
  }
}

// How a residual joins the result.
constexpr int kNone = 0, kBeforeAct = 1, kAfterAct = 2;

// One tile. kWhole: all of it is in the image; otherwise so many rows and columns, from `first` on.
template <int kForm, int kResidual, bool kRelu, bool kWhole>
RESFAST_INLINE void tile_from_points(const WinogradOutput& t, const float* m, int64_t first,
                                     int rows, int columns) {
  constexpr int kTile = kWinogradForms[kForm].tile, kSide = kWinogradForms[kForm].points;
  const int64_t row_stride = t.grid.q * t.out_channels;
  for (int64_t c = 0; c < t.channels; c += kProductLanes) {
    if (kResidual != kNone) {  // what comes next, from memory meanwhile
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
          __builtin_prefetch(t.residual + first + i * row_stride + j * t.out_channels + c +
                             kProductLanes);
        }
      }
    }
    FloatVec lines[kSide][kTile];  // by column of points, then output row
#pragma GCC unroll 8
    for (int j = 0; j < kSide; ++j) {
      FloatVec p[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        p[i] = load_raw<FloatVec>(m + (i * kSide + j) * t.point_stride + c);
      }
      from_points<kForm>(p, lines[j]);
    }
    FloatVec scale = splat(1.0f), shift{};
    if (t.scale) {
      scale = load_raw<FloatVec>(t.scale + c);
      shift = load_raw<FloatVec>(t.shift + c);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      if (!kWhole && i >= rows) break;
      FloatVec p[kSide], y[kTile];
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) p[j] = lines[j][i];
      from_points<kForm>(p, y);
      const int64_t line = first + i * row_stride + c;
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        if (!kWhole && j >= columns) break;
        const int64_t place = line + j * t.out_channels;
        FloatVec u = y[j] * scale + shift;
        if (kResidual == kBeforeAct) u += load_raw<FloatVec>(t.residual + place);
        if (kRelu) u = u < 0.0f ? FloatVec{} : u;  // NaN stays
        if (kResidual == kAfterAct) u += load_raw<FloatVec>(t.residual + place);
        store_raw(t.out + place, u);
      }
    }
  }
}

template <int kForm, int kResidual, bool kRelu>
void tiles_from_points(const WinogradOutput& t) {
  constexpr int kTile = kWinogradForms[kForm].tile;
  const TileGrid& g = t.grid;
  for (int64_t tile = t.begin; tile < t.end; ++tile) {
    const TilePlace at(g, tile, kTile);
    const int rows = static_cast<int>(g.p - at.y < kTile ? g.p - at.y : kTile);
    const int columns = static_cast<int>(g.q - at.x < kTile ? g.q - at.x : kTile);
    const int64_t first = ((at.n * g.p + at.y) * g.q + at.x) * t.out_channels;
    const float* m = t.m + (tile - t.begin) * t.channels;
    if (rows == kTile && columns == kTile) {
      tile_from_points<kForm, kResidual, kRelu, true>(t, m, first, kTile, kTile);
    } else {
      tile_from_points<kForm, kResidual, kRelu, false>(t, m, first, rows, columns);
    }
  }
}

template <int kForm>
void winograd_output(const WinogradOutput& t) {
  const auto with_relu = [&](auto residual) {
    constexpr int kResidual = decltype(residual)::value;
    t.relu ? tiles_from_points<kForm, kResidual, true>(t)
           : tiles_from_points<kForm, kResidual, false>(t);
  };
  if (!t.residual) return with_relu(Int<kNone>{});
  t.add_after_act ? with_relu(Int<kAfterAct>{}) : with_relu(Int<kBeforeAct>{});
}

}  // namespace
}  // namespace resfast

#define RESFAST_WINOGRAD_KERNELS                                                      \
  {                                                                                   \
    kProductLanes, kPanelColumns,                                                     \
        {&winograd_weight<kF2>, &winograd_weight<kF4>, &winograd_weight<kF2Stride2>}, \
        {&winograd_input<kF2>, &winograd_input<kF4>, &winograd_input<kF2Stride2>},    \
        {&winograd_output<kF2>, &winograd_output<kF4>, &winograd_output<kF2Stride2>}, \
        &winograd_product, {&winograd_gradient<kF2>, &winograd_gradient<kF4>},        \
        &winograd_correlation, {                                                      \
      &winograd_weight_gradient<kF2>, &winograd_weight_gradient<kF4>                  \
    }                                                                                 \
  }
