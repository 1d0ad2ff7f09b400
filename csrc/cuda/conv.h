// The convolutions on Hopper's tensor cores as the ops call them: shapes, argument structs and
// launchers. No CUDA, CUTLASS or torch header.
//
// Activations are [n, h, w, c] in memory, filters [k, r, s, c]. Every launcher returns null or what
// went wrong.
#pragma once

#include <cstdint>

#include "cuda/norm.h"

namespace resfast::cuda {

// One dimension of a convolution's window on its input.
struct Axis {
  int64_t size, window, stride, padding, dilation;

  int64_t reach() const { return dilation * (window - 1); }
  int64_t out() const {
    const int64_t room = size + 2 * padding - reach() - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
  bool is_plain() const { return window == 1 && stride == 1 && padding == 0; }
};

struct ConvShape {
  int64_t n, c, k;
  Axis h, w;

  int64_t pixels() const { return n * h.out() * w.out(); }
  // A plain product: pixels by channels times channels by filters.
  bool is_pointwise() const { return h.is_plain() && w.is_plain(); }
};

// Why the kernels do not take a convolution, or null. The tensor memory accelerator's im2col mode
// has a tap's offset in 8 bits and a bounding box's corners in 8 bits with sign; it steps by 8
// pixels at most (CUDA driver API, cuTensorMapEncodeIm2col). Rows start at multiples of 16 bytes.
inline const char* conv_unsupported(const ConvShape& a) {
  if (a.c < 8 || a.c % 8 != 0 || a.k % 8 != 0) return "channels must be multiples of 8";
  if (a.n * a.h.size * a.w.size > INT32_MAX || a.pixels() > INT32_MAX) {
    return "pixels are counted in 32 bits";
  }
  if (a.is_pointwise()) return nullptr;
  for (const Axis& axis : {a.h, a.w}) {
    if (axis.stride > 8) return "strides must be at most 8";
    if (axis.padding > 127) return "padding must be at most 127";
    if (axis.reach() > 254) return "dilated filters must span at most 255 pixels";
    if (axis.reach() - axis.padding > 128) return "windows must reach at most 128 past the padding";
  }
  return nullptr;
}

// Pixels by output channels of one block.
struct ConvTile {
  int64_t m, n;
};
inline constexpr ConvTile kConvTiles[] = {{128, 128}, {128, 64}, {64, 64}};

inline bool is_conv_tile(const ConvTile& tile) {
  for (const ConvTile& known : kConvTiles) {
    if (known.m == tile.m && known.n == tile.n) return true;
  }
  return false;
}

struct ConvAffine {
  ConvShape shape;
  ConvTile tile;
  int processors;  // 0: launch nothing, only say whether CUTLASS takes the size
  const void* x;
  const void* weight;
  Affine affine;
  const void* residual;  // optional
  bool relu, add_after_act;
  void* y;
};
const char* conv_affine(const Launch& launch, const ConvAffine& arguments);

// Statistics are of this many pixels each, the last ones of what is left.
inline constexpr int64_t kConvStatsRows = 64;

struct ConvStats {
  ConvShape shape;
  ConvTile tile;
  int processors;
  const void* x;
  const void* weight;
  void* z;
  float* mean;  // [tiles, k] each, of z as stored
  float* m2;
};
const char* conv_stats(const Launch& launch, const ConvStats& arguments);

}  // namespace resfast::cuda
