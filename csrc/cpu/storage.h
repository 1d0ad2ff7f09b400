// A run-time Storage to the storage type of a kernel template. For kernel sources, like vec.h.
#pragma once

#include "cpu/norm_kernels.h"
#include "cpu/vec.h"

namespace resfast {
namespace {

template <class Kernel>
RESFAST_INLINE void by_storage(Storage storage, const Kernel& kernel) {
  switch (storage) {
    case Storage::f32:
      return kernel(float{});
    case Storage::bf16:
      return kernel(BFloat16{});
    case Storage::f16:
      return kernel(Half{});
    case Storage::f64:
      return kernel(double{});
  }
}

}  // namespace
}  // namespace resfast
