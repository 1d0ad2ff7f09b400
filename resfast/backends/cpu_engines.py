"""A convolution of an inference plan on CPU: by the fastest kernel that is exact enough.

winograd4, winograd2, pointwise, direct: resfast's own in float32, where they run the convolution.
bf16: its own in bfloat16, which has no rival, since oneDNN's takes no scale. onednn: runs all of
float32.

A Winograd kernel runs a layer only where its error is within the criterion, on the layer's weights
and what arrives there in the call that makes the plan (``accuracy``). The others are timed once a
size when a plan is made, and the fastest is remembered (``tuning``): without a measurement, and
where none is faster by a margin, the kernel stands that the shape alone gives (``own_kernel``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import TorchDispatchMode

from resfast import native
from resfast.backends import tuning
from resfast.backends.accuracy import Judge, window
from resfast.backends.direct import is_direct
from resfast.backends.interface import ConvGeometry, NormVectors, empty_nhwc
from resfast.backends.packed import (
    TILES,
    PackedConvolution,
    own_kernel,
    prepare_convolution,
)
from resfast.backends.pointwise import is_pointwise
from resfast.backends.processor import last_cache
from resfast.backends.select import report
from resfast.backends.winograd import is_winograd, tiles_of

ONEDNN = "onednn"
# a kernel other than the rule's must be faster by so much, and in so many of the rounds
MARGIN = 0.05
SHARE = 0.8
# where a kernel's median is more than so many times its best, others use the processor
DISTURBED = 1.5
# of the weights, in turn: which pages they lie in alone changes a time by a quarter or more
COPIES = 3
# of a measurement: a size takes about SECONDS, but so many rounds at least and at most; and only
# so many where it is disturbed
ROUNDS = (7, 21)
IN_VAIN = 3
SECONDS = 0.15


class Prepared(NamedTuple):
    """A convolution by the kernel that was chosen, and why the others were not."""

    kernel: str
    run: PackedConvolution
    declined: dict[str, str]

    @property
    def own(self) -> bool:
        """Whether it takes memory for its result."""
        return self.kernel != ONEDNN

    def reporting(self, run: PackedConvolution) -> PackedConvolution:
        """``run``, telling listeners at each call which kernel it is."""
        kernel, declined = self.kernel, self.declined

        def reported(
            x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None
        ) -> Tensor:
            report("conv_fprop", kernel, x, declined, ("epilogue",))
            return run(x, residual, relu, out)

        return reported


class _Samples(TorchDispatchMode):
    """Notes what arrives at each convolution, in order: a sample for a Judge, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Tensor | None] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.resfast.conv_bn_act_inference.default:
            x, weight = args[:2]
            stride, padding, dilation, groups = args[8:12]
            g = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
            judged = x.is_cpu and is_winograd(x, weight, g)
            with disable_proxy_modes_tracing():  # of the model alone there is to be a graph
                self.noted.append(window(x, weight.shape[0]) if judged else None)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def samples(x: Tensor) -> Iterator[list[Tensor | None] | None]:
    """While a model runs on x: what arrives at its convolutions, call by call, for ``CpuEngines``.

    None where x stands for a tensor that is not there: fake, or traced by somebody else.
    """
    if not x.is_cpu or type(x) not in (Tensor, torch.nn.Parameter):
        yield None
        return
    with _Samples() as mode:
        yield mode.noted


class Layer(NamedTuple):
    """A convolution of a plan. Of x and the residual only shapes and dtypes matter.

    overwrites: the result takes the residual's memory. sample: of what arrives, for a Judge.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    g: ConvGeometry
    norm: NormVectors
    residual: Tensor | None
    relu: bool
    overwrites: bool
    sample: Tensor | None

    def prepare(self, kernel: str) -> PackedConvolution:
        own = None if kernel == ONEDNN else kernel
        return prepare_convolution(self.x, self.weight, self.bias, self.g, self.norm, own)

    def kernels(self) -> list[str]:
        """Those that run it, the one that the shape alone gives first."""
        x, weight, g = self.x, self.weight, self.g
        rule = own_kernel(x, weight, g) or ONEDNN
        rivals: list[str] = []
        if is_winograd(x, weight, g):
            rivals += [f"winograd{tile}" for tile in tiles_of(g)]
        if is_pointwise(x, weight, g):
            rivals.append("pointwise")
        if is_direct(x, weight, g):
            rivals.append("direct")
        if rivals:
            rivals.append(ONEDNN)
        return [rule, *(k for k in rivals if k != rule)]

    def size(self) -> str:
        joined = "none" if self.residual is None else "in place" if self.overwrites else "added"
        size = tuning.convolution_key("conv_fprop", self.x, self.weight, self.g)
        return f"{size} residual {joined} threads {torch.get_num_threads()} {native.cpu_isa()}"


class CpuEngines:
    """Chooses the kernels of one plan's convolutions.

    traffic: bytes of weights and activations in a call. Beyond the last cache, a convolution's
    weights are in no cache when their turn comes again, and it is measured so.
    measuring: whether there are tensors, so that anything can be.
    """

    def __init__(self, traffic: int, measuring: bool) -> None:
        self.cold = traffic > last_cache()
        self.measuring = measuring
        self._others: Tensor | None = None  # what else goes through the caches in a call
        self._measured: set[str] = set()  # sizes, once each even where it was in vain

    def prepare(self, layer: Layer) -> Prepared:
        """The layer, where ``packing_declines`` has no objection."""
        prepare = functools.cache(layer.prepare)
        kernels = layer.kernels()
        declined: dict[str, str] = {}
        if not self.measuring:
            return Prepared(kernels[0], prepare(kernels[0]), declined)
        if layer.sample is not None:
            judge = Judge(layer.sample, layer.weight, layer.bias, layer.g, layer.norm)
            for kernel in [k for k in kernels if k in TILES]:
                excess = judge.excess(prepare(kernel))
                if excess > 1:
                    kernels.remove(kernel)
                    declined[kernel] = f"its error here is {excess:.2g} times the allowed one"
        chosen = kernels[0]
        if len(kernels) > 1:
            key = f"{layer.size()} {'cold' if self.cold else 'warm'}"

            def measure() -> str | None:
                if key in self._measured:
                    return None
                self._measured.add(key)
                return self._race(layer, kernels)

            chosen = tuning.choose_on_cpu(key, kernels, measure)
        rest = ", ".join(k for k in kernels if k != chosen)
        if rest:
            declined[rest] = f"{chosen} is faster here, or expected to be"
        return Prepared(chosen, prepare(chosen), declined)

    def _race(self, layer: Layer, kernels: list[str]) -> str | None:
        """The fastest, called as in the plan."""

        def filled(like: Tensor) -> Tensor:
            return empty_nhwc(like.shape, like).fill_(0.5)

        x, residual = filled(layer.x), layer.residual
        residual = None if residual is None else filled(residual)
        calls: dict[str, Callable[[], Tensor]] = {}
        for kernel in kernels:
            copies = [layer.prepare(kernel) for _ in range(COPIES)]
            out = residual if layer.overwrites else None
            first = copies[0](x, residual, layer.relu, out)
            if out is None and kernel != ONEDNN:
                out = first  # the plan's memory
            calls[kernel] = functools.partial(
                _next, itertools.cycle(copies), x, residual, layer.relu, out
            )
        # the layer before has just written x, whoever reads it
        return fastest(calls, self._evict, lambda: x.mul_(1))

    def _evict(self) -> None:
        """Read more than the caches hold, as the plan's other layers do between two calls."""
        if self.cold:
            if self._others is None:
                self._others = torch.ones(2 * last_cache() // 4)
            self._others.sum()


def _next(
    copies: Iterator[PackedConvolution],
    x: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor | None,
) -> Tensor:
    return next(copies)(x, residual, relu, out)


def fastest(
    calls: dict[str, Callable[[], Any]],
    before_round: Callable[[], Any],
    before_call: Callable[[], Any],
) -> str | None:
    """The first of ``calls``, unless another is faster by a margin, then the fastest of those.

    Everyone's turn comes once a round, first or last by turns, and ratios are taken within a
    round, so that whatever else the machine does meets all alike. Where it does too much, a call
    that waits for its threads more often loses more: then None.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    least, most = ROUNDS
    began = time.perf_counter()
    for i in range(most):
        late = time.perf_counter() - began > SECONDS
        if late and (i >= least or (i >= IN_VAIN and _disturbed(times))):
            break
        before_round()
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            before_call()
            times[name].append(seconds(calls[name]))
    if _disturbed(times):
        return None
    best, least_ratio = names[0], 1 - MARGIN
    for name in names[1:]:
        ratios = [t / rule for t, rule in zip(times[name], times[names[0]], strict=True)]
        # of the median, and of the runs that were disturbed least
        ratio = max(statistics.median(ratios), min(times[name]) / min(times[names[0]]))
        if ratio <= least_ratio and sum(r < 1 for r in ratios) >= SHARE * len(ratios):
            best, least_ratio = name, ratio
    return best


def _disturbed(times: dict[str, list[float]]) -> bool:
    return any(statistics.median(t) > DISTURBED * min(t) for t in times.values())


def seconds(call: Callable[[], Any]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
