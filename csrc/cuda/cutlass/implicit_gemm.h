// Convolutions as implicit products: TMA gathers the pixels that a tap meets (im2col), WGMMA
// multiplies, one warp group loads while another computes. CUTLASS has no persistent form of it.
#pragma once

// the order matters: CUTLASS 4.2's convolutions do not include what they use
#include <cute/tensor.hpp>

#include <cutlass/kernel_hardware_info.hpp>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "cuda/cutlass/launch.h"
#include "cuda/cutlass/visitors.h"

namespace resfast::cuda {

// Shared memory that is left for a second block on the same multiprocessor: with 64 columns the
// registers allow one, which then loads or computes during the epilogue of the first.
inline constexpr int kHalfOfSharedMemory = 114 * 1024;

template <class T, class Source, class M, class N, class Tree>
struct ImplicitGemm {
  using Tile = cute::Shape<M, N, cute::Shape<cute::_64>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Layout = cutlass::layout::TensorNHWC;
  static constexpr int kAlignment = 8;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Layout, kAlignment, T,
      Layout, kAlignment, cutlass::epilogue::TmaWarpSpecialized, Tree>::CollectiveOp;
  static constexpr int kCarveout = static_cast<int>(sizeof(typename Epilogue::SharedStorage)) +
                                   (N::value <= 64 ? kHalfOfSharedMemory : 0);
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, T,
      Layout, kAlignment, T, Layout, kAlignment, float, Tile, Cluster,
      cutlass::conv::collective::StageCountAutoCarveout<kCarveout>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem = typename Mainloop::ProblemShape;
  using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;

  static Problem problem(const ConvShape& a) {
    const auto both = [&](int64_t Axis::* what) {
      return
          typename Problem::SpatialExtent{static_cast<int>(a.h.*what), static_cast<int>(a.w.*what)};
    };
    const auto extent = [](int64_t n, int64_t h, int64_t w, int64_t c) {
      return typename Problem::TensorExtent{static_cast<int>(n), static_cast<int>(h),
                                            static_cast<int>(w), static_cast<int>(c)};
    };
    return Problem(cutlass::conv::Mode::kCrossCorrelation, extent(a.n, a.h.size, a.w.size, a.c),
                   extent(a.k, a.h.window, a.w.window, a.c), both(&Axis::padding),
                   both(&Axis::padding), both(&Axis::stride), both(&Axis::dilation), 1);
  }

  // `thread`: the tree's arguments.
  static const char* run(const ConvShape& shape, int processors, const void* x, const void* weight,
                         const void* source, void* out,
                         const typename Epilogue::FusionCallbacks::Arguments& thread,
                         void* stream) {
    const Problem p = problem(shape);
    typename Epilogue::StrideD stride{};  // of (q, p, n), channels, nothing
    cute::get<0, 0>(stride) = p.stride_C[2];
    cute::get<0, 1>(stride) = p.stride_C[1];
    cute::get<0, 2>(stride) = p.stride_C[0];
    typename Kernel::Arguments arguments{
        p,
        {static_cast<const T*>(x), static_cast<const T*>(weight)},
        {thread, static_cast<const T*>(source), stride, static_cast<T*>(out), stride}};
    return launch_kernel<Kernel>(arguments, processors, stream);
  }
};

}  // namespace resfast::cuda
