// Batch-norm ops on CUDA activations: argument checks, scratch memory, and the launches of an op.
//
// Everything about shapes, dtypes and memory is checked before the device is, so that a CPU tensor
// gets the same answers, and the last of them is that it must be a CUDA tensor.
#include "cuda/norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "checks.h"
#include "cuda/call.h"

namespace resfast {
namespace {

using cuda::Tiling;

// ---- checks

void check_form(const Tensor& z) {
  check_activation_form(z, "z");
  STD_TORCH_CHECK(z.scalar_type() != ScalarType::Double,
                  "z must be float32, bfloat16 or float16 on CUDA, got Double");
}

// A mask of one bit a value, uint8 [N*H*W, C/8].
void check_mask(const OptionalTensor& mask, const Tensor& z, bool aligned) {
  if (!mask) return;
  check_same_device(*mask, "mask", z);
  const int64_t pixels = z.size(0) * z.size(2) * z.size(3);
  STD_TORCH_CHECK(z.size(1) % 8 == 0, "mask needs channels in multiples of 8, got ", z.size(1));
  STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == pixels && mask->size(1) == z.size(1) / 8,
                  "mask must have shape [", pixels, ", ", z.size(1) / 8, "], got ",
                  shape_of(*mask));
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte, "mask must be Byte, got ",
                  torch::headeronly::toString(mask->scalar_type()));
  STD_TORCH_CHECK(mask->is_contiguous(), "mask must be contiguous, got strides ",
                  strides_of(*mask));
  STD_TORCH_CHECK(aligned, "mask needs activations that start at a multiple of 16 bytes");
}

// A vector of its own device and length, in float32.
void check_vector(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_same_device(t, name, like);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == like.size(0), name, " must have the shape of ",
                  like_name, " ", shape_of(like), ", got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be Float, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, got stride ", t.stride(0));
}

void check_held(const Tensor& z) {
  const int64_t pixels = z.size(0) * z.size(2) * z.size(3);
  STD_TORCH_CHECK(pixels >= 1 && pixels <= cuda::kHeldPixels, "z must have 1 to ",
                  cuda::kHeldPixels, " values a channel to be read once, got ", pixels);
}

// ---- from tensors to arguments

cuda::Statistic statistic_of(const Tensor& t) {
  return {pointer<void>(t), t.scalar_type() == ScalarType::Double};
}

cuda::Mask mask_of(bool relu, const OptionalTensor& y, const OptionalTensor& bits) {
  if (!relu) return cuda::Mask::none;
  if (bits) return cuda::Mask::from_bits;
  return y ? cuda::Mask::from_y : cuda::Mask::recompute;
}

// ---- ops

void norm_stats(const Tensor& z, const Tensor& mean, const Tensor& m2) {
  check_form(z);
  check_statistic(mean, "mean", z);
  check_statistic(m2, "m2", z);
  check_memory({{"mean", mean, Access::whole}, {"m2", m2, Access::whole}}, {{"z", z}});
  check_cuda(z, "z");
  if (z.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(m2, 0);
    return;
  }
  const Call call("cuda_norm_stats", z);
  const int lanes = cuda::lanes_of(call.c, is_aligned({{"z", z}}));
  const Tiling tiling = cuda::reduction_tiling(call.m, call.c, lanes, call.processors());
  const int64_t plane = tiling.tiles * call.c;
  const Tensor scratch = float_scratch(z, {3, tiling.tiles, call.c});
  float* const tiles = pointer<float>(scratch);
  call.check(cuda::norm_stats(call.launch, {call.m, call.c, tiling, pointer<void>(z), tiles,
                                            tiles + plane, tiles + 2 * plane}));
  call.check(cuda::merge_stats(call.launch,
                               {call.m, call.c, tiling.tiles, tiling.rows, tiles, tiles + plane,
                                tiles + 2 * plane, statistic_of(mean), statistic_of(m2)}));
}

void norm_prepare(const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps, const Tensor& scale, const Tensor& beta, const Tensor& rstd) {
  STD_TORCH_CHECK(var.dim() == 1, "var must be 1-D [C], got shape ", shape_of(var));
  check_vector(var, "var", var, "var");
  if (weight) check_vector(*weight, "weight", var, "var");
  if (bias) check_vector(*bias, "bias", var, "var");
  check_vector(scale, "scale", var, "var");
  check_vector(beta, "beta", var, "var");
  check_vector(rstd, "rstd", var, "var");
  check_memory({{"scale", scale}, {"beta", beta}, {"rstd", rstd}},
               {{"var", var, Access::whole},
                {"weight", weight, Access::whole},
                {"bias", bias, Access::whole}});
  check_cuda(var, "var");
  if (var.numel() == 0) return;
  const int device = var.get_device_index();
  const cuda::CurrentDevice guard(device);
  const char* error = cuda::norm_prepare(
      {cuda::Storage::f32, current_stream(device)},
      {var.size(0), static_cast<float>(eps), pointer<float>(var), pointer<float>(weight),
       pointer<float>(bias), pointer<float>(scale), pointer<float>(beta), pointer<float>(rstd)});
  STD_TORCH_CHECK(!error, "cuda_norm_prepare: CUDA kernel launch failed: ", error);
}

void norm_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_du,
                       const Tensor& sum_du_centred, int64_t n, const Tensor& sum_du_xhat,
                       const Tensor& coef_z, const Tensor& coef_1) {
  STD_TORCH_CHECK(scale.dim() == 1, "scale must be 1-D [C], got shape ", shape_of(scale));
  check_vector(scale, "scale", scale, "scale");
  check_vector(rstd, "rstd", scale, "scale");
  check_vector(sum_du, "sum_du", scale, "scale");
  check_vector(sum_du_centred, "sum_du_centred", scale, "scale");
  check_vector(sum_du_xhat, "sum_du_xhat", scale, "scale");
  check_vector(coef_z, "coef_z", scale, "scale");
  check_vector(coef_1, "coef_1", scale, "scale");
  STD_TORCH_CHECK(n >= 1, "n must be at least 1, got ", n);
  check_memory({{"sum_du_xhat", sum_du_xhat}, {"coef_z", coef_z}, {"coef_1", coef_1}},
               {{"scale", scale, Access::whole},
                {"rstd", rstd, Access::whole},
                {"sum_du", sum_du, Access::whole},
                {"sum_du_centred", sum_du_centred, Access::whole}});
  check_cuda(scale, "scale");
  if (scale.numel() == 0) return;
  const int device = scale.get_device_index();
  const cuda::CurrentDevice guard(device);
  const char* error = cuda::norm_coefficients(
      {cuda::Storage::f32, current_stream(device)},
      {scale.size(0), static_cast<float>(n), pointer<float>(scale), pointer<float>(rstd),
       pointer<float>(sum_du), pointer<float>(sum_du_centred), pointer<float>(sum_du_xhat),
       pointer<float>(coef_z), pointer<float>(coef_1)});
  STD_TORCH_CHECK(!error, "cuda_norm_coefficients: CUDA kernel launch failed: ", error);
}

void norm_apply(const Tensor& z, const Tensor& mean, const Tensor& scale, const Tensor& beta,
                const OptionalTensor& residual, const OptionalTensor& residual_mean,
                const OptionalTensor& residual_scale, const OptionalTensor& residual_beta,
                bool relu, bool add_after_act, const Tensor& out, const OptionalTensor& mask) {
  check_form(z);
  check_affine(mean, scale, beta, z);
  check_residual(residual, residual_mean, residual_scale, residual_beta, z);
  check_activation_like(out, "out", z, "z");
  const bool aligned = is_aligned({{"z", z}, {"residual", residual}, {"out", out}});
  check_mask(mask, z, aligned);
  check_memory({{"out", out}, {"mask", mask, Access::whole}},
               {{"z", z},
                {"residual", residual},
                {"mean", mean, Access::whole},
                {"scale", scale, Access::whole},
                {"beta", beta, Access::whole},
                {"residual_mean", residual_mean, Access::whole},
                {"residual_scale", residual_scale, Access::whole},
                {"residual_beta", residual_beta, Access::whole}});
  check_cuda(z, "z");
  if (z.numel() == 0) return;
  const Call call("cuda_norm_apply", z);
  const Tiling tiling =
      cuda::elementwise_tiling(call.m, call.c, cuda::lanes_of(call.c, aligned), call.processors());
  call.check(cuda::norm_apply(
      call.launch,
      {call.m, call.c, tiling, pointer<void>(z), affine_of(mean, scale, beta),
       pointer<void>(residual), affine_of(residual_mean, residual_scale, residual_beta), relu,
       add_after_act, pointer<void>(out), pointer<uint8_t>(mask)}));
}

void norm_backward_reduce(const Tensor& dy, const OptionalTensor& dy2, const Tensor& z,
                          const Tensor& mean, const Tensor& scale, const Tensor& beta,
                          const OptionalTensor& y, const OptionalTensor& mask, bool relu,
                          const OptionalTensor& z2, const OptionalTensor& mean2, const Tensor& sums,
                          const OptionalTensor& du, const OptionalTensor& activation) {
  check_form(z);
  check_activation_like(dy, "dy", z, "z");
  check_activation_like(dy2, "dy2", z, "z");
  check_affine(mean, scale, beta, z);
  check_activation_like(y, "y", z, "z");
  check_activation_like(z2, "z2", z, "z");
  check_channel_vector(mean2, "mean2", z);
  STD_TORCH_CHECK(z2.has_value() == mean2.has_value(), "z2 and mean2 must be given together");
  check_activation_like(du, "du", z, "z");
  check_activation_like(activation, "activation", z, "z");
  const int64_t kinds = z2 ? 3 : 2;
  check_same_device(sums, "sums", z);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == kinds && sums.size(1) == z.size(1),
                  "sums must have shape [", kinds, ", ", z.size(1), "], got ", shape_of(sums));
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float, "sums must be Float, got ",
                  torch::headeronly::toString(sums.scalar_type()));
  STD_TORCH_CHECK(sums.is_contiguous(), "sums must be contiguous, got strides ", strides_of(sums));
  const bool aligned = is_aligned({{"dy", dy},
                                   {"dy2", dy2},
                                   {"z", z},
                                   {"y", y},
                                   {"z2", z2},
                                   {"du", du},
                                   {"activation", activation}});
  check_mask(mask, z, true);
  check_memory({{"sums", sums, Access::whole}, {"du", du}, {"activation", activation}},
               {{"dy", dy},
                {"dy2", dy2},
                {"z", z},
                {"y", y},
                {"z2", z2},
                {"mask", mask, Access::whole},
                {"mean", mean, Access::whole},
                {"scale", scale, Access::whole},
                {"beta", beta, Access::whole},
                {"mean2", mean2, Access::whole}});
  check_cuda(z, "z");
  if (z.numel() == 0) {
    torch::stable::fill_(sums, 0);
    return;
  }
  const Call call("cuda_norm_backward_reduce", z);
  const Tiling tiling =
      cuda::reduction_tiling(call.m, call.c, cuda::lanes_of(call.c, aligned), call.processors());
  const Tensor scratch = float_scratch(z, {kinds, tiling.tiles, call.c});
  call.check(cuda::norm_backward_reduce(
      call.launch, {call.m, call.c, tiling, pointer<void>(dy), pointer<void>(dy2), pointer<void>(z),
                    affine_of(mean, scale, beta), mask_of(relu, y, mask), pointer<void>(y),
                    pointer<uint8_t>(mask), relu, pointer<void>(z2), pointer<float>(mean2),
                    pointer<void>(du), pointer<void>(activation), pointer<float>(scratch)}));
  call.check(cuda::merge_sums(
      call.launch, {call.c, tiling.tiles, kinds, pointer<float>(scratch), pointer<float>(sums)}));
}

void norm_backward_apply(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& scale,
                         const Tensor& beta, const OptionalTensor& y, bool relu,
                         const OptionalTensor& coef_z, const OptionalTensor& coef_1,
                         const OptionalTensor& z2, const OptionalTensor& mean2,
                         const OptionalTensor& scale2, const OptionalTensor& coef_z2,
                         const OptionalTensor& coef_12, const Tensor& dz, const OptionalTensor& du,
                         const OptionalTensor& dz2) {
  check_form(z);
  check_activation_like(dy, "dy", z, "z");
  check_affine(mean, scale, beta, z);
  check_activation_like(y, "y", z, "z");
  check_channel_vector(coef_z, "coef_z", z);
  check_channel_vector(coef_1, "coef_1", z);
  check_activation_like(z2, "z2", z, "z");
  check_channel_vector(mean2, "mean2", z);
  check_channel_vector(scale2, "scale2", z);
  check_channel_vector(coef_z2, "coef_z2", z);
  check_channel_vector(coef_12, "coef_12", z);
  check_activation_like(dz, "dz", z, "z");
  check_activation_like(du, "du", z, "z");
  check_activation_like(dz2, "dz2", z, "z");
  const int second = int{z2.has_value()} + mean2.has_value() + scale2.has_value() + dz2.has_value();
  STD_TORCH_CHECK(second == 0 || second == 4,
                  "z2, mean2, scale2 and dz2 must be given together, got ", second, " of 4");
  STD_TORCH_CHECK(second || (!coef_z2 && !coef_12), "coef_z2 or coef_12 is given without z2");
  check_memory({{"dz", dz}, {"du", du}, {"dz2", dz2}}, {{"dy", dy},
                                                        {"z", z},
                                                        {"y", y},
                                                        {"z2", z2},
                                                        {"mean", mean, Access::whole},
                                                        {"scale", scale, Access::whole},
                                                        {"beta", beta, Access::whole},
                                                        {"coef_z", coef_z, Access::whole},
                                                        {"coef_1", coef_1, Access::whole},
                                                        {"mean2", mean2, Access::whole},
                                                        {"scale2", scale2, Access::whole},
                                                        {"coef_z2", coef_z2, Access::whole},
                                                        {"coef_12", coef_12, Access::whole}});
  check_cuda(z, "z");
  if (z.numel() == 0) return;
  const Call call("cuda_norm_backward_apply", z);
  const bool aligned = is_aligned(
      {{"dy", dy}, {"z", z}, {"y", y}, {"z2", z2}, {"dz", dz}, {"du", du}, {"dz2", dz2}});
  const Tiling tiling =
      cuda::elementwise_tiling(call.m, call.c, cuda::lanes_of(call.c, aligned), call.processors());
  call.check(cuda::norm_backward_apply(
      call.launch,
      {call.m, call.c, tiling, pointer<void>(dy), pointer<void>(z), affine_of(mean, scale, beta),
       mask_of(relu, y, std::nullopt), pointer<void>(y), pointer<float>(coef_z),
       pointer<float>(coef_1), pointer<void>(dz), pointer<void>(du), pointer<void>(z2),
       pointer<float>(mean2), pointer<float>(scale2), pointer<float>(coef_z2),
       pointer<float>(coef_12), pointer<void>(dz2)}));
}

void norm_forward(const Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps, const OptionalTensor& residual, bool relu, bool add_after_act,
                  const Tensor& out, const OptionalTensor& mask, const Tensor& mean,
                  const Tensor& var) {
  check_form(z);
  check_channel_vector(weight, "weight", z);
  check_channel_vector(bias, "bias", z);
  check_activation_like(residual, "residual", z, "z");
  check_activation_like(out, "out", z, "z");
  check_channel_vector(mean, "mean", z);
  check_channel_vector(var, "var", z);
  check_held(z);
  const bool aligned = is_aligned({{"z", z}, {"residual", residual}, {"out", out}});
  check_mask(mask, z, aligned);
  check_memory({{"out", out},
                {"mask", mask, Access::whole},
                {"mean", mean, Access::whole},
                {"var", var, Access::whole}},
               {{"z", z},
                {"residual", residual},
                {"weight", weight, Access::whole},
                {"bias", bias, Access::whole}});
  check_cuda(z, "z");
  if (z.numel() == 0) return;
  const Call call("cuda_norm_forward", z);
  const Tiling tiling =
      cuda::held_tiling(call.m, call.c, cuda::lanes_of(call.c, aligned), call.element_size);
  call.check(cuda::norm_forward(
      call.launch,
      {call.m, call.c, tiling, pointer<void>(z), pointer<float>(weight), pointer<float>(bias),
       static_cast<float>(eps), pointer<void>(residual), relu, add_after_act, pointer<void>(out),
       pointer<uint8_t>(mask), pointer<float>(mean), pointer<float>(var)}));
}

void norm_backward(const Tensor& dy, const OptionalTensor& dy2, const Tensor& z, const Tensor& mean,
                   const Tensor& scale, const Tensor& beta, const Tensor& rstd,
                   const OptionalTensor& y, const OptionalTensor& mask, bool relu, const Tensor& dz,
                   const OptionalTensor& du, const OptionalTensor& activation, const Tensor& sum_du,
                   const Tensor& sum_du_xhat) {
  check_form(z);
  check_activation_like(dy, "dy", z, "z");
  check_activation_like(dy2, "dy2", z, "z");
  check_affine(mean, scale, beta, z);
  check_channel_vector(rstd, "rstd", z);
  check_activation_like(y, "y", z, "z");
  check_activation_like(dz, "dz", z, "z");
  check_activation_like(du, "du", z, "z");
  check_activation_like(activation, "activation", z, "z");
  check_channel_vector(sum_du, "sum_du", z);
  check_channel_vector(sum_du_xhat, "sum_du_xhat", z);
  check_held(z);
  check_mask(mask, z, true);
  check_memory({{"dz", dz},
                {"du", du},
                {"activation", activation},
                {"sum_du", sum_du, Access::whole},
                {"sum_du_xhat", sum_du_xhat, Access::whole}},
               {{"dy", dy},
                {"dy2", dy2},
                {"z", z},
                {"y", y},
                {"mask", mask, Access::whole},
                {"mean", mean, Access::whole},
                {"scale", scale, Access::whole},
                {"beta", beta, Access::whole},
                {"rstd", rstd, Access::whole}});
  check_cuda(z, "z");
  if (z.numel() == 0) return;
  const Call call("cuda_norm_backward", z);
  const bool aligned = is_aligned({{"dy", dy},
                                   {"dy2", dy2},
                                   {"z", z},
                                   {"y", y},
                                   {"dz", dz},
                                   {"du", du},
                                   {"activation", activation}});
  const Tiling tiling =
      cuda::held_tiling(call.m, call.c, cuda::lanes_of(call.c, aligned), call.element_size);
  call.check(cuda::norm_backward(
      call.launch,
      {call.m, call.c, tiling, pointer<void>(dy), pointer<void>(dy2), pointer<void>(z),
       affine_of(mean, scale, beta), pointer<float>(rstd), mask_of(relu, y, mask), pointer<void>(y),
       pointer<uint8_t>(mask), relu, pointer<void>(dz), pointer<void>(du),
       pointer<void>(activation), pointer<float>(sum_du), pointer<float>(sum_du_xhat)}));
}

}  // namespace
}  // namespace resfast

// Also for CPU tensors, which get an answer to what is wrong with them and never a launch.
#define RESFAST_NORM_OPS(m)                                                       \
  m.impl("cuda_norm_stats", TORCH_BOX(&resfast::norm_stats));                     \
  m.impl("cuda_norm_prepare", TORCH_BOX(&resfast::norm_prepare));                 \
  m.impl("cuda_norm_coefficients", TORCH_BOX(&resfast::norm_coefficients));       \
  m.impl("cuda_norm_apply", TORCH_BOX(&resfast::norm_apply));                     \
  m.impl("cuda_norm_backward_reduce", TORCH_BOX(&resfast::norm_backward_reduce)); \
  m.impl("cuda_norm_backward_apply", TORCH_BOX(&resfast::norm_backward_apply));   \
  m.impl("cuda_norm_forward", TORCH_BOX(&resfast::norm_forward));                 \
  m.impl("cuda_norm_backward", TORCH_BOX(&resfast::norm_backward))

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  RESFAST_NORM_OPS(m);
}
STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  RESFAST_NORM_OPS(m);
}
