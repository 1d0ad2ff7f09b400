// What norm.cpp asks of the per-ISA norm kernels. A tile is a range of rows of a strip of channels
// of an NHWC activation; its pointers address the first element, `stride` is the distance of two
// rows in elements, and per-channel pointers address the strip's first channel. Plain structs
// only: a function defined here would be compiled once per instruction set under one name.
#pragma once

#include <cstdint>

namespace resfast {

enum class Storage { f32, bf16, f16, f64 };

struct StatsTile {
  int64_t rows, channels, stride;
  const void* z;
  void *pilot, *sum, *square;  // acc_t: a guess of the mean, Σ(z - pilot), Σ(z - pilot)²
};

struct ApplyTile {
  int64_t rows, channels, stride;
  const void *z, *mean, *scale, *beta;
  const void *residual, *residual_mean, *residual_scale, *residual_beta;  // or nullptr
  bool relu, add_after_act;
  void* out;
};

enum class Mask { none, from_y, recompute };

struct BackwardReduceTile {
  int64_t rows, channels, stride;
  Mask mask;
  bool relu;  // of `activation`
  const void *dy, *z, *y, *mean, *scale, *beta;
  void *sum, *product;  // acc_t: Σdu, Σdu·(z - mean)
  void* activation;     // or nullptr
};

struct BackwardApplyTile {
  int64_t rows, channels, stride;
  Mask mask;
  const void *dy, *z, *y, *mean, *scale, *beta;
  const void *coef_z, *coef_1;  // or nullptr
  void* dz;
  void* du;  // or nullptr
};

// Partial results of `tiles` tiles, each `groups` runs of `period` channels (all but the last tile
// have `rows` rows), taken into double accumulators for the channels [begin, end).
struct MergeStats {
  int64_t tiles, groups, period, begin, end, rows, last_rows;
  const void *pilot, *sum, *square;
  double *mean, *m2;
  double count;  // values per channel already in mean and m2
};

struct MergeSums {
  int64_t tiles, groups, period, begin, end;
  const void *sum, *product;
  double *total_sum, *total_product;
};

struct NormKernels {
  void (*stats)(Storage, const StatsTile&);
  void (*apply)(Storage, const ApplyTile&);
  void (*backward_reduce)(Storage, const BackwardReduceTile&);
  void (*backward_apply)(Storage, const BackwardApplyTile&);
  void (*merge_stats)(Storage, const MergeStats&);
  void (*merge_sums)(Storage, const MergeSums&);
  int vector_bytes;
};

extern const NormKernels norm_kernels_scalar;
extern const NormKernels norm_kernels_avx2;
extern const NormKernels norm_kernels_avx512;

}  // namespace resfast
