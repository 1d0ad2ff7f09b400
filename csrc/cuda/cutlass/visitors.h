// Nodes of CUTLASS's epilogue visitor trees: what happens to the accumulators on their way out.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <type_traits>

#include "cuda/conv_epilogue.h"

namespace resfast::cuda {

namespace fusion = cutlass::epilogue::fusion;

// ---- y = act(affine(z) + r) or act(affine(z)) + r

// CUTLASS reads Arguments off the scalar form and calls the array form.
template <class T>
struct Finishing {
  using Arguments = Finish;
};

template <class V, int kSize>
struct Finishing<cutlass::Array<V, kSize>> {
  using Arguments = Finish;
  using Fragment = cutlass::Array<V, kSize>;

  CUTLASS_DEVICE Fragment operator()(const Fragment& z, const Fragment& mean, const Fragment& scale,
                                     const Fragment& beta, const Finish& f) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) y[i] = finish(z[i], mean[i], scale[i], beta[i], f);
    return y;
  }

  CUTLASS_DEVICE Fragment operator()(const Fragment& z, const Fragment& mean, const Fragment& scale,
                                     const Fragment& beta, const Fragment& residual,
                                     const Finish& f) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) {
      y[i] = finish(z[i], mean[i], scale[i], beta[i], residual[i], f);
    }
    return y;
  }
};

template <class Tile>
using ChannelVector =
    fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>, 4,
                             /*EnableNullptr=*/false>;

template <class T>
using FinishingNode =
    fusion::Sm90Compute<Finishing, T, float, cutlass::FloatRoundStyle::round_to_nearest>;

// `Tile`: pixels by output channels by depth of a block.
template <class T, bool kResidual, class Tile>
using AffineTree = std::conditional_t<
    kResidual,
    fusion::Sm90EVT<FinishingNode<T>, fusion::Sm90AccFetch, ChannelVector<Tile>,
                    ChannelVector<Tile>, ChannelVector<Tile>, fusion::Sm90SrcFetch<T>>,
    fusion::Sm90EVT<FinishingNode<T>, fusion::Sm90AccFetch, ChannelVector<Tile>,
                    ChannelVector<Tile>, ChannelVector<Tile>>>;

// ---- z, and the statistics of z as stored

// Mean and M2 of every channel over each of the epilogue's subtiles. A subtile lies in shared
// memory for that, where a thread takes a piece of a column; then columns are joined.
template <class T, int kTileRows>
struct TileStatistics {
  static constexpr int kColumns = kStagedColumns;
  static constexpr int kThreads = 128;
  static constexpr int kGroups = kThreads / kColumns;
  static constexpr int kRows = kTileRows / kGroups;

  struct SharedStorage {
    float mean[kGroups][kColumns];
    float m2[kGroups][kColumns];
  };

  struct Arguments {
    float* mean;  // [tiles, channels] each
    float* m2;
  };
  struct Params {
    float* mean;
    float* m2;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& a, void*) {
    return {a.mean, a.m2};
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE TileStatistics() {}
  CUTLASS_HOST_DEVICE TileStatistics(const Params& p, const SharedStorage& storage)
      : params(p), shared(const_cast<SharedStorage*>(&storage)) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const fusion::detail::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;    // of the thread's values, from its first
    int row, column;            // of its first value, in the block's tile
    int rows_left, first_tile;  // from the block's first pixel on
    int columns_left, channel;  // from its first channel on
    int channels, thread;
    Params params;
    SharedStorage* shared;

    CUTLASS_DEVICE Callbacks(Coordinates c) : coordinates(c) {}

    template <class Acc, class V, int kSize>
    CUTLASS_DEVICE cutlass::Array<T, kSize> visit(const cutlass::Array<Acc, kSize>&, int, int, int,
                                                  const cutlass::Array<V, kSize>& z) {
      return cutlass::NumericArrayConverter<T, V, kSize>{}(z);
    }

    template <class Buffer, class Sync, class Results>
    CUTLASS_DEVICE void reduce(Buffer&& buffer, const Sync& sync, int epi_m, int epi_n, bool,
                               const Results& results) {
      static_assert(decltype(cute::size(buffer))::value == kTileRows * kColumns,
                    "subtiles have another shape");
      T* const tile = cute::raw_pointer_cast(buffer.data());
      const int first_row = epi_m * kTileRows, first_column = epi_n * kColumns;
      const auto at = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      constexpr int kSize = decltype(cute::size(at))::value;
      constexpr int kFragment = Results::value_type::kElements;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const int r = row + cute::get<0>(at(i)) - first_row;
        const int c = column + cute::get<1>(at(i)) - first_column;
        tile[staged(r, c)] = results(i / kFragment)[i % kFragment];
      }
      sync();
      const int count = rows_left - first_row;
      const int c = thread % kColumns, group = thread / kColumns;
      float values[kRows];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        values[i] = static_cast<float>(tile[staged(group * kRows + i, c)]);
      }
      column_moments(values, count - group * kRows, shared->mean[group][c], shared->m2[group][c]);
      sync();  // also: nobody reads the tile any more
      if (thread >= kColumns || count <= 0 || first_column + c >= columns_left) return;
      float means[kGroups], m2s[kGroups];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kGroups; ++i) {
        means[i] = shared->mean[i][c];
        m2s[i] = shared->m2[i][c];
      }
      float mean, m2;
      join_columns<kRows>(means, m2s, count, mean, m2);
      const int64_t o =
          static_cast<int64_t>(first_tile + epi_m) * channels + channel + first_column + c;
      params.mean[o] = mean;
      params.m2[o] = m2;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& a) {
    using Epilogue = fusion::detail::ConsumerStoreArgs<Args...>;
    static_assert(decltype(cute::size(a.tiled_copy))::value == kThreads);
    static_assert(decltype(cute::size<0>(a.epi_tile))::value == kTileRows);
    static_assert(decltype(cute::size<1>(a.epi_tile))::value == kColumns);
    Callbacks<decltype(Epilogue::tCcD)> callbacks(a.tCcD);
    const int pixels = cute::size<0>(a.problem_shape_mnkl);
    callbacks.channels = cute::size<1>(a.problem_shape_mnkl);
    callbacks.rows_left = cute::get<0>(a.residue_cD);
    callbacks.columns_left = cute::get<1>(a.residue_cD);
    callbacks.first_tile = (pixels - callbacks.rows_left) / kTileRows;
    callbacks.channel = callbacks.channels - callbacks.columns_left;
    callbacks.row = callbacks.rows_left - cute::get<0>(a.residue_tCcD);
    callbacks.column = callbacks.columns_left - cute::get<1>(a.residue_tCcD);
    callbacks.thread = a.thread_idx;
    callbacks.params = params;
    callbacks.shared = shared;
    return callbacks;
  }

  Params params;
  SharedStorage* shared = nullptr;
};

template <class T, int kTileRows>
using StatisticsTree = fusion::Sm90EVT<TileStatistics<T, kTileRows>, fusion::Sm90AccFetch>;

}  // namespace resfast::cuda
