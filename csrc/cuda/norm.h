// The norm kernels as the ops call them: argument structs and launchers. No CUDA or torch header.
//
// An activation is a matrix of m pixels by c channels, rows one after the other. Pointers that a
// struct calls optional may be null. Every launcher returns null or what CUDA says went wrong.
#pragma once

#include <cstdint>

#include "cuda/tiling.h"

namespace resfast::cuda {

enum class Storage { f32, bf16, f16 };

// Where a ReLU's backward reads off what it let through.
enum class Mask { none, recompute, from_y, from_bits };

// What every launch needs besides its operands.
struct Launch {
  Storage storage;
  void* stream;
};

// u = (z - mean) * scale + beta, one value per channel each
struct Affine {
  const float* mean;
  const float* scale;
  const float* beta;
};

struct NormStats {
  int64_t m, c;
  Tiling tiling;
  const void* z;
  float* mean;  // [tiles, c] each
  float* rest;  // what rounding the mean lost
  float* m2;
};
const char* norm_stats(const Launch& launch, const NormStats& arguments);

// A statistic per channel: float, or double for who merges it with others.
struct Statistic {
  void* values;
  bool is_double;
};

struct MergeStats {
  int64_t m, c, tiles, rows;  // rows per tile
  const float* mean;          // [tiles, c] each
  const float* rest;          // optional
  const float* m2;
  Statistic out_mean;
  Statistic out_m2;
};
const char* merge_stats(const Launch& launch, const MergeStats& arguments);

struct MergeSums {
  int64_t c, tiles, kinds;
  const float* sums;  // [kinds, tiles, c]
  float* out;         // [kinds, c]
};
const char* merge_sums(const Launch& launch, const MergeSums& arguments);

struct NormPrepare {
  int64_t c;
  float eps;
  const float* var;
  const float* weight;  // optional
  const float* bias;    // optional
  float* scale;
  float* beta;
  float* rstd;
};
const char* norm_prepare(const Launch& launch, const NormPrepare& arguments);

struct NormCoefficients {
  int64_t c;
  float n;
  const float* scale;
  const float* rstd;
  const float* sum_du;
  const float* sum_du_centred;
  float* sum_du_xhat;
  float* coef_z;
  float* coef_1;
};
const char* norm_coefficients(const Launch& launch, const NormCoefficients& arguments);

struct NormApply {
  int64_t m, c;
  Tiling tiling;
  const void* z;
  Affine affine;
  const void* residual;    // optional
  Affine residual_affine;  // optional
  bool relu, add_after_act;
  void* y;        // may be z or the residual
  uint8_t* mask;  // optional
};
const char* norm_apply(const Launch& launch, const NormApply& arguments);

struct NormBackwardReduce {
  int64_t m, c;
  Tiling tiling;
  const void* dy;
  const void* dy2;  // optional
  const void* z;
  Affine affine;
  Mask mask;
  const void* y;
  const uint8_t* bits;
  bool relu;       // of the activation
  const void* z2;  // optional, with mean2
  const float* mean2;
  void* du;          // optional
  void* activation;  // optional
  float* sums;       // [2, or 3 with z2, tiles, c]
};
const char* norm_backward_reduce(const Launch& launch, const NormBackwardReduce& arguments);

struct NormBackwardApply {
  int64_t m, c;
  Tiling tiling;
  const void* dy;
  const void* z;
  Affine affine;
  Mask mask;
  const void* y;
  const float* coef_z;  // optional
  const float* coef_1;  // optional
  void* dz;
  void* du;        // optional
  const void* z2;  // a second norm with the same du, where dz2 is given
  const float* mean2;
  const float* scale2;
  const float* coef_z2;  // optional
  const float* coef_12;  // optional
  void* dz2;
};
const char* norm_backward_apply(const Launch& launch, const NormBackwardApply& arguments);

struct NormForward {
  int64_t m, c;
  Tiling tiling;
  const void* z;
  const float* weight;  // optional
  const float* bias;    // optional
  float eps;
  const void* residual;  // optional
  bool relu, add_after_act;
  void* y;
  uint8_t* mask;  // optional
  float* mean;
  float* var;
};
const char* norm_forward(const Launch& launch, const NormForward& arguments);

struct NormBackward {
  int64_t m, c;
  Tiling tiling;
  const void* dy;
  const void* dy2;  // optional
  const void* z;
  Affine affine;
  const float* rstd;
  Mask mask;
  const void* y;
  const uint8_t* bits;
  bool relu;  // of the activation
  void* dz;
  void* du;          // optional
  void* activation;  // optional
  float* sum_du;
  float* sum_du_xhat;
};
const char* norm_backward(const Launch& launch, const NormBackward& arguments);

}  // namespace resfast::cuda
