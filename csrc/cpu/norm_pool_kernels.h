// What norm_pool.cpp asks of the per-ISA kernels of normalise + ReLU + max-pool. Plain structs
// only, as in norm_kernels.h. Pointers address whole tensors; a tile is a range of lines, a line
// being one row of pixels: line / height is the sample, line % height the row in it.
#pragma once

#include <cstdint>

#include "cpu/norm_kernels.h"

namespace resfast {

constexpr int64_t kMaxPoolKernel = 16;  // taps fit a byte

struct PoolShape {
  int64_t height, width, out_height, out_width, channels;
  int64_t kernel, stride, padding;
};

struct PoolApplyTile {
  PoolShape shape;
  int64_t begin, end;  // output lines
  const void *z, *mean, *scale, *beta;
  void* out;
  uint8_t* index;  // or nullptr
};

struct MaxPoolTile {
  PoolShape shape;
  int64_t begin, end;  // output lines
  const void* z;
  void* out;
};

struct PoolBackwardReduceTile {
  PoolShape shape;
  int64_t begin, end;  // output lines
  const void *dy, *z, *mean, *scale, *beta;
  const uint8_t* index;
  void *sum, *product;  // acc_t: Σdu, Σdu·(z - mean)
};

struct PoolBackwardApplyTile {
  PoolShape shape;
  int64_t begin, end;  // input lines
  const void *dy, *z, *mean, *scale, *beta;
  const uint8_t* index;
  const void *coef_z, *coef_1;  // or nullptr
  void* dz;
};

struct NormPoolKernels {
  void (*apply)(Storage, const PoolApplyTile&);
  void (*max)(Storage, const MaxPoolTile&);
  void (*backward_reduce)(Storage, const PoolBackwardReduceTile&);
  void (*backward_apply)(Storage, const PoolBackwardApplyTile&);
};

extern const NormPoolKernels norm_pool_kernels_scalar;
extern const NormPoolKernels norm_pool_kernels_avx2;
extern const NormPoolKernels norm_pool_kernels_avx512;

}  // namespace resfast
