// Batch norm forward on NHWC activations: statistics, per-channel vectors, application.
//
// A reduction writes one partial result a tile of pixels and a second kernel merges the tiles in
// their order: no atomics, so the same bits on every run of a chip. Statistics are Chan's rule,
// value by value within a thread on differences to the tile's first pixel, then over the threads.
#include "cuda/block.h"

namespace resfast::cuda {
namespace {

constexpr int kMergeChannels = 8;
constexpr int kMergeThreads = 64;  // that share the tiles of a channel

// ---- kernels
//
// One block at least to a multiprocessor: without saying so, ptxas keeps to the registers of two
// and spills some.

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 1) norm_stats_kernel(const NormStats a) {
  extern __shared__ float scratch[];
  constexpr int kUnroll = 8 / sizeof(T);
  const Place<kLanes> at(a.m, a.c, a.tiling.rows);
  Packet<T, kLanes> pilot{};
  if (at.exists) pilot = load<T, kLanes>(a.z, at.first * a.c + at.channel);
  float mean[kLanes] = {}, m2[kLanes] = {};
  float n = 0;
  const int64_t stride = blockDim.y;
  for (int64_t row = threadIdx.y; at.exists && row < at.rows; row += stride * kUnroll) {
    Packet<T, kLanes> z[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (row + k * stride < at.rows) {
        z[k] = load<T, kLanes>(a.z, (at.first + row + k * stride) * a.c + at.channel);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (row + k * stride >= at.rows) break;
      n += 1;
      const float share = 1 / n;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const float value = widen(z[k].lane[i]) - widen(pilot.lane[i]);
        const float delta = value - mean[i];
        mean[i] += delta * share;
        m2[i] += delta * (value - mean[i]);
      }
    }
  }

  // The threads joined; what is left of their means corrects the first mean's rounding.
  const float share = 1 / static_cast<float>(at.rows);
  float whole[kLanes], shift[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) whole[i] = mean[i] * n;
  sum_over_rows(whole, scratch);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    whole[i] *= share;
    mean[i] -= whole[i];
    shift[i] = mean[i] * n;
  }
  sum_over_rows(shift, scratch);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    shift[i] *= share;
    mean[i] -= shift[i];
    m2[i] += mean[i] * mean[i] * n;
  }
  sum_over_rows(m2, scratch);

  if (threadIdx.y != 0 || !at.exists) return;
  Packet<float, kLanes> out_mean, out_rest, out_m2;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const float first = widen(pilot.lane[i]);
    const float centre = whole[i] + shift[i];
    out_mean.lane[i] = first + centre;
    out_rest.lane[i] = (first - out_mean.lane[i]) + centre;
    out_m2.lane[i] = m2[i];
  }
  const int64_t out = static_cast<int64_t>(blockIdx.y) * a.c + at.channel;
  store(a.mean, out, out_mean);
  store(a.rest, out, out_rest);
  store(a.m2, out, out_m2);
}

__device__ __forceinline__ void put(const Statistic& to, int64_t channel, double value) {
  if (to.is_double) {
    static_cast<double*>(to.values)[channel] = value;
  } else {
    static_cast<float*>(to.values)[channel] = static_cast<float>(value);
  }
}

// Chan's rule over all tiles of a channel at once, in double.
__global__ void __launch_bounds__(kMergeChannels* kMergeThreads)
    merge_stats_kernel(const MergeStats a) {
  extern __shared__ double scratch_double[];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool exists = channel < a.c;
  // Differences to the first tile's mean are exactly 0 in a constant channel.
  const double pilot = exists ? a.mean[channel] : 0;
  const auto delta = [&](int64_t o) { return (a.mean[o] - pilot) + (a.rest ? a.rest[o] : 0.0F); };
  const auto count = [&](int64_t tile) {
    const int64_t left = a.m - tile * a.rows;
    return static_cast<double>(left < a.rows ? left : a.rows);
  };
  double shift[1] = {}, m2[1] = {};
  for (int64_t tile = threadIdx.y; exists && tile < a.tiles; tile += blockDim.y) {
    shift[0] += delta(tile * a.c + channel) * count(tile);
  }
  sum_over_rows(shift, scratch_double);
  shift[0] /= static_cast<double>(a.m);
  for (int64_t tile = threadIdx.y; exists && tile < a.tiles; tile += blockDim.y) {
    const int64_t o = tile * a.c + channel;
    const double rest = delta(o) - shift[0];
    m2[0] += a.m2[o] + rest * rest * count(tile);
  }
  sum_over_rows(m2, scratch_double);
  if (threadIdx.y != 0 || !exists) return;
  put(a.out_mean, channel, pilot + shift[0]);
  put(a.out_m2, channel, m2[0]);
}

__global__ void __launch_bounds__(kMergeChannels* kMergeThreads)
    merge_sums_kernel(const MergeSums a) {
  extern __shared__ double scratch_double[];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool exists = channel < a.c;
  const float* sums = a.sums + blockIdx.y * a.tiles * a.c;
  double total[1] = {};
  for (int64_t tile = threadIdx.y; exists && tile < a.tiles; tile += blockDim.y) {
    total[0] += sums[tile * a.c + channel];
  }
  sum_over_rows(total, scratch_double);
  if (threadIdx.y == 0 && exists) {
    a.out[blockIdx.y * a.c + channel] = static_cast<float>(total[0]);
  }
}

__global__ void __launch_bounds__(kThreads, 1) norm_prepare_kernel(const NormPrepare a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.c) return;
  const float rstd = reciprocal_std(a.var[channel], a.eps);
  a.rstd[channel] = rstd;
  a.scale[channel] = a.weight ? a.weight[channel] * rstd : rstd;
  a.beta[channel] = a.bias ? a.bias[channel] : 0;
}

enum class Residual { none, raw, affine };

template <class T, int kLanes, Residual kResidual>
__global__ void __launch_bounds__(kThreads, 1) norm_apply_kernel(const NormApply a) {
  constexpr int kUnroll = 8 / sizeof(T);
  constexpr bool kAffine = kResidual == Residual::affine;
  const Place<kLanes> at(a.m, a.c, a.tiling.rows);
  if (!at.exists) return;
  const Channels<kLanes> mean(a.affine.mean, at.channel, true);
  const Channels<kLanes> scale(a.affine.scale, at.channel, true);
  const Channels<kLanes> beta(a.affine.beta, at.channel, true);
  const Channels<kLanes> r_mean(a.residual_affine.mean, at.channel, kAffine);
  const Channels<kLanes> r_scale(a.residual_affine.scale, at.channel, kAffine);
  const Channels<kLanes> r_beta(a.residual_affine.beta, at.channel, kAffine);
  const bool relu_before = a.relu && (a.add_after_act || kResidual == Residual::none);
  const bool relu_after = a.relu && !relu_before;
  const int64_t stride = blockDim.y;
  for (int64_t row = threadIdx.y; row < at.rows; row += stride * kUnroll) {
    Packet<T, kLanes> z[kUnroll], r[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (row + k * stride < at.rows) {
        const int64_t o = (at.first + row + k * stride) * a.c + at.channel;
        z[k] = load<T, kLanes>(a.z, o);
        if (kResidual != Residual::none) r[k] = load<T, kLanes>(a.residual, o);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (row + k * stride >= at.rows) break;
      const int64_t pixel = at.first + row + k * stride;
      Packet<T, kLanes> out;
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        float y = normalise(widen(z[k].lane[i]), mean[i], scale[i], beta[i]);
        if (relu_before) y = relu(y);
        if (kResidual != Residual::none) {
          const float value = widen(r[k].lane[i]);
          y += kAffine ? normalise(value, r_mean[i], r_scale[i], r_beta[i]) : value;
        }
        if (relu_after) y = relu(y);
        out.lane[i] = narrow<T>(y);
        bits |= static_cast<unsigned>(passed(widen(out.lane[i]))) << i;
      }
      store(a.y, pixel * a.c + at.channel, out);
      if (kLanes == kWide && a.mask) {
        a.mask[pixel * (a.c / 8) + at.channel / 8] = static_cast<uint8_t>(bits);
      }
    }
  }
}

// Statistics and application of a few channels whose pixels one block holds: z is read once.
template <class T, int kLanes>
__global__ void __launch_bounds__(kHeldThreads, 1) norm_forward_kernel(const NormForward a) {
  extern __shared__ float scratch[];
  constexpr int kHeld = kHeldPackets<T, kLanes>;
  const Place<kLanes> at(a.m, a.c, a.m);
  const auto row_of = [](int k) { return threadIdx.y + k * static_cast<int64_t>(blockDim.y); };
  Packet<T, kLanes> pilot{}, z[kHeld];
  if (at.exists) pilot = load<T, kLanes>(a.z, at.channel);
  const auto centred = [&](const Packet<T, kLanes>& of, int i) {
    return widen(of.lane[i]) - widen(pilot.lane[i]);
  };
  float whole[kLanes] = {}, shift[kLanes] = {}, m2[kLanes] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!at.exists || row_of(k) >= a.m) continue;
    z[k] = load<T, kLanes>(a.z, row_of(k) * a.c + at.channel);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) whole[i] += centred(z[k], i);
  }
  sum_over_rows(whole, scratch);
  const float share = 1 / static_cast<float>(a.m);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) whole[i] *= share;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!at.exists || row_of(k) >= a.m) continue;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) shift[i] += centred(z[k], i) - whole[i];
  }
  sum_over_rows(shift, scratch);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) shift[i] *= share;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!at.exists || row_of(k) >= a.m) continue;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float rest = centred(z[k], i) - whole[i] - shift[i];
      m2[i] += rest * rest;
    }
  }
  sum_over_rows(m2, scratch);
  if (!at.exists) return;

  const Channels<kLanes> weight(a.weight, at.channel, true, 1.0f);
  const Channels<kLanes> beta(a.bias, at.channel, true);
  float mean[kLanes], scale[kLanes];
  Packet<float, kLanes> out_mean, out_var;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    mean[i] = widen(pilot.lane[i]) + (whole[i] + shift[i]);
    const float var = m2[i] * share;
    scale[i] = weight[i] * reciprocal_std(var, a.eps);
    out_mean.lane[i] = mean[i];
    out_var.lane[i] = var;
  }
  if (threadIdx.y == 0) {
    store(a.mean, at.channel, out_mean);
    store(a.var, at.channel, out_var);
  }
  const bool relu_before = a.relu && (a.add_after_act || !a.residual);
  const bool relu_after = a.relu && !relu_before;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (row_of(k) >= a.m) continue;
    const int64_t o = row_of(k) * a.c + at.channel;
    Packet<T, kLanes> r{}, out;
    if (a.residual) r = load<T, kLanes>(a.residual, o);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      float y = normalise(widen(z[k].lane[i]), mean[i], scale[i], beta[i]);
      if (relu_before) y = relu(y);
      if (a.residual) y += widen(r.lane[i]);
      if (relu_after) y = relu(y);
      out.lane[i] = narrow<T>(y);
      bits |= static_cast<unsigned>(passed(widen(out.lane[i]))) << i;
    }
    store(a.y, o, out);
    if (kLanes == kWide && a.mask) {
      a.mask[row_of(k) * (a.c / 8) + at.channel / 8] = static_cast<uint8_t>(bits);
    }
  }
}

}  // namespace

// ---- launchers

const char* norm_stats(const Launch& launch, const NormStats& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    return run(norm_stats_kernel<typename F::Element, F::kLanes>, grid_of(a.tiling),
               block_of(a.tiling), scratch_bytes(a.tiling), launch.stream, a);
  });
}

const char* merge_stats(const Launch& launch, const MergeStats& a) {
  return run(merge_stats_kernel, dim3(static_cast<unsigned>(ceil_div(a.c, kMergeChannels))),
             dim3(kMergeChannels, kMergeThreads), sizeof(double) * kMergeChannels * kMergeThreads,
             launch.stream, a);
}

const char* merge_sums(const Launch& launch, const MergeSums& a) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.c, kMergeChannels)),
                  static_cast<unsigned>(a.kinds));
  return run(merge_sums_kernel, grid, dim3(kMergeChannels, kMergeThreads),
             sizeof(double) * kMergeChannels * kMergeThreads, launch.stream, a);
}

const char* norm_prepare(const Launch& launch, const NormPrepare& a) {
  return run(norm_prepare_kernel, dim3(static_cast<unsigned>(ceil_div(a.c, kThreads))),
             dim3(kThreads), 0, launch.stream, a);
}

const char* norm_apply(const Launch& launch, const NormApply& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    using T = typename F::Element;
    auto kernel = norm_apply_kernel<T, F::kLanes, Residual::none>;
    if (a.residual) kernel = norm_apply_kernel<T, F::kLanes, Residual::raw>;
    if (a.residual_affine.mean) kernel = norm_apply_kernel<T, F::kLanes, Residual::affine>;
    return run(kernel, grid_of(a.tiling), block_of(a.tiling), 0, launch.stream, a);
  });
}

const char* norm_forward(const Launch& launch, const NormForward& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    return run(norm_forward_kernel<typename F::Element, F::kLanes>, grid_of(a.tiling),
               block_of(a.tiling), scratch_bytes(a.tiling), launch.stream, a);
  });
}

}  // namespace resfast::cuda
