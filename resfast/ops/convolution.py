"""A convolution with as much of the norms around it as the backend and the step fuse.

Not ops themselves: ops with a convolution in them call these below their own boundary. Whatever a
backend does not fuse runs in a pass of its own, with the same result.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resfast.backends.fusion import current_fusion
from resfast.backends.interface import Backend, Below, ConvGeometry, NormGradient
from resfast.backends.scratch import scratch
from resfast.backends.select import find, report
from resfast.ops import norm as N

FUSIONS = ("prologue", "epilogue", "norm_backward")


class Activation(NamedTuple):
    """A convolution's input: z itself, or relu(norm(z)), which need not be stored.

    ``a``: relu(norm(z)) where it is in memory.
    """

    z: Tensor
    norm: N.Norm | None = None
    a: Tensor | None = None


class Fuses(NamedTuple):
    """The backend of one convolution's pass, and which norms around it its kernel takes.

    prologue: relu(norm(z)) as input, of fprop or wgrad. epilogue: fprop's statistics; dgrad's
    residual, mask and sums. norm_backward: dz as a ``NormGradient``.
    """

    backend: Backend
    declined: dict[str, str]
    own: bool = True
    prologue: bool = False
    epilogue: bool = False
    norm_backward: bool = False


def fuses(function: str, x: Tensor, weight: Tensor, g: ConvGeometry) -> Fuses:
    """What would run ``function`` on x (dz for a gradient), by the step in force."""
    backend, declined = find(function, x)
    reason = backend.fusing_declines(function, x, weight, g)
    if reason is not None:
        return Fuses(backend, {**declined, f"{backend.name} convolution": reason}, own=False)
    fusion = current_fusion()
    c0, c, c_plus = (fusion.reaches(step) for step in ("c0", "c", "c+"))
    if function == "conv_fprop":
        return Fuses(backend, declined, prologue=c, epilogue=c0)
    if function == "conv_dgrad":
        return Fuses(backend, declined, epilogue=c0, norm_backward=c_plus)
    return Fuses(backend, declined, prologue=c0, norm_backward=c_plus)


def _used(
    function: str, x: Tensor, weight: Tensor, g: ConvGeometry, wanted: dict[str, bool]
) -> Fuses:
    """``fuses``, narrowed to what is wanted."""
    can = fuses(function, x, weight, g)
    off = {name: False for name in FUSIONS if not wanted.get(name)}
    return can._replace(**off)  # type: ignore[arg-type]  # mypy takes ** for every field


def _report(function: str, x: Tensor, use: Fuses, name: str | None = None) -> None:
    """``name``: whose kernel it is, where not the backend's."""
    fused = tuple(n for n in FUSIONS if getattr(use, n))
    report(function, name or use.backend, x, use.declined, fused)


def stored(a: Activation) -> Tensor:
    """The activation in memory; one at a time, it may be scratch."""
    if a.a is not None:
        return a.a
    return a.z if a.norm is None else N.apply(a.z, a.norm, out=scratch("activation", a.z))


def fprop(
    a: Activation,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    statistics: bool,
    exact: bool = False,
) -> tuple[Tensor, N.Statistics | None]:
    """z ``[N, K, P, Q]``, and its statistics where they are asked for and cost no extra pass.

    ``exact``: their mean is not rounded to fp32.
    """
    wanted = {"prologue": a.norm is not None and a.a is None, "epilogue": statistics}
    use = _used("conv_fprop", a.z, weight, g, wanted)
    x = a.z if use.prologue else stored(a)
    if not use.own:
        _report("conv_fprop", a.z, use)
        return use.backend.conv_fprop(x, weight, bias, g), None
    prologue = a.norm.affine if a.norm is not None and use.prologue else None
    kernel = use.backend.fprop_kernel(x, weight, bias, g, prologue, use.epilogue, exact)
    _report("conv_fprop", a.z, use, kernel.name)
    z, moments = kernel.run()
    if moments is None:
        return z, None
    mean, m2 = moments
    return z, N.Statistics(mean, m2.div_(max(1, N.count(z))))


def wgrad(dz: Tensor | NormGradient, a: Activation, weight: Tensor, g: ConvGeometry) -> Tensor:
    """dweight."""
    lazy = isinstance(dz, NormGradient)
    wanted = {"prologue": a.norm is not None and a.a is None, "norm_backward": lazy}
    use = _used("conv_wgrad", _gradient(dz), weight, g, wanted)
    _report("conv_wgrad", _gradient(dz), use)
    x = a.z if use.prologue else stored(a)
    if use.own:
        prologue = a.norm.affine if a.norm is not None and use.prologue else None
        return use.backend.conv_wgrad_fused(dz, x, weight, g, prologue)
    assert isinstance(dz, Tensor)
    return use.backend.conv_wgrad(dz, x, weight, g)


class InputGradient(NamedTuple):
    """dx; or, with sums ``[S, C]``, du: dx masked by the ReLU below, see ``Below``.

    ``rest`` is what is still to be added to dx.
    """

    dx: Tensor
    sums: Tensor | None = None
    rest: Tensor | None = None


def dgrad(
    dz: Tensor | NormGradient,
    like: Tensor,
    weight: Tensor,
    g: ConvGeometry,
    residual: Tensor | None = None,
    residual_stride: tuple[int, int] = (1, 1),
    below: Below | None = None,
) -> InputGradient:
    """The gradient of the convolution's input, of the shape of ``like``, plus the residual.

    A residual_stride other than 1 needs a dgrad that fuses its epilogue.
    """
    wanted = {"epilogue": True, "norm_backward": isinstance(dz, NormGradient)}
    use = _used("conv_dgrad", _gradient(dz), weight, g, wanted)
    _report("conv_dgrad", _gradient(dz), use)
    n, c, h, w = like.shape
    if use.epilogue:
        dx, sums = use.backend.conv_dgrad_fused(
            dz, weight, (n, c, h, w), g, residual, residual_stride, below
        )
        return InputGradient(dx, sums)
    assert residual_stride == (1, 1)
    if use.own:
        dx, _ = use.backend.conv_dgrad_fused(dz, weight, (n, c, h, w), g, None, (1, 1), None)
        return InputGradient(dx, None, residual)
    assert isinstance(dz, Tensor)
    if residual is not None:
        added = use.backend.conv_dgrad_add(dz, like, weight, g, residual)
        if added is not None:
            return InputGradient(added)
    return InputGradient(use.backend.conv_dgrad(dz, like, weight, g), None, residual)


def _gradient(dz: Tensor | NormGradient) -> Tensor:
    return dz.du if isinstance(dz, NormGradient) else dz
