"""cuDNN's convolution with bias, residual and ReLU in one kernel, for inference on CUDA.

``aten::cudnn_convolution_relu`` is relu(conv(x, weight) + bias), ``cudnn_convolution_add_relu``
relu(conv(x, weight) + z + bias), both in float32 until y is stored. Neither takes a scale per
channel, so the norm is folded into weight and bias. Never executed on a GPU so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends.interface import ConvGeometry, NormVectors, nhwc
from resfast.backends.packed import PackedConvolution

HALF = (torch.bfloat16, torch.float16)
# of the error criterion, see docs/numerics.md
HALF_FACTOR = 1.1
_aten = torch.ops.aten


def cudnn_declines(
    x: Tensor, residual: Tensor | None, relu: bool, add_after_act: bool
) -> str | None:
    """Why cuDNN has no one kernel for this, or None.

    Without a ReLU its convolution adds the bias in a pass of its own, as after the ReLU it would
    the residual: one that applies the norm instead costs no more and rounds less.
    """
    if not relu:
        return "it fuses a bias only with a ReLU"
    if residual is not None and add_after_act:
        return "it adds before the ReLU only"
    if x.dtype not in (torch.float32, *HALF):
        return f"no kernel for {x.dtype}"
    if not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_available():
        return "cuDNN is off"
    # PyTorch lets it take any algorithm here, whatever these say
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return "deterministic algorithms were asked for"
    return None


def fold(
    weight: Tensor, bias: Tensor | None, norm: NormVectors, dtype: torch.dtype, joined: bool
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of ``dtype`` of the convolution and its norm; folded first, then rounded once.

    ``joined``: a residual is added.

    Raises:
        ArithmeticError: ``dtype`` holds a channel with a larger error than its roundoff, or results
            would be outside the error criterion.
    """
    scale, shift = norm.scale_and_shift(bias, dtype)
    if dtype in HALF and _excess(norm, shift, weight.dtype == dtype, joined) > HALF_FACTOR**2:
        raise ArithmeticError(f"rounding folded vectors to {dtype} costs too much accuracy here")
    exact = weight.detach().to(scale.dtype) * scale.view(-1, 1, 1, 1)
    folded = nhwc(exact.to(dtype))
    size, error = (t.double().square().sum((1, 2, 3)) for t in (exact, folded - exact))
    # not `error > …`: NaN is no weight either
    held = error <= (torch.finfo(dtype).eps / 2) ** 2 * size
    rounded = shift.to(dtype)
    lost = int((~(held & rounded.isfinite())).sum())
    if lost:
        raise ArithmeticError(f"{dtype} does not hold the folded weights of {lost} channels")
    return folded, rounded


def _excess(norm: NormVectors, shift: Tensor, rounded: bool, joined: bool) -> float:
    """Squared error to be expected beside that of a convolution, a norm and an addition apart.

    In units of a rounding's, relative to its value, with z distributed as the running statistics
    say. Apart: z, u and the sum are rounded; here the weights, which z's variation bears, shift and
    the sum. ``rounded``: the weights are already, so that folding rounds them once more, and
    otherwise only as they are apart. What the ReLU cuts off costs nothing.
    """
    mean, scale, beta = (v.double() for v in norm.affine(shift.dtype))
    var = norm.var.double()
    of_z = scale**2 * (mean**2 + var)
    of_u = beta**2 + scale**2 * var
    apart = (1 if rounded else 2) * of_z + (2 if joined else 1) * of_u
    here = of_z + shift.double() ** 2 + of_u
    share = torch.ones_like(beta)
    if not joined:
        share = torch.special.ndtr(beta / (scale.abs() * var.sqrt()).clamp(min=1e-30))
    return float((here * share).sum() / (apart * share).sum())


def cudnn_convolution(
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: NormVectors,
    dtype: torch.dtype,
    joined: bool,
) -> PackedConvolution:
    """The convolution for activations of ``dtype``, where ``cudnn_declines`` has no objection.

    ``weight`` and ``bias`` may be more exact than ``dtype``.

    Raises:
        ArithmeticError: see ``fold``.
    """
    folded, shift = fold(weight, bias, norm, dtype, joined)

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        assert relu
        assert out is None
        if residual is None:
            return nhwc(_aten.cudnn_convolution_relu(nhwc(x), folded, shift, *g))
        return nhwc(
            _aten.cudnn_convolution_add_relu(nhwc(x), folded, nhwc(residual), 1.0, shift, *g)
        )

    return run
