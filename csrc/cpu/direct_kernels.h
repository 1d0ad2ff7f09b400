// What direct.cpp asks of the per-ISA kernels of direct convolution. Plain structs only (see
// norm_kernels.h).
#pragma once

#include <cstdint>

namespace resfast {

// Windows of neighbouring pixels, which go to outputs `out_stride` apart. A window is `segments`
// runs of values that lie together in memory: its rows in an NHWC activation.
struct DirectLine {
  const float* x;  // the first window, the first segment, whether that is there or not
  int64_t x_stride, segment_stride;
  int64_t first, last;  // segments [first, last) are there, the others zero
  int64_t windows;
  int64_t out;  // the first window's output, in values from DirectTile::out on
  int64_t out_stride;
};

// out[window][column] = act(Σ over segments and channels x·u + shift[column] + residual).
struct DirectTile {
  const DirectLine* lines;
  int64_t line_count;
  int64_t segments, channels;  // of a window, of a segment
  int64_t columns;             // a multiple of the lanes
  const float* u;              // [panel][segment][channel][DirectKernels::columns]
  const float* shift;          // or nullptr
  const float* residual;       // like out, or nullptr; may be out
  bool relu;
  float* out;
};

struct DirectKernels {
  int lanes;
  int columns;  // of a full panel
  void (*product)(const DirectTile&);
  // to[channel][columns] of from[column·column_stride + channel·channel_stride], times factors
  void (*pack)(const float* from, int64_t column_stride, int64_t channel_stride, int64_t columns,
               int64_t channels, const float* factors, float* to);
};

extern const DirectKernels direct_kernels_scalar;
extern const DirectKernels direct_kernels_avx2;
extern const DirectKernels direct_kernels_avx512;

}  // namespace resfast
