#include "cpu/pointwise_kernels_impl.h"

namespace resfast {
const PointwiseKernels pointwise_kernels_scalar = RESFAST_POINTWISE_KERNELS;
}  // namespace resfast
