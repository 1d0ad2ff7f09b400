#include "cpu/winograd_kernels_impl.h"

namespace resfast {
const WinogradKernels winograd_kernels_avx512 = RESFAST_WINOGRAD_KERNELS;
}  // namespace resfast
