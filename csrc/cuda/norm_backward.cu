// Batch norm backward on NHWC activations: the two sums of du, then dz from them.
#include "cuda/block.h"

namespace resfast::cuda {
namespace {

// ---- kernels

// Sums per tile of pixels; kSecond: also that of a second norm with the same du.
template <class T, int kLanes, bool kSecond>
__global__ void __launch_bounds__(kThreads, 1)
    norm_backward_reduce_kernel(const NormBackwardReduce a) {
  extern __shared__ float scratch[];
  const Place<kLanes> at(a.m, a.c, a.tiling.rows);
  const Channels<kLanes> mean(a.affine.mean, at.channel, at.exists);
  const Channels<kLanes> scale(a.affine.scale, at.channel, at.exists);
  const Channels<kLanes> beta(a.affine.beta, at.channel, at.exists);
  const Channels<kLanes> mean2(a.mean2, at.channel, at.exists && kSecond);
  float sum_du[kLanes] = {}, sum_du_z[kLanes] = {}, sum_du_z2[kLanes] = {};
#pragma unroll 2
  for (int64_t row = threadIdx.y; at.exists && row < at.rows; row += blockDim.y) {
    const int64_t pixel = at.first + row;
    const int64_t o = pixel * a.c + at.channel;
    const auto dy = load<T, kLanes>(a.dy, o);
    const auto z = load<T, kLanes>(a.z, o);
    Packet<T, kLanes> dy2{}, y{}, z2{}, du, activation;
    unsigned bits = 0;
    if (a.dy2) dy2 = load<T, kLanes>(a.dy2, o);
    if (a.mask == Mask::from_y) y = load<T, kLanes>(a.y, o);
    if (a.mask == Mask::from_bits) bits = mask_bits<kLanes>(a.bits, pixel, a.c, at.channel);
    if (kSecond) z2 = load<T, kLanes>(a.z2, o);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = widen(z.lane[i]);
      const float u = normalise(value, mean[i], scale[i], beta[i]);
      float gradient = widen(dy.lane[i]);
      if (a.dy2) gradient += widen(dy2.lane[i]);
      gradient = behind_relu(gradient, a.mask, u, widen(y.lane[i]), bits >> i & 1);
      if (a.du) {  // the sums are of what is stored
        du.lane[i] = narrow<T>(gradient);
        gradient = widen(du.lane[i]);
      }
      if (a.activation) activation.lane[i] = narrow<T>(a.relu ? relu(u) : u);
      sum_du[i] += gradient;
      sum_du_z[i] += gradient * (value - mean[i]);
      if (kSecond) sum_du_z2[i] += gradient * (widen(z2.lane[i]) - mean2[i]);
    }
    if (a.du) store(a.du, o, du);
    if (a.activation) store(a.activation, o, activation);
  }

  const int64_t plane = static_cast<int64_t>(gridDim.y) * a.c;
  const int64_t out = static_cast<int64_t>(blockIdx.y) * a.c + at.channel;
  const auto put = [&](float (&sum)[kLanes], int kind) {
    sum_over_rows(sum, scratch);
    Packet<float, kLanes> total;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) total.lane[i] = sum[i];
    if (threadIdx.y == 0 && at.exists) store(a.sums, kind * plane + out, total);
  };
  put(sum_du, 0);
  put(sum_du_z, 1);
  if (kSecond) put(sum_du_z2, 2);
}

struct Coefficients {
  float sum_du_xhat, z, one;
};

__device__ __forceinline__ Coefficients coefficients(float scale, float rstd, float sum_du,
                                                     float sum_du_centred, float n) {
  const float sum_du_xhat = rstd * sum_du_centred;
  const float share = scale / n;
  return {sum_du_xhat, -(share * rstd * sum_du_xhat), -(share * sum_du)};
}

__global__ void __launch_bounds__(kThreads, 1) norm_coefficients_kernel(const NormCoefficients a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= a.c) return;
  const Coefficients of =
      coefficients(a.scale[c], a.rstd[c], a.sum_du[c], a.sum_du_centred[c], a.n);
  a.sum_du_xhat[c] = of.sum_du_xhat;
  a.coef_z[c] = of.z;
  a.coef_1[c] = of.one;
}

// kSecond: also dz2 of a second norm with the same du.
template <class T, int kLanes, bool kSecond>
__global__ void __launch_bounds__(kThreads, 1)
    norm_backward_apply_kernel(const NormBackwardApply a) {
  const Place<kLanes> at(a.m, a.c, a.tiling.rows);
  if (!at.exists) return;
  const Channels<kLanes> mean(a.affine.mean, at.channel, true);
  const Channels<kLanes> scale(a.affine.scale, at.channel, true);
  const Channels<kLanes> beta(a.affine.beta, at.channel, true);
  const Channels<kLanes> coef_z(a.coef_z, at.channel, true);
  const Channels<kLanes> coef_1(a.coef_1, at.channel, true);
  const Channels<kLanes> mean2(a.mean2, at.channel, kSecond);
  const Channels<kLanes> scale2(a.scale2, at.channel, kSecond);
  const Channels<kLanes> coef_z2(a.coef_z2, at.channel, kSecond);
  const Channels<kLanes> coef_12(a.coef_12, at.channel, kSecond);
  const bool reads_z = a.coef_z || a.mask == Mask::recompute;
  const bool reads_z2 = kSecond && a.coef_z2;
#pragma unroll 2
  for (int64_t row = threadIdx.y; row < at.rows; row += blockDim.y) {
    const int64_t o = (at.first + row) * a.c + at.channel;
    const auto dy = load<T, kLanes>(a.dy, o);
    Packet<T, kLanes> z{}, y{}, z2{}, dz, du, dz2;
    if (reads_z) z = load<T, kLanes>(a.z, o);
    if (a.mask == Mask::from_y) y = load<T, kLanes>(a.y, o);
    if (reads_z2) z2 = load<T, kLanes>(a.z2, o);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = widen(z.lane[i]);
      const float u = normalise(value, mean[i], scale[i], beta[i]);
      const float gradient = behind_relu(widen(dy.lane[i]), a.mask, u, widen(y.lane[i]), false);
      float out = gradient * scale[i];
      if (a.coef_z) out += (value - mean[i]) * coef_z[i];
      dz.lane[i] = narrow<T>(out + coef_1[i]);
      du.lane[i] = narrow<T>(gradient);
      if (kSecond) {
        float out2 = gradient * scale2[i];
        if (reads_z2) out2 += (widen(z2.lane[i]) - mean2[i]) * coef_z2[i];
        dz2.lane[i] = narrow<T>(out2 + coef_12[i]);
      }
    }
    if (kSecond) store(a.dz2, o, dz2);
    if (a.du) store(a.du, o, du);
    store(a.dz, o, dz);
  }
}

// Both passes for a few channels whose pixels one block holds: dy and z are read once.
template <class T, int kLanes>
__global__ void __launch_bounds__(kHeldThreads, 1) norm_backward_kernel(const NormBackward a) {
  extern __shared__ float scratch[];
  constexpr int kHeld = kHeldPackets<T, kLanes>;
  const Place<kLanes> at(a.m, a.c, a.m);
  const auto row_of = [](int k) { return threadIdx.y + k * static_cast<int64_t>(blockDim.y); };
  const Channels<kLanes> mean(a.affine.mean, at.channel, at.exists);
  const Channels<kLanes> scale(a.affine.scale, at.channel, at.exists);
  const Channels<kLanes> beta(a.affine.beta, at.channel, at.exists);
  float du[kHeld][kLanes];
  Packet<T, kLanes> z[kHeld];
  float sum_du[kLanes] = {}, sum_du_z[kLanes] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!at.exists || row_of(k) >= a.m) continue;
    const int64_t o = row_of(k) * a.c + at.channel;
    const auto dy = load<T, kLanes>(a.dy, o);
    z[k] = load<T, kLanes>(a.z, o);
    Packet<T, kLanes> dy2{}, y{}, stored, activation;
    unsigned bits = 0;
    if (a.dy2) dy2 = load<T, kLanes>(a.dy2, o);
    if (a.mask == Mask::from_y) y = load<T, kLanes>(a.y, o);
    if (a.mask == Mask::from_bits) bits = mask_bits<kLanes>(a.bits, row_of(k), a.c, at.channel);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = widen(z[k].lane[i]);
      const float u = normalise(value, mean[i], scale[i], beta[i]);
      float gradient = widen(dy.lane[i]);
      if (a.dy2) gradient += widen(dy2.lane[i]);
      gradient = behind_relu(gradient, a.mask, u, widen(y.lane[i]), bits >> i & 1);
      if (a.du) {  // the sums are of what is stored
        stored.lane[i] = narrow<T>(gradient);
        gradient = widen(stored.lane[i]);
      }
      if (a.activation) activation.lane[i] = narrow<T>(a.relu ? relu(u) : u);
      du[k][i] = gradient;
      sum_du[i] += gradient;
      sum_du_z[i] += gradient * (value - mean[i]);
    }
    if (a.du) store(a.du, o, stored);
    if (a.activation) store(a.activation, o, activation);
  }
  sum_over_rows(sum_du, scratch);
  sum_over_rows(sum_du_z, scratch);
  if (!at.exists) return;

  const Channels<kLanes> rstd(a.rstd, at.channel, true);
  Coefficients coef[kLanes];
  Packet<float, kLanes> out_sum, out_xhat;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    coef[i] = coefficients(scale[i], rstd[i], sum_du[i], sum_du_z[i], static_cast<float>(a.m));
    out_sum.lane[i] = sum_du[i];
    out_xhat.lane[i] = coef[i].sum_du_xhat;
  }
  if (threadIdx.y == 0) {
    store(a.sum_du, at.channel, out_sum);
    store(a.sum_du_xhat, at.channel, out_xhat);
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (row_of(k) >= a.m) continue;
    Packet<T, kLanes> dz;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float centred = widen(z[k].lane[i]) - mean[i];
      dz.lane[i] = narrow<T>(du[k][i] * scale[i] + centred * coef[i].z + coef[i].one);
    }
    store(a.dz, row_of(k) * a.c + at.channel, dz);
  }
}

}  // namespace

// ---- launchers

const char* norm_backward_reduce(const Launch& launch, const NormBackwardReduce& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    using T = typename F::Element;
    const auto kernel = a.z2 ? norm_backward_reduce_kernel<T, F::kLanes, true>
                             : norm_backward_reduce_kernel<T, F::kLanes, false>;
    return run(kernel, grid_of(a.tiling), block_of(a.tiling), scratch_bytes(a.tiling),
               launch.stream, a);
  });
}

const char* norm_coefficients(const Launch& launch, const NormCoefficients& a) {
  return run(norm_coefficients_kernel, dim3(static_cast<unsigned>(ceil_div(a.c, kThreads))),
             dim3(kThreads), 0, launch.stream, a);
}

const char* norm_backward_apply(const Launch& launch, const NormBackwardApply& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    using T = typename F::Element;
    const auto kernel = a.dz2 ? norm_backward_apply_kernel<T, F::kLanes, true>
                              : norm_backward_apply_kernel<T, F::kLanes, false>;
    return run(kernel, grid_of(a.tiling), block_of(a.tiling), 0, launch.stream, a);
  });
}

const char* norm_backward(const Launch& launch, const NormBackward& a) {
  return by_form(launch.storage, a.tiling.lanes, [&](auto form) {
    using F = decltype(form);
    return run(norm_backward_kernel<typename F::Element, F::kLanes>, grid_of(a.tiling),
               block_of(a.tiling), scratch_bytes(a.tiling), launch.stream, a);
  });
}

}  // namespace resfast::cuda
