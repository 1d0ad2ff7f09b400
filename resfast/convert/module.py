"""A converted module: its class, which runs a rewritten forward while that is known to be right."""

from __future__ import annotations

import contextlib
import functools
import linecache
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from resfast.convert.match import Block, Layer, Matcher, Usable, usable_reason
from resfast.convert.run import block_reason, run_block, run_layer
from resfast.convert.trace import NotTraced, Path, Trace, child, same, trace
from resfast.nn.blocks import _off
from resfast.nn.fuse import (
    Fusible,
    PlanRow,
    layer_op,
    plain_reason,
    traced,
    unfused_norm_reason,
    unfused_reason,
)
from resfast.nn.stem import pool_rows, run_conv_bn_pool

_CONVERSION = "_resfast_conversion"


class Fused(NamedTuple):
    """One fused group, by the names of its children."""

    op: str
    layers: tuple[tuple[str | None, str, str | None], ...]  # convolution, norm, ReLU module
    shortcut: tuple[str, str] | None = None
    pool: str | None = None

    @property
    def pairs(self) -> list[tuple[str | None, str]]:
        pairs = [(conv, norm) for conv, norm, _ in self.layers]
        return pairs if self.shortcut is None else [*pairs, self.shortcut]

    @property
    def children(self) -> tuple[str, ...]:
        names = [name for pair in self.pairs for name in pair if name is not None]
        return tuple(names if self.pool is None else [*names, self.pool])


class Program(NamedTuple):
    """A forward rewritten for one mode, and what must hold for it to be right."""

    run: Callable[..., Any]
    groups: tuple[Fused, ...]
    trace: Trace
    identities: tuple[Path, ...]  # stepped over
    calls: tuple[str, ...]  # the child of every call in the forward
    reshapes: bool  # a view became a reshape

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        inputs = self.trace.inputs
        return len(args) + len(kwargs) == len(inputs) and all(k in inputs for k in kwargs)

    def reason(self, root: nn.Module) -> str | None:
        """Why the stock forward has to run instead, or None."""
        for path, names in self.trace.children:
            m = child(root, path)
            if m is None or tuple(m._modules) != names:
                return "children were added or removed"
        for path, name, then in self.trace.guards:
            m = child(root, path)
            if m is None or not same(getattr(m, name, None), then):
                return f"{'.'.join((*path, name))} has changed since accelerate"
        for kind, paths in ((nn.Sequential, self.trace.inlined), (nn.Identity, self.identities)):
            for path in paths:
                reason = plain_reason(child(root, path), kind)
                if reason is not None:
                    return reason
        return None


class Conversion(NamedTuple):
    """The rewritten forward in training and in eval; None: the stock forward."""

    training: Program | None
    eval: Program | None

    @property
    def programs(self) -> list[Program]:
        """Each once."""
        found = [p for p in self if p is not None]
        return found[:1] if len(found) == 2 and found[0] is found[1] else found

    def __deepcopy__(self, memo: dict) -> None:
        """A copied module is converted anew, see ``Converted.__setstate__``."""

    def __copy__(self) -> None:
        pass

    def __reduce__(self) -> tuple:
        return type(None), ()


class Converted(Fusible):
    """Mixed into a module's class by ``accelerate``; ``converted_class`` makes the class."""

    stock_class: type[nn.Module]

    def _program(self) -> Program | None:
        conversion = self.__dict__.get(_CONVERSION)
        if conversion is None:
            return None
        return conversion.training if self.training else conversion.eval

    def plan(self) -> list[PlanRow]:
        """What forward would call now: each fused group, or its layers and why not the whole."""
        conversion = self.__dict__.get(_CONVERSION)
        if conversion is None:
            return []
        program = self._program()
        reason = _off(self)
        if program is None:
            reason = reason or "its forward cannot be traced in this mode"
            program = conversion.programs[0]
        reason = reason or program.reason(self)
        if reason is not None:
            return [PlanRow(group.children, "unfused", reason) for group in program.groups]
        return [row for group in program.groups for row in self._rows(group)]

    def _rows(self, group: Fused) -> list[PlanRow]:
        why = None
        if group.pool is not None:
            ((conv, norm, act),) = group.layers
            return pool_rows(self, str(conv), norm, act, group.pool, None)
        if group.op == "residual_block":
            layers = [
                tuple(True if name is None else self.get_submodule(name) for name in layer)
                for layer in group.layers
            ]
            shortcut = group.shortcut and tuple(map(self.get_submodule, group.shortcut))
            why = block_reason(layers, shortcut)  # type: ignore[arg-type]  # lengths are known
            if why is None:
                return [PlanRow(group.children, group.op, None)]
        rows = []
        for conv, norm in group.pairs:
            bn = self.get_submodule(norm)
            if conv is None:
                reason = unfused_norm_reason(bn)
                op = "unfused" if reason else layer_op(bn, convolved=False)
                rows.append(PlanRow((norm,), op, reason))
            else:
                reason = unfused_reason(self.get_submodule(conv), bn)
                op = "unfused" if reason else layer_op(bn)
                rows.append(PlanRow((conv, norm), op, reason or why))
        return rows

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # this class is made at run time: name the stock one, and make it again
        return (_blank, (self.stock_class,), *reduced[2:])

    def __setstate__(self, state: Any) -> None:
        parent: Any = super()
        parent.__setstate__(state)
        if _CONVERSION in self.__dict__:
            self.__dict__[_CONVERSION] = None
            with contextlib.suppress(NotTraced):  # then the stock forward runs
                self.__dict__[_CONVERSION] = convert(self, self.stock_class)


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """forward of kind's converted instances, under the signature of kind's own."""
    stock = kind.forward

    @functools.wraps(stock)
    def forward(self: Converted, *args: Any, **kwargs: Any) -> Any:
        program = self._program()
        if (
            program is None
            or not self.fused
            or kind.forward is not stock  # a class patched since
            or not program.takes(args, kwargs)
            or any(traced(a) for a in (*args, *kwargs.values()))
            or program.reason(self) is not None
        ):
            return kind.forward(self, *args, **kwargs)
        return program.run(self, *args, **kwargs)

    return forward


_CLASSES: dict[type[nn.Module], type[Converted]] = {}


def converted_class(kind: type[nn.Module]) -> type[Converted]:
    """The class of converted modules whose class was kind; its name and repr are kind's."""
    if kind not in _CLASSES:
        body = {
            "__doc__": kind.__doc__,
            "__module__": __name__,
            "forward": _forward_of(kind),
            "stock_class": kind,
        }
        _CLASSES[kind] = type(kind.__name__, (Converted, kind), body)
    return _CLASSES[kind]


def _blank(kind: type[nn.Module]) -> Converted:
    made = converted_class(kind)
    return made.__new__(made)


def install(m: nn.Module | Any, conversion: Conversion) -> None:
    """Make m run the conversion; children, parameters and buffers stay as they are.

    Raises:
        TypeError: m's class allows no such change.
    """
    if not isinstance(m, Converted):
        object.__setattr__(m, "__class__", converted_class(type(m)))
    m.__dict__[_CONVERSION] = conversion


def uninstall(m: Converted) -> None:
    """Undo ``install``, and ``set_fused``."""
    m.__dict__.pop(_CONVERSION, None)
    m.__dict__.pop("fused", None)
    object.__setattr__(m, "__class__", m.stock_class)


# ---- rewriting a forward


def _usable(m: nn.Module) -> bool:
    return usable_reason(m) is None


def convert(root: nn.Module, kind: type[nn.Module], usable: Usable = _usable) -> Conversion:
    """Trace the forward that kind gives to root and rewrite it, in the modes it tells apart.

    Raises:
        NotTraced: with the reason; root is as before.
    """
    first = trace(root, kind.forward, root.training)
    mode = [g for g in first.guards if g.name == "training" and g.path == ()]
    program = _program(root, first, usable)
    if not mode:
        return Conversion(program, program)
    try:
        other = _program(root, trace(root, kind.forward, not root.training), usable)
    except NotTraced:
        other = None
    return Conversion(program, other) if root.training else Conversion(other, program)


def _program(root: nn.Module, traced_forward: Trace, usable: Usable) -> Program:
    graph = traced_forward.graph
    calls = tuple(str(n.target) for n in graph.nodes if n.op == "call_module")
    matcher = Matcher(root, graph, usable)
    groups = matcher.match()
    names = {n: i for i, n in enumerate(graph.nodes)}
    groups.sort(key=lambda g: names[g.output])
    fused = tuple(_names(group) for group in groups)
    _rewrite(graph, groups)
    reshapes = _reshape_views(graph)
    return Program(
        _compile(graph, type(root).__name__),
        fused,
        traced_forward,
        tuple(tuple(name.split(".")) for name in sorted(matcher.transparent)),
        calls,
        reshapes,
    )


def _target(node: fx.Node | None) -> str | None:
    return str(node.target) if node is not None and node.op == "call_module" else None


def _names(group: Layer | Block) -> Fused:
    if isinstance(group, Block):
        layers = group.chain
        shortcut = None
        if group.shortcut is not None:
            shortcut = (str(_target(group.shortcut.conv)), str(_target(group.shortcut.norm)))
        op = "residual_block"
    else:
        layers, shortcut = [group], None
        op = "bn_act" if group.conv is None else "conv_bn_act"
        if group.pool is not None:
            op = "conv_bn_act_max_pool"
    names = tuple((_target(n.conv), str(_target(n.norm)), _target(n.act)) for n in layers)
    pool = group.pool if isinstance(group, Layer) else None
    return Fused(op, names, shortcut, _target(pool))


def _rewrite(graph: fx.Graph, groups: list[Layer | Block]) -> None:
    """Put one call in each group's place.

    A layer without a residual runs where its convolution ran, so that writes in place behind that
    do not reach its input; what has a residual runs where the addition was done with.
    """
    new: dict[fx.Node, fx.Node] = {}

    def module(node: fx.Node) -> fx.Node:
        return graph.create_node("get_attr", str(node.target))

    def act(layer: Layer) -> fx.Node | bool:
        if layer.act is None:
            return False
        return module(layer.act) if layer.act.op == "call_module" else True

    for group in groups:
        nodes = group.nodes
        x = new.get(group.input, group.input)
        if isinstance(group, Block):
            source = new.get(group.shortcut_input, group.shortcut_input)
            with graph.inserting_before(group.output):
                layers, shortcut = [], None
                for layer in group.chain:
                    assert layer.conv is not None
                    layers.append((module(layer.conv), module(layer.norm), act(layer)))
                if group.shortcut is not None:
                    assert group.shortcut.conv is not None
                    shortcut = (module(group.shortcut.conv), module(group.shortcut.norm))
                call = graph.call_function(run_block, (x, source, tuple(layers), shortcut))
        else:
            residual = group.residual and new.get(group.residual, group.residual)
            with graph.inserting_before(nodes[0] if residual is None else group.output):
                conv, norm = group.conv and module(group.conv), module(group.norm)
                if group.pool is None:
                    call = graph.call_function(run_layer, (conv, norm, x, residual, act(group)))
                else:
                    arguments = (conv, norm, x, act(group), module(group.pool))
                    call = graph.call_function(run_conv_bn_pool, arguments)
        group.output.replace_all_uses_with(call)
        new[group.output] = call
        for node in reversed(nodes):
            graph.erase_node(node)


def _reshape_views(graph: fx.Graph) -> bool:
    """Fused outputs are channels_last, which ``view`` cannot flatten and ``reshape`` can."""
    views = [n for n in graph.nodes if n.op == "call_method" and n.target == "view"]
    views = [n for n in views if not any(isinstance(a, torch.dtype) for a in n.args)]
    for node in views:
        node.target = "reshape"
    return bool(views)


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    filename = f"<resfast forward of {name} {id(graph):x}>"
    lines = code.src.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.src), None, lines, filename)  # for tracebacks
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    return scope["forward"]
