// Convolutions on Hopper's tensor cores: argument checks, scratch memory, and the launches of an
// op. The ops are there in every build; the kernels (csrc/cuda/cutlass) only where setup.py was
// asked.
#include "cuda/conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"
#include "cuda/call.h"
#ifdef RESFAST_HAS_CUTLASS
#include "cuda/cutlass/kernels.h"
#endif

namespace resfast {
namespace cuda {

#ifdef RESFAST_HAS_CUTLASS
const char* conv_affine(const Launch& launch, const ConvAffine& a) {
  return a.shape.is_pointwise() ? product_affine(launch, a) : implicit_gemm_affine(launch, a);
}
const char* conv_stats(const Launch& launch, const ConvStats& a) {
  return a.shape.is_pointwise() ? product_stats(launch, a) : implicit_gemm_stats(launch, a);
}
#else
constexpr const char* kNotBuilt = "this build has no CUTLASS kernels";
const char* conv_affine(const Launch&, const ConvAffine& a) {
  return a.processors ? kNotBuilt : nullptr;
}
const char* conv_stats(const Launch&, const ConvStats& a) {
  return a.processors ? kNotBuilt : nullptr;
}
#endif

}  // namespace cuda

namespace {

using cuda::ConvShape;
using cuda::ConvTile;

struct Window {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

void check_taken(const char* refusal, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(!refusal, refusal, ", got x ", shape_of(x), ", weight ", shape_of(weight));
}

// A convolution's operands and result, of whatever dtype the kernels take.
ConvShape check_convolution(const Tensor& x, const Tensor& weight, const Window& at,
                            const ConvTile& tile, const Tensor& out, const char* out_name) {
  check_activation_form(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "x must be bfloat16 or float16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  check_same_device(weight, "weight", x);
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be 4-D [K, C, R, S], got shape ",
                  shape_of(weight));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x (",
                  torch::headeronly::toString(x.scalar_type()), "), got ",
                  torch::headeronly::toString(weight.scalar_type()));
  check_nhwc(weight, "weight");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight must have the ", x.size(1),
                  " input channels of x, got shape ", shape_of(weight));
  STD_TORCH_CHECK(at.stride_h >= 1 && at.stride_w >= 1, "stride must be positive, got ",
                  at.stride_h, " and ", at.stride_w);
  STD_TORCH_CHECK(at.padding_h >= 0 && at.padding_w >= 0, "padding must not be negative, got ",
                  at.padding_h, " and ", at.padding_w);
  STD_TORCH_CHECK(at.dilation_h >= 1 && at.dilation_w >= 1, "dilation must be positive, got ",
                  at.dilation_h, " and ", at.dilation_w);
  const ConvShape shape{x.size(0),
                        x.size(1),
                        weight.size(0),
                        {x.size(2), weight.size(2), at.stride_h, at.padding_h, at.dilation_h},
                        {x.size(3), weight.size(3), at.stride_w, at.padding_w, at.dilation_w}};
  const int64_t p = shape.h.out(), q = shape.w.out();
  STD_TORCH_CHECK(shape.h.window >= 1 && shape.w.window >= 1 && p >= 1 && q >= 1, "weight ",
                  shape_of(weight), " must fit into the padded x ", shape_of(x));
  check_same_device(out, out_name, x);
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == shape.n && out.size(1) == shape.k &&
                      out.size(2) == p && out.size(3) == q,
                  out_name, " must have shape [", shape.n, ", ", shape.k, ", ", p, ", ", q,
                  "], got ", shape_of(out));
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), out_name, " must have the dtype of x (",
                  torch::headeronly::toString(x.scalar_type()), "), got ",
                  torch::headeronly::toString(out.scalar_type()));
  check_nhwc(out, out_name);
  check_taken(cuda::conv_unsupported(shape), x, weight);
  STD_TORCH_CHECK(cuda::is_conv_tile(tile), "there is no tile of ", tile.m, " by ", tile.n);
  return shape;
}

void check_alignment(std::initializer_list<Argument> operands) {
  for (const Argument& a : operands) {
    STD_TORCH_CHECK(is_aligned({a}), a.name, " must start at a multiple of 16 bytes");
  }
}

void conv_affine(const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& scale,
                 const Tensor& beta, const OptionalTensor& residual, bool relu, bool add_after_act,
                 int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                 int64_t dilation_h, int64_t dilation_w, int64_t tile_m, int64_t tile_n,
                 const Tensor& out) {
  const ConvTile tile{tile_m, tile_n};
  const ConvShape shape = check_convolution(
      x, weight, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, tile, out,
      "out");
  check_affine(mean, scale, beta, out);
  check_activation_like(residual, "residual", out, "out");
  check_alignment({{"x", x}, {"weight", weight}, {"residual", residual}, {"out", out}});
  check_memory({{"out", out}}, {{"x", x, Access::whole},
                                {"weight", weight, Access::whole},
                                {"residual", residual},
                                {"mean", mean, Access::whole},
                                {"scale", scale, Access::whole},
                                {"beta", beta, Access::whole}});
  cuda::ConvAffine arguments{shape,
                             tile,
                             0,
                             pointer<void>(x),
                             pointer<void>(weight),
                             affine_of(mean, scale, beta),
                             pointer<void>(residual),
                             relu,
                             add_after_act,
                             pointer<void>(out)};
  if (out.numel() != 0) {
    check_taken(cuda::conv_affine({storage_of(x), nullptr}, arguments), x, weight);
  }
  check_cuda(x, "x");
  if (out.numel() == 0) return;
  const Call call("cuda_conv_affine", out);
  arguments.processors = call.processors();
  call.check(cuda::conv_affine(call.launch, arguments));
}

void conv_stats(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w,
                int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                int64_t tile_m, int64_t tile_n, const Tensor& z, const Tensor& mean,
                const Tensor& m2) {
  const ConvTile tile{tile_m, tile_n};
  const ConvShape shape = check_convolution(
      x, weight, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, tile, z, "z");
  check_channel_vector(mean, "mean", z);
  check_channel_vector(m2, "m2", z);
  check_alignment({{"x", x}, {"weight", weight}, {"z", z}});
  check_memory({{"z", z}, {"mean", mean, Access::whole}, {"m2", m2, Access::whole}},
               {{"x", x, Access::whole}, {"weight", weight, Access::whole}});
  cuda::ConvStats arguments{
      shape, tile, 0, pointer<void>(x), pointer<void>(weight), pointer<void>(z), nullptr, nullptr};
  if (z.numel() != 0) {
    check_taken(cuda::conv_stats({storage_of(x), nullptr}, arguments), x, weight);
  }
  check_cuda(x, "x");
  if (z.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(m2, 0);
    return;
  }
  const Call call("cuda_conv_stats", z);
  const int64_t tiles = (call.m + cuda::kConvStatsRows - 1) / cuda::kConvStatsRows;
  const Tensor scratch = float_scratch(z, {2, tiles, call.c});
  arguments.processors = call.processors();
  arguments.mean = pointer<float>(scratch);
  arguments.m2 = arguments.mean + tiles * call.c;
  call.check(cuda::conv_stats(call.launch, arguments));
  call.check(cuda::merge_stats(call.launch, {call.m,
                                             call.c,
                                             tiles,
                                             cuda::kConvStatsRows,
                                             arguments.mean,
                                             nullptr,
                                             arguments.m2,
                                             {pointer<float>(mean), false},
                                             {pointer<float>(m2), false}}));
}

}  // namespace
}  // namespace resfast

// Also for CPU tensors, which get an answer to what is wrong with them and never a launch.
#define RESFAST_CONV_OPS(m)                                     \
  m.impl("cuda_conv_affine", TORCH_BOX(&resfast::conv_affine)); \
  m.impl("cuda_conv_stats", TORCH_BOX(&resfast::conv_stats))

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  RESFAST_CONV_OPS(m);
}
STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  RESFAST_CONV_OPS(m);
}
