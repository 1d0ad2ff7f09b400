"""cuDNN's fused norms on CUDA devices, beside its convolutions; nvidia-cudnn-frontend runs them.

In training norm, addition and ReLU are one graph each way (NormAddRelu, DReluForkDNorm), whatever
the size of the tensor. cuDNN also fuses norms into fp16 convolutions; those are not taken, see
docs/numerics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends import cudnn_graphs as graphs
from resfast.backends.interface import (
    Affine,
    Below,
    ConvGeometry,
    NormGradient,
    empty_nhwc,
    nhwc,
    pack_mask,
)
from resfast.backends.library_pool import LibraryPool

DEVICE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of pointers, and of a pixel's channels in an activation, in bytes
_ALIGNMENT = 16
_MOST_VALUES = 2**31


class CudnnBackend(LibraryPool):
    name = "cudnn"
    joins = True
    exact_statistics = False  # how cuDNN sums is not documented

    def unavailable_reason(self) -> str | None:
        if not graphs.installed():
            return "nvidia-cudnn-frontend is not installed"
        return graphs.load_error() if torch.cuda.is_available() else "no CUDA device"

    def declines(self, function: str, z: Tensor) -> str | None:
        if z.device.type != DEVICE:
            return f"it runs on {DEVICE}, the tensor is on {z.device.type}"
        if z.dtype not in _DTYPES:
            return f"no graph for {z.dtype}"
        if z.dim() == 4 and function.startswith("norm"):
            of = _ALIGNMENT // z.element_size()
            if z.shape[1] % of:
                return f"{z.shape[1]} channels, not a multiple of {of}"
            if not 0 < z.numel() <= _MOST_VALUES:
                return f"{z.numel()} values"
        return graphs.unsupported(z.device.index, z.dtype)

    def fusing_declines(
        self, function: str, x: Tensor, weight: Tensor, g: ConvGeometry
    ) -> str | None:
        if x.dtype != torch.float16:
            return "cuDNN fuses norms into fp16 convolutions only"
        return "cuDNN's fp16 fusions round the affine to fp16 and sum z² uncentred"

    # ---- a block's end

    def norm_join_reduce(
        self, dy: Tensor, dy2: Tensor | None, y: Tensor, end: Below, du: Tensor
    ) -> Tensor:
        sum_du, sum_centred = self._sums(dy, end.z, end.affine.mean, y, True, du, dy2, end.mask)
        if end.z2 is None or end.mean2 is None:
            return torch.stack([sum_du, sum_centred])
        _, sum_centred2 = self._sums(du, end.z2, end.mean2, None, False)
        return torch.stack([sum_du, sum_centred, sum_centred2])

    def _sums(
        self,
        dy: Tensor,
        z: Tensor,
        mean: Tensor,
        y: Tensor | None,
        relu: bool,
        du: Tensor | None = None,
        dy2: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(Σdu, Σdu·(z − mean)): of a norm's backward with rstd 1, since cuDNN has no graph for
        the sums alone.
        """
        one = torch.ones_like(mean)
        affine = Affine(mean, one, one)  # the mask is given: beta is not read
        _, *sums = self.norm_backward(dy, z, affine, one, y, relu, None, du, dy2, mask)
        return sums[0], sums[1]

    def norm_join_apply(
        self, gradient: NormGradient, dz: Tensor, second: NormGradient | None, dz2: Tensor | None
    ) -> None:
        for g, out in ((gradient, dz), (second, dz2)):
            if g is not None and out is not None:
                affine = Affine(g.mean, g.scale, g.mean)  # no mask is recomputed: beta is not read
                self.norm_backward_apply(
                    g.du, g.z, affine, None, False, g.coef_z, g.coef_1, out, None
                )

    # ---- normalisation

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # cuDNN has no graph for the statistics alone; eps does not reach them
        _, mean, var = self.norm_forward(z, None, None, 1.0, None, False, False, None)
        return mean, var.mul_(z.numel() // z.shape[1])

    def norm_apply(
        self,
        z: Tensor,
        affine: Affine,
        residual: Tensor | None,
        residual_affine: Affine | None,
        relu: bool,
        add_after_act: bool,
        out: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        z = _dense(z)
        y = _apart(out, z, residual)
        operands: dict[str, Tensor | float] = {"z": z, "y": y, **_affine(affine, "")}
        if residual is not None:
            operands["residual"] = _dense(residual)
            operands |= _affine(residual_affine, "2") if residual_affine else {}
        if mask is not None:
            operands |= {"mask": mask, "zero": 0.0}
        graphs.run(
            graphs.NormApply(
                _shape(z),
                z.dtype,
                residual is not None,
                residual is not None and residual_affine is not None,
                relu,
                add_after_act and residual is not None,
                mask is not None,
            ),
            z.device,
            **operands,
        )
        return y if out is None or out is y else out.copy_(y)

    def norm_backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        rstd: Tensor,
        y: Tensor | None,
        relu: bool,
        activation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # cuDNN has no graph for the sums alone
        _, *sums = self.norm_backward(dy, z, affine, rstd, y, relu, activation, None)
        return sums[0], sums[1]

    def norm_backward_apply(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        y: Tensor | None,
        relu: bool,
        coef_z: Tensor | None,
        coef_1: Tensor | None,
        dz: Tensor,
        du: Tensor | None,
    ) -> None:
        source = None if not relu else "again" if y is None else "y"
        stored = du if source else None
        graph = graphs.NormBackwardApply(
            _shape(z), z.dtype, source, coef_z is not None, coef_1 is not None, stored is not None
        )
        written = _apart(dz, dy, z, y)
        operands: dict[str, Tensor | float] = {"dy": _dense(dy), "dz": written}
        vectors = {"scale": affine.scale, "coef_z": coef_z, "coef_1": coef_1}
        if graph.reads_z:
            operands["z"] = _dense(z)
            vectors["mean"] = affine.mean
        if source == "again":
            vectors["beta"] = affine.beta
        operands |= {name: _vector(v) for name, v in vectors.items() if v is not None}
        if source == "y" and y is not None:
            operands["y"] = _dense(y)
        if stored is not None:
            operands["du"] = stored
        elif du is not None:
            du.copy_(dy)
        graphs.run(graph, z.device, **operands)
        if written is not dz:
            dz.copy_(written)

    # ---- both passes at once

    def reads_once(self, z: Tensor) -> bool:
        return True

    def norm_forward(
        self,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        relu: bool,
        add_after_act: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = _dense(z)
        y = empty_nhwc(z.shape, z)
        weight = _new_vector(z).fill_(1) if weight is None else _vector(weight)
        bias = _new_vector(z).zero_() if bias is None else _vector(bias)
        # cuDNN adds, and tells the mask, with a ReLU behind it only
        fuses = relu and (residual is None or not add_after_act)
        mean, var = graphs.norm_forward(
            z,
            weight,
            bias,
            eps,
            _dense(residual) if fuses and residual is not None else None,
            relu,
            y,
            mask if fuses else None,
        )
        if not fuses:
            if residual is not None:
                y += residual
            if mask is not None:
                mask.copy_(pack_mask(y))
        return y, mean, var

    def norm_backward(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        rstd: Tensor,
        y: Tensor | None,
        relu: bool,
        activation: Tensor | None,
        du: Tensor | None,
        dy2: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, dy = _dense(z), _dense(dy)
        dy2 = None if dy2 is None else _dense(dy2)
        source = None
        if relu and mask is not None:
            source = "mask"
        elif relu and y is None and du is None:
            source = "again"
        if activation is not None and source != "again":
            self.norm_apply(z, affine, None, None, relu, False, out=activation)
        if source is None:  # a ReLU told by its output, or one computed again whose du is kept
            if relu and y is None:
                y = self.norm_apply(z, affine, None, None, True, False)
            dy, dy2 = _du(dy, dy2, y if relu else None, du), None
        stored = {"again": activation, "mask": du}.get(source or "")
        dz, sum_du, sum_du_xhat = empty_nhwc(z.shape, z), _new_vector(z), _new_vector(z)
        operands: dict[str, Tensor | float] = {
            **{"dy": dy, "z": z, "dz": dz, "dweight": sum_du_xhat, "dbias": sum_du},
            **{"weight": affine.scale / rstd, "mean": _vector(affine.mean), "rstd": _vector(rstd)},
        }
        if dy2 is not None:
            operands["dy2"] = dy2
        if source == "again":
            operands["bias"] = _vector(affine.beta)
        elif mask is not None and source == "mask":
            operands["mask"] = mask
        if stored is not None:
            operands["activation" if source == "again" else "du"] = stored
        graph = graphs.NormBackward(_shape(z), z.dtype, source, dy2 is not None, stored is not None)
        graphs.run(graph, z.device, **operands)
        return dz, sum_du, sum_du_xhat


def _du(dy: Tensor, dy2: Tensor | None, y: Tensor | None, out: Tensor | None) -> Tensor:
    """dy + dy2, where y is positive if it is given; in ``out`` if that is given."""
    if dy2 is not None:
        dy = torch.add(dy, dy2, out=out)
    if y is not None:
        out = torch.empty_like(dy) if out is None else out
        torch.ops.aten.threshold_backward.grad_input(dy, _dense(y), 0, grad_input=out)
        return out
    return dy if out is None or out is dy else out.copy_(dy)


def _shape(z: Tensor) -> graphs.Shape:
    n, c, h, w = z.shape
    return n, c, h, w


def _dense(t: Tensor) -> Tensor:
    """As cuDNN reads an activation: NHWC, aligned."""
    t = nhwc(t)
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone()


def _apart(out: Tensor | None, like: Tensor, *others: Tensor | None) -> Tensor:
    """``out``, or a new tensor where that is none or an operand: cuDNN promises nothing then."""
    operands = (like, *others)
    if out is None or any(t is not None and t.data_ptr() == out.data_ptr() for t in operands):
        return empty_nhwc(like.shape, like)
    return out


def _vector(v: Tensor) -> Tensor:
    """As cuDNN reads it: norms may be kept in 16 bits, or lie anywhere in one flat tensor."""
    v = v.to(torch.float32).contiguous()
    return v if v.data_ptr() % _ALIGNMENT == 0 else v.clone()


def _new_vector(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[1], dtype=torch.float32)


def _affine(affine: Affine, which: str) -> dict[str, Tensor]:
    return {f"{name}{which}": _vector(v) for name, v in affine._asdict().items()}
