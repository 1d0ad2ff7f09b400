// The norm kernels, compiled once per instruction set by norm_<isa>.cpp.
//
// Every kernel walks a tile in blocks of rows with the channels innermost: memory is read in
// order, per-channel parameters and sums are fetched once per block, and sums over a block's rows
// are taken as a tree in registers before they are added to the running ones.
#pragma once

#include "cpu/norm_kernels.h"
#include "cpu/storage.h"
#include "cpu/vec.h"
#include "math.h"

namespace resfast {
namespace {

// body(row count as Int, first row, channel, lanes)
template <int kRows, int kLaneCount, class Body>
RESFAST_INLINE void for_each_vector(int64_t rows, int64_t channels, const Body& body) {
  const int64_t whole = channels / kLaneCount * kLaneCount;
  const Partial rest{static_cast<int>(channels - whole)};
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    for (int64_t c = 0; c < whole; c += kLaneCount) body(Int<kRows>{}, row, c, Full{});
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < whole; c += kLaneCount) body(Int<1>{}, row, c, Full{});
  }
  if (!rest.count) return;
  for (row = 0; row < rows; ++row) body(Int<1>{}, row, whole, rest);
}

template <class A>
void zero(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = A{};
}

// Sum of N vectors as a tree.
template <int N, class V>
RESFAST_INLINE V tree_sum(V* v) {
#pragma GCC unroll 8
  for (int width = N / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

// ---- statistics

template <class S>
void stats(const StatsTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  constexpr int kRows = 8;
  const S* z = static_cast<const S*>(t.z);
  A* pilot = static_cast<A*>(t.pilot);
  A* sum = static_cast<A*>(t.sum);
  A* square = static_cast<A*>(t.square);

  // The pilot is the mean of the tile's first eighth, summed as differences to the first row: exact
  // in a constant channel, and small beside a large mean. Rows far from the rest there cost at most
  // three bits of Σ(z - pilot)² - (Σ(z - pilot))²/n, for they are an eighth of the variance too.
  const int64_t sample = t.rows < 64 ? (t.rows < 8 ? t.rows : 8) : t.rows / 8;
  zero(sum, t.channels);
  for_each_vector<kRows, kLanes<S>>(
      sample, t.channels, [&](auto r, int64_t row, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(r)::value;
        const V first = load(z + c, lanes);
        V d[kCount];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) d[i] = load(z + (row + i) * t.stride + c, lanes) - first;
        store(sum + c, load(sum + c, lanes) + tree_sum<kCount>(d), lanes);
      });
  const A inverse = A(1) / static_cast<A>(sample);
  for_each_vector<1, kLanes<S>>(
      1, t.channels, [&](auto, int64_t, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        store(pilot + c, load(z + c, lanes) + load(sum + c, lanes) * inverse, lanes);
      });

  zero(sum, t.channels);
  zero(square, t.channels);
  for_each_vector<kRows, kLanes<S>>(
      t.rows, t.channels, [&](auto r, int64_t row, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(r)::value;
        const V p = load(pilot + c, lanes);
        V d[kCount];
        V q[kCount];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          d[i] = load(z + (row + i) * t.stride + c, lanes) - p;
          q[i] = d[i] * d[i];
        }
        store(sum + c, load(sum + c, lanes) + tree_sum<kCount>(d), lanes);
        store(square + c, load(square + c, lanes) + tree_sum<kCount>(q), lanes);
      });
}

// Channels are merged in blocks whose state stays in L1.
constexpr int64_t kMergeBlock = 64;

template <class A>
void merge_stats(const MergeStats& m) {
  const A* pilot = static_cast<const A*>(m.pilot);
  const A* sum = static_cast<const A*>(m.sum);
  const A* square = static_cast<const A*>(m.square);
  for (int64_t begin = m.begin; begin < m.end; begin += kMergeBlock) {
    const int64_t size = m.end - begin < kMergeBlock ? m.end - begin : kMergeBlock;
    double mean[kMergeBlock];
    double m2[kMergeBlock];
    for (int64_t i = 0; i < size; ++i) mean[i] = m.mean[begin + i];
    for (int64_t i = 0; i < size; ++i) m2[i] = m.m2[begin + i];
    double count = m.count;
    for (int64_t run = 0; run < m.tiles * m.groups; ++run) {
      const double rows = static_cast<double>(run / m.groups == m.tiles - 1 ? m.last_rows : m.rows);
      const double inverse = 1 / rows;
      const double weight = rows / (count + rows);
      const int64_t offset = run * m.period + begin;
      for (int64_t i = 0; i < size; ++i) {
        const double shift = sum[offset + i] * inverse;
        const double m2_run = square[offset + i] - shift * sum[offset + i];
        merge_moments(mean[i], m2[i], count, pilot[offset + i] + shift, m2_run < 0 ? 0.0 : m2_run,
                      weight);
      }
      count += rows;
    }
    for (int64_t i = 0; i < size; ++i) m.mean[begin + i] = mean[i];
    for (int64_t i = 0; i < size; ++i) m.m2[begin + i] = m2[i];
  }
}

// ---- apply

enum class Residual { none, raw, affine };

template <class S, bool RELU, Residual RESIDUAL, bool ADD_AFTER_ACT>
void apply(const ApplyTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  constexpr int kRows = 4;
  const S* z = static_cast<const S*>(t.z);
  const S* residual = static_cast<const S*>(t.residual);
  S* out = static_cast<S*>(t.out);
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  const A* residual_mean = static_cast<const A*>(t.residual_mean);
  const A* residual_scale = static_cast<const A*>(t.residual_scale);
  const A* residual_beta = static_cast<const A*>(t.residual_beta);

  for_each_vector<kRows, kLanes<S>>(
      t.rows, t.channels, [&](auto r, int64_t row, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(r)::value;
        const V m = load(mean + c, lanes);
        const V s = load(scale + c, lanes);
        const V b = load(beta + c, lanes);
        V rm{}, rs{}, rb{};
        if constexpr (RESIDUAL == Residual::affine) {
          rm = load(residual_mean + c, lanes);
          rs = load(residual_scale + c, lanes);
          rb = load(residual_beta + c, lanes);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          const int64_t at = (row + i) * t.stride + c;
          V v = affine(load(z + at, lanes), m, s, b);
          if constexpr (RELU && ADD_AFTER_ACT) v = relu(v);
          if constexpr (RESIDUAL == Residual::raw) v += load(residual + at, lanes);
          if constexpr (RESIDUAL == Residual::affine) {
            v += affine(load(residual + at, lanes), rm, rs, rb);
          }
          if constexpr (RELU && !ADD_AFTER_ACT) v = relu(v);
          store(out + at, v, lanes);
        }
      });
}

// ---- backward

template <class S, Mask MASK, class Lanes>
RESFAST_INLINE Vec<S> masked(Vec<S> dy, const S* y, Vec<S> u, Lanes lanes) {
  if constexpr (MASK == Mask::from_y) return relu_backward(dy, load(y, lanes));
  if constexpr (MASK == Mask::recompute) return relu_backward(dy, u);
  return dy;
}

template <class S, Mask MASK, bool HAS_ACTIVATION>
void backward_reduce(const BackwardReduceTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  constexpr int kRows = 4;
  constexpr bool kNeedsU = HAS_ACTIVATION || MASK == Mask::recompute;
  const S* dy = static_cast<const S*>(t.dy);
  const S* z = static_cast<const S*>(t.z);
  const S* y = static_cast<const S*>(t.y);
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  A* sum = static_cast<A*>(t.sum);
  A* product = static_cast<A*>(t.product);
  S* activation = static_cast<S*>(t.activation);
  const bool with_relu = t.relu;

  zero(sum, t.channels);
  zero(product, t.channels);
  for_each_vector<kRows, kLanes<S>>(
      t.rows, t.channels, [&](auto r, int64_t row, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(r)::value;
        const V m = load(mean + c, lanes);
        V s{}, b{};
        if constexpr (kNeedsU) {
          s = load(scale + c, lanes);
          b = load(beta + c, lanes);
        }
        V du[kCount];
        V dux[kCount];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          const int64_t at = (row + i) * t.stride + c;
          const V zi = load(z + at, lanes);
          V u{};
          if constexpr (kNeedsU) u = affine(zi, m, s, b);
          du[i] = masked<S, MASK>(load(dy + at, lanes), y + at, u, lanes);
          dux[i] = du[i] * (zi - m);
          if constexpr (HAS_ACTIVATION) store(activation + at, with_relu ? relu(u) : u, lanes);
        }
        store(sum + c, load(sum + c, lanes) + tree_sum<kCount>(du), lanes);
        store(product + c, load(product + c, lanes) + tree_sum<kCount>(dux), lanes);
      });
}

template <class A>
void merge_sums(const MergeSums& m) {
  const A* sum = static_cast<const A*>(m.sum);
  const A* product = static_cast<const A*>(m.product);
  for (int64_t begin = m.begin; begin < m.end; begin += kMergeBlock) {
    const int64_t size = m.end - begin < kMergeBlock ? m.end - begin : kMergeBlock;
    double total_sum[kMergeBlock];
    double total_product[kMergeBlock];
    for (int64_t i = 0; i < size; ++i) total_sum[i] = m.total_sum[begin + i];
    for (int64_t i = 0; i < size; ++i) total_product[i] = m.total_product[begin + i];
    for (int64_t run = 0; run < m.tiles * m.groups; ++run) {
      const int64_t offset = run * m.period + begin;
      for (int64_t i = 0; i < size; ++i) total_sum[i] += sum[offset + i];
      for (int64_t i = 0; i < size; ++i) total_product[i] += product[offset + i];
    }
    for (int64_t i = 0; i < size; ++i) m.total_sum[begin + i] = total_sum[i];
    for (int64_t i = 0; i < size; ++i) m.total_product[begin + i] = total_product[i];
  }
}

template <class S, Mask MASK, bool HAS_COEF_Z, bool HAS_COEF_1>
void backward_apply(const BackwardApplyTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  constexpr int kRows = 4;
  constexpr bool kNeedsZ = HAS_COEF_Z || MASK == Mask::recompute;
  const S* dy = static_cast<const S*>(t.dy);
  const S* z = static_cast<const S*>(t.z);
  const S* y = static_cast<const S*>(t.y);
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  const A* coef_z = static_cast<const A*>(t.coef_z);
  const A* coef_1 = static_cast<const A*>(t.coef_1);
  S* dz = static_cast<S*>(t.dz);
  S* du = static_cast<S*>(t.du);

  for_each_vector<kRows, kLanes<S>>(
      t.rows, t.channels, [&](auto r, int64_t row, int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(r)::value;
        const V s = load(scale + c, lanes);
        V m{}, b{}, cz{}, c1{};
        if constexpr (kNeedsZ) m = load(mean + c, lanes);
        if constexpr (MASK == Mask::recompute) b = load(beta + c, lanes);
        if constexpr (HAS_COEF_Z) cz = load(coef_z + c, lanes);
        if constexpr (HAS_COEF_1) c1 = load(coef_1 + c, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          const int64_t at = (row + i) * t.stride + c;
          V zi{}, u{};
          if constexpr (kNeedsZ) zi = load(z + at, lanes);
          if constexpr (MASK == Mask::recompute) u = affine(zi, m, s, b);
          const V g = masked<S, MASK>(load(dy + at, lanes), y + at, u, lanes);
          V v = s * g;
          if constexpr (HAS_COEF_1) v += c1;
          if constexpr (HAS_COEF_Z) v += cz * (zi - m);
          store(dz + at, v, lanes);
          if (du) store(du + at, g, lanes);
        }
      });
}

// ---- run-time arguments to template arguments

template <class S, bool RELU, Residual RESIDUAL>
void apply(const ApplyTile& t) {
  t.add_after_act ? apply<S, RELU, RESIDUAL, true>(t) : apply<S, RELU, RESIDUAL, false>(t);
}

template <class S, bool RELU>
void apply(const ApplyTile& t) {
  if (!t.residual) return apply<S, RELU, Residual::none, false>(t);
  t.residual_mean ? apply<S, RELU, Residual::affine>(t) : apply<S, RELU, Residual::raw>(t);
}

template <class S>
void apply(const ApplyTile& t) {
  t.relu ? apply<S, true>(t) : apply<S, false>(t);
}

template <class S, Mask MASK>
void backward_reduce(const BackwardReduceTile& t) {
  t.activation ? backward_reduce<S, MASK, true>(t) : backward_reduce<S, MASK, false>(t);
}

template <class S>
void backward_reduce(const BackwardReduceTile& t) {
  if (t.mask == Mask::none) return backward_reduce<S, Mask::none>(t);
  if (t.mask == Mask::from_y) return backward_reduce<S, Mask::from_y>(t);
  backward_reduce<S, Mask::recompute>(t);
}

template <class S, Mask MASK>
void backward_apply(const BackwardApplyTile& t) {
  if (t.coef_z) {
    t.coef_1 ? backward_apply<S, MASK, true, true>(t) : backward_apply<S, MASK, true, false>(t);
  } else {
    t.coef_1 ? backward_apply<S, MASK, false, true>(t) : backward_apply<S, MASK, false, false>(t);
  }
}

template <class S>
void backward_apply(const BackwardApplyTile& t) {
  if (t.mask == Mask::none) return backward_apply<S, Mask::none>(t);
  if (t.mask == Mask::from_y) return backward_apply<S, Mask::from_y>(t);
  backward_apply<S, Mask::recompute>(t);
}

void stats_tile(Storage storage, const StatsTile& t) {
  by_storage(storage, [&](auto s) { stats<decltype(s)>(t); });
}
void apply_tile(Storage storage, const ApplyTile& t) {
  by_storage(storage, [&](auto s) { apply<decltype(s)>(t); });
}
void backward_reduce_tile(Storage storage, const BackwardReduceTile& t) {
  by_storage(storage, [&](auto s) { backward_reduce<decltype(s)>(t); });
}
void backward_apply_tile(Storage storage, const BackwardApplyTile& t) {
  by_storage(storage, [&](auto s) { backward_apply<decltype(s)>(t); });
}
void merge_stats_tiles(Storage storage, const MergeStats& m) {
  storage == Storage::f64 ? merge_stats<double>(m) : merge_stats<float>(m);
}
void merge_sums_tiles(Storage storage, const MergeSums& m) {
  storage == Storage::f64 ? merge_sums<double>(m) : merge_sums<float>(m);
}

}  // namespace
}  // namespace resfast

#define RESFAST_NORM_KERNELS                                                          \
  {                                                                                   \
      stats_tile,        apply_tile,       backward_reduce_tile, backward_apply_tile, \
      merge_stats_tiles, merge_sums_tiles, kVectorBytes,                              \
  }
