// The two kinds of kernels behind the launchers of cuda/conv.h.
#pragma once

#include "cuda/conv.h"

namespace resfast::cuda {

const char* implicit_gemm_affine(const Launch& launch, const ConvAffine& arguments);
const char* implicit_gemm_stats(const Launch& launch, const ConvStats& arguments);
const char* product_affine(const Launch& launch, const ConvAffine& arguments);
const char* product_stats(const Launch& launch, const ConvStats& arguments);

}  // namespace resfast::cuda
