#include "cpu/winograd_kernels_impl.h"

namespace resfast {
const WinogradKernels winograd_kernels_avx2 = RESFAST_WINOGRAD_KERNELS;
}  // namespace resfast
