// The schema of every native op. Outputs are allocated by the caller; Python defines its own ops in
// the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("norm_stats(Tensor z, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  m.def(
      "norm_apply(Tensor z, Tensor mean, Tensor scale, Tensor beta, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_scale, Tensor? residual_beta, bool relu, "
      "bool add_after_act, Tensor(a!) out) -> ()");
  m.def(
      "norm_backward_reduce(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? y, "
      "Tensor? scale, Tensor? beta, bool relu, Tensor(a!) sum_du, Tensor(b!) sum_du_xhat, "
      "Tensor(c!)? activation) -> ()");
  m.def(
      "norm_backward_apply(Tensor dy, Tensor z, Tensor mean, Tensor scale, Tensor? beta, "
      "Tensor? y, bool relu, Tensor? coef_z, Tensor? coef_1, Tensor(a!) dz, Tensor(b!)? du) -> ()");
  m.def(
      "norm_apply_max_pool(Tensor z, Tensor mean, Tensor scale, Tensor beta, int kernel, "
      "int stride, int padding, Tensor(a!) out, Tensor(b!)? index) -> ()");
  m.def("max_pool(Tensor z, int kernel, int stride, int padding, Tensor(a!) out) -> ()");
  m.def(
      "norm_max_pool_backward_reduce(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor scale, "
      "Tensor beta, Tensor index, int kernel, int stride, int padding, Tensor(a!) sum_du, "
      "Tensor(b!) sum_du_xhat) -> ()");
  m.def(
      "norm_max_pool_backward_apply(Tensor dy, Tensor z, Tensor mean, Tensor scale, Tensor beta, "
      "Tensor index, int kernel, int stride, int padding, Tensor? coef_z, Tensor? coef_1, "
      "Tensor(a!) dz) -> ()");
  m.def("empty_kept(Tensor like, int n, int c, int h, int w) -> Tensor");
  m.def("release_kept() -> int");
  m.def("panel_columns() -> int");
  m.def("pointwise_weight(Tensor weight, Tensor? scale, Tensor(a!) packed) -> ()");
  m.def(
      "pointwise_conv(Tensor x, Tensor packed, Tensor? shift, Tensor? residual, bool relu, "
      "int stride_h, int stride_w, Tensor(a!) out) -> ()");
  m.def(
      "pointwise_conv_once(Tensor x, Tensor weight, bool transposed, Tensor? residual, "
      "int stride_h, int stride_w, Tensor(a!) out) -> ()");
  m.def(
      "im2col_dgrad(Tensor dz, Tensor weight, int stride_h, int stride_w, int padding_h, "
      "int padding_w, Tensor(a!) packed, Tensor(b!) dx) -> ()");
  m.def(
      "im2col_wgrad(Tensor x, Tensor dz, int stride_h, int stride_w, int padding_h, int padding_w, "
      "Tensor(a!) dweight) -> ()");
  m.def("direct_weight(Tensor weight, Tensor? scale, Tensor(a!) packed) -> ()");
  m.def(
      "direct_conv(Tensor x, Tensor packed, int kernel_h, int kernel_w, int stride_h, int "
      "stride_w, "
      "int padding_h, int padding_w, Tensor? shift, Tensor? residual, bool relu, Tensor(a!) out) "
      "-> ()");
  m.def("bf16_products() -> bool");
  m.def("bf16_weight(Tensor weight, Tensor(a!) packed) -> ()");
  m.def(
      "bf16_conv(Tensor x, Tensor packed, int kernel_h, int kernel_w, int stride_h, int stride_w, "
      "int padding_h, int padding_w, Tensor scale, Tensor shift, Tensor? residual, bool relu, "
      "Tensor(a!) out) -> ()");
  m.def("winograd_weight(Tensor weight, int tile, int stride, Tensor(a!) packed) -> ()");
  m.def(
      "winograd_conv(Tensor x, Tensor packed, Tensor? scale, Tensor? shift, Tensor? residual, "
      "bool relu, bool add_after_act, int stride, Tensor(a!) out) -> ()");
  m.def(
      "winograd_conv_once(Tensor x, Tensor weight, bool transposed, Tensor? residual, int tile, "
      "int stride, Tensor(a!) out) -> ()");
  m.def("winograd_wgrad(Tensor x, Tensor dz, int tile, Tensor(a!) dweight) -> ()");
  m.def(
      "take_sample(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, "
      "Tensor var, Tensor(a!) sample) -> bool");
  m.def(
      "same_sample(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, "
      "Tensor var, Tensor sample) -> bool");

  // in the CUDA library
  m.def("cuda_norm_stats(Tensor z, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  m.def(
      "cuda_norm_prepare(Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor(a!) scale, "
      "Tensor(b!) beta, Tensor(c!) rstd) -> ()");
  m.def(
      "cuda_norm_coefficients(Tensor scale, Tensor rstd, Tensor sum_du, Tensor sum_du_centred, "
      "int n, Tensor(a!) sum_du_xhat, Tensor(b!) coef_z, Tensor(c!) coef_1) -> ()");
  m.def(
      "cuda_norm_apply(Tensor z, Tensor mean, Tensor scale, Tensor beta, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_scale, Tensor? residual_beta, bool relu, "
      "bool add_after_act, Tensor(a!) out, Tensor(b!)? mask) -> ()");
  m.def(
      "cuda_norm_backward_reduce(Tensor dy, Tensor? dy2, Tensor z, Tensor mean, Tensor scale, "
      "Tensor beta, Tensor? y, Tensor? mask, bool relu, Tensor? z2, Tensor? mean2, "
      "Tensor(a!) sums, Tensor(b!)? du, Tensor(c!)? activation) -> ()");
  m.def(
      "cuda_norm_backward_apply(Tensor dy, Tensor z, Tensor mean, Tensor scale, Tensor beta, "
      "Tensor? y, bool relu, Tensor? coef_z, Tensor? coef_1, Tensor? z2, Tensor? mean2, "
      "Tensor? scale2, Tensor? coef_z2, Tensor? coef_12, Tensor(a!) dz, Tensor(b!)? du, "
      "Tensor(c!)? dz2) -> ()");
  m.def(
      "cuda_norm_forward(Tensor z, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
      "bool relu, bool add_after_act, Tensor(a!) out, Tensor(b!)? mask, Tensor(c!) mean, "
      "Tensor(d!) var) -> ()");
  m.def(
      "cuda_norm_backward(Tensor dy, Tensor? dy2, Tensor z, Tensor mean, Tensor scale, "
      "Tensor beta, Tensor rstd, Tensor? y, Tensor? mask, bool relu, Tensor(a!) dz, "
      "Tensor(b!)? du, Tensor(c!)? activation, Tensor(d!) sum_du, Tensor(e!) sum_du_xhat) -> ()");
  m.def(
      "cuda_conv_affine(Tensor x, Tensor weight, Tensor mean, Tensor scale, Tensor beta, "
      "Tensor? residual, bool relu, bool add_after_act, int stride_h, int stride_w, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w, int tile_m, int tile_n, "
      "Tensor(a!) out) -> ()");
  m.def(
      "cuda_conv_stats(Tensor x, Tensor weight, int stride_h, int stride_w, int padding_h, "
      "int padding_w, int dilation_h, int dilation_w, int tile_m, int tile_n, Tensor(a!) z, "
      "Tensor(b!) mean, Tensor(c!) m2) -> ()");
}
