#include "cpu/direct_kernels_impl.h"

namespace resfast {
const DirectKernels direct_kernels_avx2 = RESFAST_DIRECT_KERNELS;
}  // namespace resfast
