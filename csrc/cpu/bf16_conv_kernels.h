// What bf16_conv.cpp asks of the kernel that multiplies bfloat16 pairs. Plain structs only (see
// norm_kernels.h).
#pragma once

#include <cstdint>

namespace resfast {

// out[row][column] = act((Σ over pairs of x[row]·u[column])·scale[column] + shift[column] +
// residual[row][column]) of some rows and of panels of columns; bfloat16, but for the float32 sums,
// scale and shift.
struct Bf16Tile {
  int64_t rows, pairs;
  int64_t columns;  // a multiple of the lanes
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* u;  // [panel][pair][Bf16Kernels::columns][2]
  float* sums;        // memory: [rows][Bf16Kernels::columns]
  const float *scale, *shift;
  const uint16_t* residual;  // rows `out_stride` apart, or nullptr; may be out
  bool relu;
  uint16_t* out;
  int64_t out_stride;
};

struct Bf16Kernels {
  int lanes;
  int columns;  // of a full panel
  void (*product)(const Bf16Tile&);
};

extern const Bf16Kernels bf16_kernels_avx512bf16;

}  // namespace resfast
