#include "cpu/norm_kernels_impl.h"

namespace resfast {
const NormKernels norm_kernels_avx512 = RESFAST_NORM_KERNELS;
}  // namespace resfast
