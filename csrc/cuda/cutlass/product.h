// Pixels by channels times channels by filters: TMA loads, WGMMA multiplies; blocks stay for all
// their tiles, and of two warp groups one computes while the other stores (ping-pong).
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/cutlass/launch.h"
#include "cuda/cutlass/visitors.h"

namespace resfast::cuda {

template <class T, class Source, class Tile, class Tree>
struct Product {
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Rows = cutlass::layout::RowMajor;
  using Columns = cutlass::layout::ColumnMajor;
  static constexpr int kAlignment = 8;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Rows, kAlignment, T,
      Rows, kAlignment, cutlass::epilogue::TmaWarpSpecialized, Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, Rows, kAlignment, T, Columns,
      kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  // `thread`: the tree's arguments.
  static const char* run(const ConvShape& shape, int processors, const void* x, const void* weight,
                         const void* source, void* out,
                         const typename Epilogue::FusionCallbacks::Arguments& thread,
                         void* stream) {
    const typename Epilogue::StrideD stride{shape.k, {}, 0};
    typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(shape.pixels()), static_cast<int>(shape.k), static_cast<int>(shape.c), 1},
        {static_cast<const T*>(x),
         {shape.c, {}, 0},
         static_cast<const T*>(weight),
         {shape.c, {}, 0}},
        {thread, static_cast<const T*>(source), stride, static_cast<T*>(out), stride}};
    arguments.hw_info.sm_count = processors;
    return launch_kernel<Kernel>(arguments, processors, stream);
  }
};

}  // namespace resfast::cuda
