// Normalise + ReLU + max-pool, and max-pool alone, compiled once per instruction set by
// norm_pool_<isa>.cpp. The normalised activation is never stored: windows recompute it from z,
// which is in cache.
#pragma once

#include "cpu/norm_pool_kernels.h"
#include "cpu/storage.h"
#include "cpu/vec.h"
#include "math.h"

namespace resfast {
namespace {

// A range of window or pixel coordinates, [begin, end).
struct Range {
  int64_t begin, end;
};

// Taps of the window of output coordinate `o` that lie inside the input.
RESFAST_INLINE Range taps(int64_t o, int64_t size, const PoolShape& p) {
  const int64_t first = o * p.stride - p.padding;
  const int64_t end = first + p.kernel;
  return {first < 0 ? -first : 0, (end > size ? size : end) - first};
}

// Moves `w` on to the outputs whose windows hold input coordinate `i`; coordinates come in order.
RESFAST_INLINE void advance_windows(Range& w, int64_t i, int64_t out_size, const PoolShape& p) {
  const int64_t at = i + p.padding;
  while (w.begin < out_size && w.begin * p.stride + p.kernel <= at) ++w.begin;
  while (w.end < out_size && w.end * p.stride <= at) ++w.end;
}

template <class S>
RESFAST_INLINE IndexVec<S> every_lane(int64_t value) {
  return IndexVec<S>{} + static_cast<IndexLane<S>>(value);
}

// body(channel, lanes)
template <class S, class Body>
RESFAST_INLINE void for_each_channel(int64_t channels, const Body& body) {
  const int64_t whole = channels / kLanes<S> * kLanes<S>;
  for (int64_t c = 0; c < whole; c += kLanes<S>) body(c, Full{});
  if (whole < channels) body(whole, Partial{static_cast<int>(channels - whole)});
}

// The window of one output pixel.
template <class S>
struct Window {
  Range rows, columns;  // taps inside the input
  const S* corner;      // tap (0, 0), which may lie outside
  int64_t out;          // offset of the output
};

// body(window) for the outputs of lines [begin, end)
template <class S, class Body>
RESFAST_INLINE void for_each_window(const PoolShape& p, int64_t begin, int64_t end, const void* z,
                                    const Body& body) {
  for (int64_t line = begin; line < end; ++line) {
    const int64_t row = line % p.out_height;
    const S* sample =
        static_cast<const S*>(z) + line / p.out_height * p.height * p.width * p.channels;
    const S* corner = sample + (row * p.stride - p.padding) * p.width * p.channels;
    const Range rows = taps(row, p.height, p);
    for (int64_t column = 0; column < p.out_width; ++column) {
      body(Window<S>{rows, taps(column, p.width, p),
                     corner + (column * p.stride - p.padding) * p.channels,
                     (line * p.out_width + column) * p.channels});
    }
  }
}

template <class S, bool HAS_INDEX>
void pool_apply(const PoolApplyTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  const PoolShape& p = t.shape;
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  for_each_window<S>(p, t.begin, t.end, t.z, [&](const Window<S>& w) RESFAST_INLINE_LAMBDA {
    for_each_channel<S>(p.channels, [&](int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
      const V m = load(mean + c, lanes);
      const V s = load(scale + c, lanes);
      const V b = load(beta + c, lanes);
      V best{};  // of the ReLU's outputs: nothing is below 0
      IndexVec<S> index = every_lane<S>(w.rows.begin * p.kernel + w.columns.begin);
      for (int64_t tap_r = w.rows.begin; tap_r < w.rows.end; ++tap_r) {
        const S* z = w.corner + tap_r * p.width * p.channels + c;
        for (int64_t tap_s = w.columns.begin; tap_s < w.columns.end; ++tap_s) {
          const V u = affine(load(z + tap_s * p.channels, lanes), m, s, b);
          // The first maximum; NaN beats all.
          const IndexVec<S> take = (u > best) | (u != u);
          best = take ? u : best;
          if constexpr (HAS_INDEX) {
            index = take ? every_lane<S>(tap_r * p.kernel + tap_s) : index;
          }
        }
      }
      store(static_cast<S*>(t.out) + w.out + c, best, lanes);
      if constexpr (HAS_INDEX) store_index<S>(t.index + w.out + c, index, lanes);
    });
  });
}

template <class S>
void max_pool(const MaxPoolTile& t) {
  using V = Vec<S>;
  const PoolShape& p = t.shape;
  for_each_window<S>(p, t.begin, t.end, t.z, [&](const Window<S>& w) RESFAST_INLINE_LAMBDA {
    const S* tap[kMaxPoolKernel * kMaxPoolKernel];
    int count = 0;
    for (int64_t r = w.rows.begin; r < w.rows.end; ++r) {
      for (int64_t s = w.columns.begin; s < w.columns.end; ++s) {
        tap[count++] = w.corner + (r * p.width + s) * p.channels;
        __asm__ volatile("");  // a handful of turns: vectorised, they cost more than the rest
      }
    }
    S* const out = static_cast<S*>(t.out) + w.out;
    // kCount: a number of taps to unroll for, or 0
    const auto window = [&](auto n) RESFAST_INLINE_LAMBDA {
      constexpr int kCount = decltype(n)::value;
      for_each_channel<S>(p.channels, [&](int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
        V best = load(tap[0] + c, lanes);
        IndexVec<S> nan{};  // of the others: where best is NaN, it stays
        const auto take = [&](const S* z) RESFAST_INLINE_LAMBDA {
          const V u = load(z + c, lanes);
          nan |= u != u;
          best = maximum(u, best);  // of two zeros the first
        };
        if constexpr (kCount > 0) {
#pragma GCC unroll 16
          for (int i = 1; i < kCount; ++i) take(tap[i]);
        } else {
          for (int i = 1; i < count; ++i) take(tap[i]);
        }
        store(out + c, nan ? V{} + static_cast<acc_t<S>>(__builtin_nanf("")) : best, lanes);
      });
    };
    count == 9 ? window(Int<9>{}) : window(Int<0>{});  // 9: 3×3 within the image
  });
}

// Sums over windows, not over input pixels: each window's dy belongs to one pixel.
template <class S>
void pool_backward_reduce(const PoolBackwardReduceTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  const PoolShape& p = t.shape;
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  A* sum = static_cast<A*>(t.sum);
  A* product = static_cast<A*>(t.product);
  for (int64_t c = 0; c < p.channels; ++c) sum[c] = product[c] = 0;
  for_each_window<S>(p, t.begin, t.end, t.z, [&](const Window<S>& w) RESFAST_INLINE_LAMBDA {
    for_each_channel<S>(p.channels, [&](int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
      const V m = load(mean + c, lanes);
      const V s = load(scale + c, lanes);
      const V b = load(beta + c, lanes);
      const IndexVec<S> index = load_index<S>(t.index + w.out + c, lanes);
      V picked = m;
      for (int64_t tap_r = w.rows.begin; tap_r < w.rows.end; ++tap_r) {
        const S* z = w.corner + tap_r * p.width * p.channels + c;
        for (int64_t tap_s = w.columns.begin; tap_s < w.columns.end; ++tap_s) {
          const V zi = load(z + tap_s * p.channels, lanes);
          picked = index == every_lane<S>(tap_r * p.kernel + tap_s) ? zi : picked;
        }
      }
      const V dy = load(static_cast<const S*>(t.dy) + w.out + c, lanes);
      const V du = relu_backward(dy, affine(picked, m, s, b));
      store(sum + c, load(sum + c, lanes) + du, lanes);
      store(product + c, load(product + c, lanes) + du * (picked - m), lanes);
    });
  });
}

// A window that holds an input pixel: the offset of its outputs, and which tap the pixel is.
struct Holder {
  int64_t at, tap;
};

template <class S, bool HAS_COEF_Z, bool HAS_COEF_1>
void pool_backward_apply(const PoolBackwardApplyTile& t) {
  using A = acc_t<S>;
  using V = Vec<S>;
  const PoolShape& p = t.shape;
  const A* mean = static_cast<const A*>(t.mean);
  const A* scale = static_cast<const A*>(t.scale);
  const A* beta = static_cast<const A*>(t.beta);
  const A* coef_z = static_cast<const A*>(t.coef_z);
  const A* coef_1 = static_cast<const A*>(t.coef_1);
  for (int64_t line = t.begin; line < t.end; ++line) {
    const int64_t row = line % p.height;
    const int64_t sample = line / p.height * p.out_height;
    Range rows{0, 0};
    advance_windows(rows, row, p.out_height, p);
    Range columns{0, 0};
    for (int64_t column = 0; column < p.width; ++column) {
      advance_windows(columns, column, p.out_width, p);
      Holder holders[kMaxPoolKernel * kMaxPoolKernel];
      int count = 0;
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        for (int64_t q = columns.begin; q < columns.end; ++q) {
          const int64_t tap_r = row + p.padding - r * p.stride;
          const int64_t tap_s = column + p.padding - q * p.stride;
          const int64_t at = ((sample + r) * p.out_width + q) * p.channels;
          holders[count++] = {at, tap_r * p.kernel + tap_s};
          __asm__ volatile("");  // a handful of turns: vectorised, they cost more than the rest
        }
      }
      const int64_t at = (line * p.width + column) * p.channels;
      // kCount: a number of holders to unroll for, or 0
      const auto pixel = [&](auto n) RESFAST_INLINE_LAMBDA {
        constexpr int kCount = decltype(n)::value;
        for_each_channel<S>(p.channels, [&](int64_t c, auto lanes) RESFAST_INLINE_LAMBDA {
          const V m = load(mean + c, lanes);
          const V s = load(scale + c, lanes);
          const V b = load(beta + c, lanes);
          const V z = load(static_cast<const S*>(t.z) + at + c, lanes);
          V du{};
          const auto add = [&](const Holder& h) RESFAST_INLINE_LAMBDA {
            const IndexVec<S> index = load_index<S>(t.index + h.at + c, lanes);
            const V dy = load(static_cast<const S*>(t.dy) + h.at + c, lanes);
            du += index == every_lane<S>(h.tap) ? dy : V{};
          };
          if constexpr (kCount > 0) {
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) add(holders[i]);
          } else {
            for (int i = 0; i < count; ++i) add(holders[i]);
          }
          du = relu_backward(du, affine(z, m, s, b));
          V v = s * du;
          if constexpr (HAS_COEF_1) v += load(coef_1 + c, lanes);
          if constexpr (HAS_COEF_Z) v += load(coef_z + c, lanes) * (z - m);
          store(static_cast<S*>(t.dz) + at + c, v, lanes);
        });
      };
      // 3×3 at stride 2: 1, 2 or 4 windows hold a pixel.
      switch (count) {
        case 1:
          pixel(Int<1>{});
          break;
        case 2:
          pixel(Int<2>{});
          break;
        case 4:
          pixel(Int<4>{});
          break;
        default:
          pixel(Int<0>{});
      }
    }
  }
}

// ---- run-time arguments to template arguments

template <class S>
void pool_apply(const PoolApplyTile& t) {
  t.index ? pool_apply<S, true>(t) : pool_apply<S, false>(t);
}

template <class S>
void pool_backward_apply(const PoolBackwardApplyTile& t) {
  if (t.coef_z) {
    t.coef_1 ? pool_backward_apply<S, true, true>(t) : pool_backward_apply<S, true, false>(t);
  } else {
    t.coef_1 ? pool_backward_apply<S, false, true>(t) : pool_backward_apply<S, false, false>(t);
  }
}

void pool_apply_tile(Storage storage, const PoolApplyTile& t) {
  by_storage(storage, [&](auto s) { pool_apply<decltype(s)>(t); });
}
void max_pool_tile(Storage storage, const MaxPoolTile& t) {
  by_storage(storage, [&](auto s) { max_pool<decltype(s)>(t); });
}
void pool_backward_reduce_tile(Storage storage, const PoolBackwardReduceTile& t) {
  by_storage(storage, [&](auto s) { pool_backward_reduce<decltype(s)>(t); });
}
void pool_backward_apply_tile(Storage storage, const PoolBackwardApplyTile& t) {
  by_storage(storage, [&](auto s) { pool_backward_apply<decltype(s)>(t); });
}

}  // namespace
}  // namespace resfast

#define RESFAST_NORM_POOL_KERNELS \
  {pool_apply_tile, max_pool_tile, pool_backward_reduce_tile, pool_backward_apply_tile}
