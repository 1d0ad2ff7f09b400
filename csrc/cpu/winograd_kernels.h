// What winograd.cpp asks of the per-ISA Winograd kernels. Plain structs only (see norm_kernels.h).
//
// F(m×m, 3×3), stride 1 (Winograd 1980; Lavin and Gray 2016): the output is cut into tiles of m×m,
// each from (m + 2)² inputs. Both are taken to (m + 2)² points; at each point the convolution is a
// matrix product V·U over the channels, V [tiles, C], U [C, K].
//
// At stride 2 a line of three taps is one of two, F(2, 2), on the inputs at even places, and one of
// a single tap, which nothing makes cheaper, on those at odd places: 3 + 2 points for 2 outputs.
#pragma once

#include <cstdint>

namespace resfast {

// Along a side: outputs of a tile, inputs from one output to the next, points, which are as many as
// a tile's inputs, and filters: the last points' products may take the same one.
struct WinogradForm {
  int tile, stride, points, filters;
};

enum { kF2, kF4, kF2Stride2, kForms };
constexpr WinogradForm kWinogradForms[kForms] = {{2, 1, 4, 4}, {4, 1, 6, 6}, {2, 2, 5, 4}};

// The filters of one panel of columns and of some channels at the points.
struct WinogradWeight {
  int64_t channels;
  int64_t columns;  // of the panel that exist; the rest is set to 0
  const float* w;   // the first column, the first channel, tap (0, 0)
  int64_t column_stride, channel_stride, row_stride, tap_stride;
  float* u;  // [channel][WinogradKernels::columns], points `point_stride` apart
  int64_t point_stride;
};

// Tiles of an NHWC activation of padded 3×3 convolution, counted over n, row, column.
struct TileGrid {
  int64_t h, w;           // of the input
  int64_t p, q;           // of the output
  int64_t rows, columns;  // of tiles in one image
};

struct WinogradInput {
  TileGrid grid;
  int64_t begin, end;  // tiles
  int64_t channels;
  const float* x;      // the whole activation
  const float* zeros;  // a tile's side of pixels of all channels
  float* v;            // [points][tile][channel], points `point_stride` apart
  int64_t point_stride;
  // Of so many channels, a multiple of the lanes, next to each other: parts `part_stride` apart.
  int64_t part, part_stride;
};

// m[tile][column] (+)= Σ over channels v[tile][channel]·u[channel][column], of up to a panel of
// columns.
struct WinogradProduct {
  int64_t tiles, channels;
  int64_t chain;    // channels whose sum is added up apart
  int64_t columns;  // a multiple of the lanes
  const float* v;
  int64_t v_stride;
  const float* u;  // rows WinogradKernels::columns apart
  float* m;
  int64_t m_stride;
  bool add;
};

// sums[channel][column] (+)= Σ over tiles v[tile][channel]·d[tile][column], of up to a panel of
// columns.
struct WinogradCorrelation {
  int64_t tiles, channels;
  int64_t columns;  // a multiple of the lanes
  const float* v;
  int64_t v_stride;
  const float* d;
  int64_t d_stride;
  float* sums;
  int64_t sum_stride;
  bool add;
};

// The 3×3 gradient of filters from that of their points, of some channels and of up to a panel of
// columns.
struct WinogradWeightGradient {
  int64_t channels;
  int64_t columns;    // a multiple of the lanes
  const float* sums;  // the first channel, the first column
  int64_t sum_stride, point_stride;
  float* w;  // the first column, the first channel, tap (0, 0)
  int64_t column_stride, channel_stride, row_stride, tap_stride;
};

struct WinogradOutput {
  TileGrid grid;
  int64_t begin, end;  // tiles
  int64_t channels;    // of m
  const float* m;      // [points][end - begin][channels]
  int64_t point_stride;
  const float *scale, *shift;  // per channel, both or neither
  const float* residual;       // like out, or nullptr
  bool relu, add_after_act;
  float* out;  // the whole activation, from m's first channel on
  int64_t out_channels;
};

struct WinogradKernels {
  int lanes;
  int columns;  // of a full panel
  // by form
  void (*weight[kForms])(const WinogradWeight&);
  void (*input[kForms])(const WinogradInput&);
  void (*output[kForms])(const WinogradOutput&);
  void (*product)(const WinogradProduct&);
  // by form of stride 1
  void (*gradient[2])(const WinogradInput&);  // of the output, to the points
  void (*correlation)(const WinogradCorrelation&);
  void (*weight_gradient[2])(const WinogradWeightGradient&);
};

extern const WinogradKernels winograd_kernels_scalar;
extern const WinogradKernels winograd_kernels_avx2;
extern const WinogradKernels winograd_kernels_avx512;

}  // namespace resfast
