"""cuDNN's own graphs of norms, through the optional package nvidia-cudnn-frontend.

What cuDNN 9 has an engine for (its developer guide's normalization and generic runtime-fusion
patterns; asked of cuDNN itself in tests/test_cudnn_graphs.py): batch norm in training with
addition, ReLU and the ReLU's bits; its backward behind a ReLU given by bits or computed again from
the norm's input; element-wise chains. Activations are NHWC, per-channel vectors float32.

A graph is drawn, planned and compiled once for a shape and kept for the process: a captured CUDA
graph calls its kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
# of running statistics, where the new value is to be the batch's alone
_WHOLLY_NEW = 1.0


def installed() -> bool:
    """Whether the package is there; nothing of it is loaded."""
    return importlib.util.find_spec("cudnn") is not None


@functools.cache
def load_error() -> str | None:
    """Why it does not serve, or None."""
    try:
        version = _cudnn().backend_version()
    except Exception as error:
        text = f"nvidia-cudnn-frontend does not load: {type(error).__name__}: {error}"
        return text.splitlines()[0]
    return None if version >= 90000 else f"it needs cuDNN 9, there is {version}"


def _cudnn() -> Any:
    # after torch, which has loaded the cuDNN and NVRTC that both are to use
    import cudnn

    return cudnn


class Drawing:
    """One cuDNN graph while it is drawn: its operands by name.

    ``options`` go to the graph: a handle, or the properties of a device that is not there.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, **options: Any) -> None:
        types = _cudnn().data_type
        self.float, self.bits = types.FLOAT, types.BOOLEAN
        self.stored = {
            torch.float32: types.FLOAT,
            torch.bfloat16: types.BFLOAT16,
            torch.float16: types.HALF,
        }[dtype]
        self.shape = shape
        self.operands: dict[str, Any] = {}
        self.graph: Any = _cudnn().pygraph(
            io_data_type=self.stored,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            **options,
        )

    def operand(self, name: str, shape: Shape, data_type: Any, by_value: bool = False) -> Any:
        _, c, h, w = shape
        self.operands[name] = self.graph.tensor(
            name=name,
            dim=list(shape),
            stride=[c * h * w, 1, w * c, c],
            data_type=data_type,
            is_pass_by_value=by_value,
        )
        return self.operands[name]

    def activation(self, name: str) -> Any:
        return self.operand(name, self.shape, self.stored)

    def mask(self, name: str) -> Any:
        """One bit a value, in the order of memory."""
        return self.operand(name, self.shape, self.bits)

    def vector(self, name: str) -> Any:
        return self.operand(name, (1, self.shape[1], 1, 1), self.float)

    def scalar(self, name: str) -> Any:
        """A float on the host."""
        return self.operand(name, (1, 1, 1, 1), self.float, by_value=True)

    def output(self, name: str, tensor: Any, data_type: Any) -> None:
        tensor.set_output(True).set_data_type(data_type)
        self.operands[name] = tensor

    # ---- what several graphs share

    def centred(self, tensor: Any, name: str) -> Any:
        """tensor − mean"""
        return self.graph.sub(a=tensor, b=self.vector(f"mean{name}"))

    def scaled(self, tensor: Any, name: str) -> Any:
        """tensor·scale + beta"""
        product = self.graph.scale(input=tensor, scale=self.vector(f"scale{name}"))
        return self.graph.bias(input=product, bias=self.vector(f"beta{name}"))

    def positive(self, y: Any) -> None:
        """The mask of y > 0 is an output."""
        zero = self.scalar("zero")
        self.output("mask", self.graph.cmp_gt(input=y, comparison=zero), self.bits)


class Graph(Protocol):
    """What tells one graph from another, hashable: its shape, dtype and choices."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def draw(self, d: Drawing) -> None: ...


@dataclass(frozen=True)
class NormForward:
    """z, weight, bias, eps [, residual] → y, mean, var [, mask]; NormAddRelu where all is asked.

    var is the *unbiased* variance: cuDNN returns the biased one only as 1/√(var + eps), of which
    too little is left where var is far below eps. It goes through running statistics that start at
    ``zeros`` and take the batch's ``wholly``. A residual and a mask need the ReLU.
    """

    shape: Shape
    dtype: torch.dtype
    residual: bool
    relu: bool
    mask: bool

    def draw(self, d: Drawing) -> None:
        g, zeros = d.graph, d.vector("zeros")
        y, mean, rstd, new_mean, new_var = g.batchnorm(
            name="norm",
            input=d.activation("z"),
            scale=d.vector("weight"),
            bias=d.vector("bias"),
            in_running_mean=zeros,
            in_running_var=zeros,
            epsilon=d.scalar("eps"),
            momentum=d.scalar("wholly"),
        )
        vectors = {"mean": mean, "rstd": rstd, "new_mean": new_mean, "var": new_var}
        for name, v in vectors.items():
            d.output(name, v, d.float)
        if self.residual:
            y = g.add(a=y, b=d.activation("residual"))
        if self.relu:
            y = g.relu(input=y)
        d.output("y", y, d.stored)
        if self.mask:
            d.positive(y)


@dataclass(frozen=True)
class NormBackward:
    """dy [+ dy2], z, weight, mean, rstd → dz, dweight, dbias [, du] [, activation].

    du is dy + dy2 behind the ReLU: of ``mask`` (DReluForkDNorm, du may be stored), or of the norm
    computed again from z and ``bias`` ("again", its result may be stored); dy itself with None.
    """

    shape: Shape
    dtype: torch.dtype
    relu: str | None
    second: bool = False
    store: bool = False

    def draw(self, d: Drawing) -> None:
        g = d.graph
        z, du = d.activation("z"), d.activation("dy")
        weight, mean, rstd = (d.vector(name) for name in ("weight", "mean", "rstd"))
        if self.second:
            du = g.add(a=du, b=d.activation("dy2"))
        if self.relu == "again":
            bias = d.vector("bias")
            u = g.batchnorm_inference(
                input=z, mean=mean, inv_variance=rstd, scale=weight, bias=bias
            )
            if self.store:
                d.output("activation", g.relu(input=u), d.stored)
            du = g.relu_backward(loss=du, input=u)
        elif self.relu == "mask":
            du = g.scale(input=du, scale=d.mask("mask"))
            if self.store:
                d.output("du", du, d.stored)
        if self.relu:
            du.set_data_type(d.stored)
        dz, dweight, dbias = g.batchnorm_backward(
            name="norm_backward", grad=du, input=z, scale=weight, mean=mean, inv_variance=rstd
        )
        d.output("dz", dz, d.stored)
        d.output("dweight", dweight, d.float)
        d.output("dbias", dbias, d.float)


@dataclass(frozen=True)
class NormApply:
    """z and its affine [, residual and its affine] → y [, mask]."""

    shape: Shape
    dtype: torch.dtype
    residual: bool
    residual_affine: bool
    relu: bool
    add_after_act: bool
    mask: bool

    def draw(self, d: Drawing) -> None:
        g = d.graph
        y = d.scaled(d.centred(d.activation("z"), ""), "")
        if self.relu and self.add_after_act:
            y = g.relu(input=y)
        if self.residual:
            r = d.activation("residual")
            if self.residual_affine:
                r = d.scaled(d.centred(r, "2"), "2")
            y = g.add(a=y, b=r)
        if self.relu and not self.add_after_act:
            y = g.relu(input=y)
        d.output("y", y, d.stored)
        if self.mask:
            d.positive(y)


@dataclass(frozen=True)
class NormBackwardApply:
    """dy, mean, scale [, z, coef_z] [, coef_1] → dz [, du].

    The ReLU is that of the output ``y`` ("y"), or of u computed again from z and beta ("again").
    """

    shape: Shape
    dtype: torch.dtype
    relu: str | None
    coef_z: bool
    coef_1: bool
    store_du: bool

    @property
    def reads_z(self) -> bool:
        return self.coef_z or self.relu == "again"

    def draw(self, d: Drawing) -> None:
        g = d.graph
        du = d.activation("dy")
        scale = d.vector("scale")
        z = d.centred(d.activation("z"), "") if self.reads_z else None
        if self.relu == "again":
            u = g.bias(input=g.scale(input=z, scale=scale), bias=d.vector("beta"))
            du = g.relu_backward(loss=du, input=u)
        elif self.relu == "y":
            du = g.relu_backward(loss=du, input=d.activation("y"))
        if self.store_du:
            d.output("du", du, d.stored)
        dz = g.scale(input=du, scale=scale)
        if self.coef_z:
            dz = g.add(a=dz, b=g.scale(input=z, scale=d.vector("coef_z")))
        if self.coef_1:
            dz = g.bias(input=dz, bias=d.vector("coef_1"))
        d.output("dz", dz, d.stored)


class Plan(NamedTuple):
    """A compiled graph, its operands by name, and the bytes it works in."""

    graph: Any
    operands: dict[str, Any]
    workspace: int


def engines(graph: Graph, **options: Any) -> Drawing:
    """Draw it and ask cuDNN which of its engines take it.

    Raises:
        cudnn.cudnnGraphNotSupportedError: none.
    """
    heuristics = _cudnn().heur_mode
    d = Drawing(graph.shape, graph.dtype, **options)
    graph.draw(d)
    d.graph.validate()
    d.graph.build_operation_graph()
    d.graph.create_execution_plans([heuristics.A, heuristics.FALLBACK])
    return d


def plan(graph: Graph, **options: Any) -> Plan:
    """Compile it for the first engine that can be built.

    Raises:
        cudnn.cudnnGraphNotSupportedError: there is none.
    """
    d = engines(graph, **options)
    d.graph.check_support()
    d.graph.build_plans()
    return Plan(d.graph, d.operands, d.graph.get_workspace_size())


# A handle and what it runs may be one thread's at a time; autograd runs backward in others.
_lock = threading.RLock()
_handles: dict[int, Any] = {}
_plans: dict[tuple[int | None, Graph], Plan] = {}


@contextlib.contextmanager
def _handle(device: torch.device) -> Iterator[Any]:
    """The device's handle, on the current stream."""
    cudnn = _cudnn()
    with torch.cuda.device(device):
        handle = _handles.get(device.index)
        if handle is None:
            handle = _handles[device.index] = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        yield handle


@functools.lru_cache(maxsize=64)
def _on_host(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def run(graph: Graph, device: torch.device, **operands: Tensor | float) -> None:
    """Run it on the device's current stream, planned at its first use there.

    Raises:
        RuntimeError: cuDNN has no engine for it, or fails.
    """
    with _lock, _handle(device) as handle:
        made = _plans.get((device.index, graph))
        if made is None:
            made = _plans[device.index, graph] = plan(graph, handle=handle)
        assert operands.keys() == made.operands.keys(), graph
        pack = {
            made.operands[name]: _on_host(v) if isinstance(v, float) else v
            for name, v in operands.items()
        }
        workspace = torch.empty(made.workspace, dtype=torch.uint8, device=device)
        made.graph.execute(pack, workspace, handle=handle)


def norm_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes y and its bit mask; (mean, biased var) ``[C]``."""
    n, c, h, w = z.shape
    mean, rstd, new_mean, var = (torch.empty_like(weight) for _ in range(4))
    operands: dict[str, Tensor | float] = {
        **{"z": z, "weight": weight, "bias": bias, "zeros": torch.zeros_like(weight)},
        **{"eps": eps, "wholly": _WHOLLY_NEW},
        **{"y": y, "mean": mean, "rstd": rstd, "new_mean": new_mean, "var": var},
    }
    if residual is not None:
        operands["residual"] = residual
    if mask is not None:
        operands |= {"mask": mask, "zero": 0.0}
    graph = NormForward((n, c, h, w), z.dtype, residual is not None, relu, mask is not None)
    run(graph, z.device, **operands)
    count = n * h * w
    return mean, var.mul_((count - 1) / count)


@functools.cache
def unsupported(index: int, dtype: torch.dtype) -> str | None:
    """Why cuDNN has no engine for norms of ``dtype`` on that device, or None."""
    shape = (2, 64, 8, 8)
    asked: tuple[Graph, ...] = (
        NormForward(shape, dtype, residual=True, relu=True, mask=True),
        NormBackward(shape, dtype, "mask", second=True, store=True),
    )
    try:
        with _lock, _handle(torch.device("cuda", index)) as handle:
            for graph in asked:
                plan(graph, handle=handle)
    except Exception as error:
        return f"cuDNN has no engine: {str(error).splitlines()[0]}"
    return None
