#include "cpu/pointwise_kernels_impl.h"

namespace resfast {
const PointwiseKernels pointwise_kernels_avx2 = RESFAST_POINTWISE_KERNELS;
}  // namespace resfast
