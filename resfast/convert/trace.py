"""The graph of one module's own forward, and what the graph takes for granted.

Every child is a leaf, so hooks, containers and children's own conversions keep their place; only
plain ``nn.Sequential`` children whose ends may fuse with their surroundings are traced into. A
trace runs the forward once and keeps the branches it took. What decided them (attributes, flags,
the set of children) is recorded as guards, to be compared on every call; what a trace cannot keep
(side effects, random numbers, questions for the input's type) is refused.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resfast.nn.fuse import _hook_reason, is_frozen_norm

Path = tuple[str, ...]

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_INTERNALS = set(nn.Module().__dict__) - {"training"}


class NotTraced(Exception):
    """Why a forward has no graph, in words for the report."""


def _comparable(value: Any) -> bool:
    """``same`` can tell whether value has changed."""
    if isinstance(value, (list, tuple)):
        return all(map(_comparable, value))
    if isinstance(value, dict):
        return all(map(_comparable, value.values()))
    return value is None or isinstance(value, (*_PLAIN, nn.Module, Enum)) or callable(value)


class Guard(NamedTuple):
    """An attribute that the forward read: of the module at path, its name and its value then."""

    path: Path
    name: str
    value: Any


class Trace(NamedTuple):
    """A forward's graph, the names of its arguments, and what must hold for it to be right."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    guards: tuple[Guard, ...]
    children: tuple[tuple[Path, tuple[str, ...]], ...]  # container → names of its children
    inlined: tuple[Path, ...]  # plain Sequentials whose layers are in the graph themselves


def child(root: nn.Module, path: Path) -> nn.Module | Any:
    """The module at path, or None."""
    m: Any = root
    for name in path:
        if m is None:
            return None
        m = m._modules.get(name)
    return m


def same(now: Any, then: Any) -> bool:
    """Plain values by value, containers by their elements, functions and modules by identity."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, _PLAIN):
        return bool(now == then)
    if isinstance(now, (list, tuple)):
        return len(now) == len(then) and all(map(same, now, then))
    if isinstance(now, dict):
        return list(now) == list(then) and all(same(now[k], then[k]) for k in now)
    return False


# ---- what a forward reads while it is traced


class _Read(NamedTuple):
    module: nn.Module
    name: str
    value: Any
    then: Any  # the value, a list or dict copied: the forward may change it


_reads: list[_Read] = []


_RECORDING: dict[type, type] = {}


def _recording(kind: Any) -> type:
    """A subclass of kind whose instances note what is read off them, and refuse to be changed."""
    if kind in _RECORDING:
        return _RECORDING[kind]

    class Recording(kind):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            internal = name in _INTERNALS or (name.startswith("__") and name.endswith("__"))
            if internal or isinstance(value, (Tensor, fx.Proxy, nn.Module)):
                return value
            if not callable(value) or name in object.__getattribute__(self, "__dict__"):
                copied = value.copy() if type(value) in (list, dict, OrderedDict) else value
                _reads.append(_Read(self, name, value, copied))
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, Tensor):  # by fx, which would keep it
                raise NotTraced("its forward makes a tensor that a trace would keep")
            raise NotTraced(f"its forward sets {name}")

    _RECORDING[kind] = Recording
    return Recording


@contextlib.contextmanager
def _recorded(root: nn.Module) -> Iterator[None]:
    """Note attribute reads of root and all below it; the classes are as before afterwards."""
    kinds = [(m, type(m)) for m in root.modules()]
    _reads.clear()
    try:
        for m, kind in kinds:
            with contextlib.suppress(TypeError):  # a class that cannot be derived from, or swapped
                object.__setattr__(m, "__class__", _recording(kind))
        yield
    finally:
        for m, kind in kinds:
            object.__setattr__(m, "__class__", kind)


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Refuse a forward that asks for what may be otherwise at the next call.

    Of a stand-in for a tensor that is its type, of torch the modes.
    """
    original = builtins.isinstance

    def asked(value: Any, kind: Any) -> bool:
        if type(value) is _Stand:
            caller = sys._getframe(1)
            if not _is_torchs(caller) or caller.f_code.co_name == "is_tensor":
                raise NotTraced("its forward asks for the type of its input")
        return original(value, kind)

    def refuse(name: str) -> Any:
        mode = getattr(torch, name)

        def asked_for_mode(*args: Any) -> bool:
            if not _is_torchs(sys._getframe(1)):
                raise NotTraced(f"its forward asks torch.{name}")
            return mode(*args)

        return asked_for_mode

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(builtins, "isinstance", asked))
        for name in _MODES:
            stack.enter_context(_replaced(torch, name, refuse(name)))
        yield


_MODES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")


def _is_torchs(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "resfast")


def write_in_place(name: str, a: Any, b: Any) -> Any:
    """``a += b`` and its kind, by the operator's name."""
    return getattr(operator, name)(a, b)


class _Stand(fx.Proxy):
    """What stands for a tensor during the trace. fx itself would take ``a += b`` for ``a + b``."""


def _recording_writes(name: str) -> Any:
    def write(self: _Stand, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", write_in_place, (name, self, other), {})

    return write


_WRITES = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
for _name in _WRITES.split():
    setattr(_Stand, f"__{_name}__", _recording_writes(_name))


class _Tracer(fx.Tracer):
    """Children are leaves, except the Sequentials to be traced into."""

    def __init__(self, inlined: set[int]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self._inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._inlined

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Stand(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # fx would make it a dict
            pairs = [(k, v) for k, v in a.items()]
            return self.create_proxy("call_function", OrderedDict, (pairs,), {}).node
        if isinstance(a, dict) and type(a) is not dict:
            raise NotTraced(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)


# ---- tracing


def required_arguments(forward: Any) -> tuple[str, ...]:
    """Names of forward's arguments without a default.

    Raises:
        NotTraced: it takes any number of arguments, or needs keywords.
    """
    names: list[str] = []
    for p in list(inspect.signature(forward).parameters.values())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise NotTraced("its forward takes any number of arguments")
        if p.default is not p.empty:
            continue
        if p.kind is p.KEYWORD_ONLY:
            raise NotTraced("its forward has arguments by keyword only")
        names.append(p.name)
    return tuple(names)


def _may_inline(m: nn.Module | None) -> bool:
    """A plain Sequential whose first or last layer may fuse with what surrounds it."""
    if type(m) is not nn.Sequential or not m._modules or _hook_reason(m) is not None:
        return False
    layers = list(m._modules.values())
    ends = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    starts = (nn.BatchNorm2d, nn.ReLU)
    return (
        isinstance(layers[-1], ends)
        or isinstance(layers[0], starts)
        or any(m is not None and is_frozen_norm(m) for m in (layers[0], layers[-1]))
    )


def _containers(root: nn.Module) -> tuple[list[Path], list[Path]]:
    """Paths of the containers that root's forward may iterate over; those that are inlined."""
    found: list[Path] = [()]
    inlined: list[Path] = []
    todo: list[tuple[Path, nn.Module]] = [((), root)]
    while todo:
        path, m = todo.pop()
        for name, below in m._modules.items():
            into = _may_inline(below)
            if below is not None and (into or type(below) in (nn.ModuleList, nn.ModuleDict)):
                here = (*path, name)
                found.append(here)
                todo.append((here, below))
                if into:
                    inlined.append(here)
    return found, inlined


def trace(root: nn.Module, forward: Any, training: bool) -> Trace:
    """The graph of root's forward in the given mode, its defaulted arguments left out.

    Raises:
        NotTraced: with the reason; root is as before.
    """
    inputs = required_arguments(forward)
    containers, inlined = _containers(root)
    names = {m: tuple(n.split(".")) if n else () for n, m in root.named_modules()}
    mode = root.training
    randomness = (torch.get_rng_state(), random.getstate())
    try:
        root.__dict__["training"] = training
        with _recorded(root):
            tracer = _Tracer({id(child(root, path)) for path in inlined})
            graph = _trace_as(tracer, root, forward, inputs)
    except NotTraced:
        raise
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise NotTraced(f"torch.fx cannot trace its forward: {message}") from None
    finally:
        reads = _reads.copy()
        _reads.clear()
        root.__dict__["training"] = mode
        changed = [r for r in reads if r.then is not r.value and not same(r.value, r.then)]
        for r in reversed(changed):  # back to what the first read saw
            r.value.clear()
            (r.value.extend if type(r.value) is list else r.value.update)(r.then)
        drawn = not torch.equal(randomness[0], torch.get_rng_state())
        drawn = drawn or randomness[1] != random.getstate()
        torch.set_rng_state(randomness[0])
        random.setstate(randomness[1])
    if changed:
        raise NotTraced(f"its forward changes {changed[0].name}")
    if drawn:
        raise NotTraced("its forward draws random numbers that a trace would keep")
    guards: dict[tuple[Path, str], Any] = {}
    for r in reads:
        if not _comparable(r.then):
            raise NotTraced(f"its forward reads {r.name}, whose contents cannot be compared later")
        if r.module in names:
            guards.setdefault((names[r.module], r.name), r.then)
    return Trace(
        graph,
        inputs,
        tuple(Guard(path, name, value) for (path, name), value in guards.items()),
        tuple((path, tuple(child(root, path)._modules)) for path in containers),
        tuple(inlined),
    )


def _trace_as(tracer: _Tracer, root: nn.Module, forward: Any, inputs: tuple[str, ...]) -> fx.Graph:
    """fx traces a method of the root's class by its signature: one of required arguments alone."""
    arguments = ", ".join(inputs)
    scope: dict[str, Any] = {"own_forward": forward}
    exec(f"def forward(self, {arguments}): return own_forward(self, {arguments})", scope)
    kind = type(root)
    alone = type(kind.__name__, (kind,), {"forward": scope["forward"]})
    object.__setattr__(root, "__class__", alone)
    try:
        with _no_questions():
            return tracer.trace(root)
    finally:
        object.__setattr__(root, "__class__", kind)
