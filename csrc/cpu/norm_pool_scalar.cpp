#include "cpu/norm_pool_kernels_impl.h"

namespace resfast {
const NormPoolKernels norm_pool_kernels_scalar = RESFAST_NORM_POOL_KERNELS;
}  // namespace resfast
