// What pointwise.cpp asks of the per-ISA 1×1 convolution kernels. Plain structs only (see
// norm_kernels.h).
#pragma once

#include <cstdint>

namespace resfast {

// out[row][column] = act(Σ over channels x[row][channel]·u[channel][column] + shift[column] +
// residual[row][column]) of some rows and of panels of columns.
struct PointwiseTile {
  int64_t rows, channels;
  int64_t columns;  // a multiple of the lanes
  const float* x;
  int64_t x_stride;
  const float* u;         // [panel][channel][PointwiseKernels::columns]
  const float* shift;     // or nullptr
  const float* residual;  // rows `out_stride` apart, or nullptr; may be out
  bool relu;
  float* out;
  int64_t out_stride;
};

// sums[k][column] (+)= Σ over rows d[row][k]·x[row][column], of one panel of columns.
struct PointwiseCorrelation {
  int64_t rows, channels;  // channels: of d
  int64_t columns;         // of x, a multiple of the lanes
  const float* d;          // as pack_blocks packs it
  int64_t block_stride;
  const float* x;  // rows PointwiseKernels::columns apart
  float* sums;
  int64_t sum_stride;
  bool add;
};

struct PointwiseKernels {
  int lanes;
  int columns;  // of a full panel
  void (*product)(const PointwiseTile&);
  // to[channel][columns] of from[column·column_stride + channel·channel_stride], times factors
  void (*pack)(const float* from, int64_t column_stride, int64_t channel_stride, int64_t columns,
               int64_t channels, const float* factors, float* to);
  int block_channels;  // at most
  // d [rows][channels] in blocks of channels, each [rows][channels of the block]
  void (*pack_blocks)(const float* d, int64_t d_stride, int64_t rows, int64_t channels,
                      int64_t block_stride, float* to);
  void (*correlation)(const PointwiseCorrelation&);
};

extern const PointwiseKernels pointwise_kernels_scalar;
extern const PointwiseKernels pointwise_kernels_avx2;
extern const PointwiseKernels pointwise_kernels_avx512;

}  // namespace resfast
