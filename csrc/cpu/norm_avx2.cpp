#include "cpu/norm_kernels_impl.h"

namespace resfast {
const NormKernels norm_kernels_avx2 = RESFAST_NORM_KERNELS;
}  // namespace resfast
