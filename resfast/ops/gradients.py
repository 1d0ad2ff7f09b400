"""The gradients that several backward ops return alike, and their fakes.

An op returns ``absent`` for what is not needed or has no tensor to be the gradient of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends.interface import ConvGeometry, empty_nhwc
from resfast.ops import convolution as C
from resfast.ops import norm as N
from resfast.ops.registry import absent


def of_norm(g: N.NormGradients, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """dgamma and dbeta in the parameters' dtypes."""
    return (
        absent(g.dz) if gamma is None else g.dgamma.to(gamma.dtype),
        absent(g.dz) if beta is None else g.dbeta.to(beta.dtype),
    )


def fake_of_norm(z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        absent(z) if gamma is None else torch.empty_like(gamma),
        absent(z) if beta is None else torch.empty_like(beta),
    )


def of_conv(
    dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dweight."""
    return (
        C.dgrad(dz, x, weight, g).dx if need_x else absent(dz),
        C.wgrad(dz, C.Activation(x), weight, g) if need_weight else absent(dz),
    )


def fake_of_conv(
    z: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        empty_nhwc(x.shape, x) if need_x else absent(z),
        torch.empty_like(weight) if need_weight else absent(z),
    )


def of_residual(
    dy: Tensor, z: Tensor, needed: bool, add_after_act: bool
) -> tuple[Tensor, Tensor | None]:
    """dresidual, and itself as the ``du`` that ``norm.backward`` writes where it is that.

    Added after the activation, the residual's gradient is dy.
    """
    if not needed:
        return absent(z), None
    dr = empty_nhwc(z.shape, z)
    if add_after_act:
        return dr.copy_(dy), None  # the same values, but an op's output may not alias its input
    return dr, dr


def fake_of_residual(z: Tensor, needed: bool) -> Tensor:
    return empty_nhwc(z.shape, z) if needed else absent(z)
