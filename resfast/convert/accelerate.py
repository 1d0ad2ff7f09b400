"""accelerate(model) and restore(model): fused forwards for models that are not resfast's.

First everything is traced and judged, then every module is changed: an error leaves the model as
it was.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from resfast.convert.match import Usable, usable_reason
from resfast.convert.module import (
    _CONVERSION,
    Conversion,
    Converted,
    convert,
    converted_class,
    install,
    uninstall,
)
from resfast.convert.report import Report, ReportRow
from resfast.convert.trace import NotTraced, child
from resfast.nn.fuse import Fusible, _hook_reason, is_frozen_norm

Attempts = dict[nn.Module, Conversion | str]  # a str: why not


def accelerate(model: nn.Module, *, strict: bool = True) -> Report:
    """Make Conv→BN→ReLU, BN→ReLU, BN→add→ReLU and residual blocks in model fused ops, in place.

    Parameters, buffers, names and training semantics stay; ``restore`` undoes it. Running it again
    changes nothing. Fused outputs are channels_last.

    Args:
        model: any module; resfast's own in it are left as they are.
        strict: raise for layers that must not be fused, instead of leaving those unfused.

    Returns:
        What was fused, and what was left and why; ``print`` it.

    Raises:
        RuntimeError: strict, and a layer to fuse is shared, hooked or parametrised, or a forward
            that cannot be traced flattens fused outputs by ``view``. The model is unchanged.
    """
    names = {m: name for name, m in model.named_modules()}
    obstacles = _obstacles(model)

    def found(m: nn.Module) -> bool:
        return m in obstacles or usable_reason(m) is None

    def allowed(m: nn.Module) -> bool:
        return m not in obstacles and usable_reason(m) is None

    attempts = _attempt(model, found)
    obstacles |= _shared_by_use(model, attempts, names)
    # what is converted already sees to later hooks by itself, call by call
    fresh = {
        m: a for m, a in attempts.items() if not (isinstance(m, Converted) and _still_right(m))
    }
    hit = {m: reason for m, reason in obstacles.items() if m in _fused_children(fresh)}
    views = _flattened_by_view(attempts)
    if strict and (hit or views):
        lines = [f"  {names[m] or 'the model'}: {reason}" for m, reason in (hit | views).items()]
        raise RuntimeError(
            "not accelerated, and nothing was changed:\n" + "\n".join(lines) + "\n"
            "strict=False leaves these parts unfused"
        )
    if hit:
        attempts = _attempt(model, allowed)
    for m, reason in views.items():
        for below in m.modules():
            if isinstance(attempts.get(below), Conversion):
                attempts[below] = f"{names[m] or 'the model'}: {reason}"
    _install(attempts)
    return Report(tuple(_rows(model, attempts, obstacles, names)))


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``, in place: classes and forwards are the stock ones again."""
    for m in model.modules():
        if isinstance(m, Converted):
            uninstall(m)
    return model


# ---- converting, without changing anything yet


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a forward of somebody's own, parents first; nothing inside resfast's modules."""
    ours: set[nn.Module] = set()
    for m in model.modules():
        if m in ours:
            continue
        if isinstance(m, Fusible) and not isinstance(m, Converted):
            ours.update(m.modules())
            continue
        stock = type(m).__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential)
        if not stock and type(m).forward is not nn.Module.forward:
            yield m


def _attempt(model: nn.Module, usable: Usable) -> Attempts:
    """A conversion of every module that is worth one, or why it cannot be had."""
    attempts: Attempts = {}
    inlined: set[nn.Module] = set()
    for m in _candidates(model):
        if m in inlined:
            continue
        made = attempts[m] = _convert_one(m, usable)
        if isinstance(made, Conversion) and any(p.groups for p in made.programs):
            inlined.update(child(m, path) for p in made.programs for path in p.trace.inlined)
    return attempts


def _convert_one(m: nn.Module, usable: Usable) -> Conversion | str:
    if isinstance(m, Converted) and _still_right(m):
        return m.__dict__[_CONVERSION]
    if isinstance(m, torch.jit.ScriptModule):
        return "a TorchScript module"
    if "forward" in m.__dict__:
        return "its forward was replaced"
    kind = m.stock_class if isinstance(m, Converted) else type(m)
    for name in ("fused", "plan"):
        if hasattr(m, name) and kind is type(m):
            return f"it has an attribute {name}, which resfast's modules have"
    try:
        converted_class(kind)
        return convert(m, kind, usable)
    except NotTraced as error:
        return str(error)
    except TypeError as error:
        return f"its class cannot be derived from: {error}"


def _still_right(m: Converted) -> bool:
    made = m.__dict__.get(_CONVERSION)
    return made is not None and any(p.reason(m) is None for p in made.programs)


def _fused_children(attempts: Attempts) -> set[nn.Module]:
    return {
        m.get_submodule(name)
        for m, made in attempts.items()
        if isinstance(made, Conversion)
        for program in made.programs
        for group in program.groups
        for name in group.children
    }


def _install(attempts: Attempts) -> None:
    """Conversions that fuse something; with any, also those that only reshape instead of view."""
    made = {m: c for m, c in attempts.items() if isinstance(c, Conversion)}
    if not any(p.groups for c in made.values() for p in c.programs):
        return
    done: list[Any] = []
    try:
        for m, conversion in made.items():
            wanted = any(p.groups or p.reshapes for p in conversion.programs)
            if wanted and m.__dict__.get(_CONVERSION) is not conversion:
                install(m, conversion)
                done.append(m)
    except BaseException:
        for m in done:
            uninstall(m)
        raise


# ---- what must not be fused


def _is_layer(m: nn.Module) -> bool:
    return isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)) or is_frozen_norm(m)


def _obstacles(model: nn.Module) -> dict[nn.Module, str]:
    """Convolutions and norms that fusing would rob of something, and of what."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, m in model.named_modules():
        for key, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None:
                owners[id(t)].append(f"{name}.{key}" if name else key)
    found = {}
    for m in model.modules():
        if not _is_layer(m):
            continue
        reason = _hook_reason(m)
        if parametrize.is_parametrized(m):
            reason = "its parameters are parametrised"
        for key, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None and len(owners[id(t)]) > 1:
                reason = f"its {key} is shared: {', '.join(owners[id(t)])}"
        if reason is not None:
            found[m] = reason
    return found


def _shared_by_use(
    model: nn.Module, attempts: Attempts, names: dict[nn.Module, str]
) -> dict[nn.Module, str]:
    """Convolutions and norms called in several places of what model's forward reaches.

    A whole module called again, as a head on every level, is one place. What an untraced forward
    calls is not known: each child once.
    """
    uses: dict[nn.Module, Counter[str]] = defaultdict(Counter)
    seen: set[nn.Module] = set()
    todo = [model]
    while todo:
        m = todo.pop(0)
        if m in seen:
            continue
        seen.add(m)
        made = attempts.get(m)
        if isinstance(made, Conversion):
            calls: Counter[nn.Module] = Counter()
            for program in made.programs:
                calls |= Counter(map(m.get_submodule, program.calls))
        else:
            calls = Counter(set(m.children()))
        for below, times in calls.items():
            uses[below][names[m]] += times
        todo += calls
    return {
        m: "called in several places: in the forward of "
        + ", ".join(f"{name or 'the model'} × {n}" for name, n in places.items())
        for m, places in uses.items()
        if _is_layer(m) and sum(places.values()) > 1
    }


def _mentions(function: Any, word: str, kind: type, seen: set[CodeType]) -> bool:
    """function, or a method of kind that it names, names word."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    methods = [vars(c).get(name) for name in code.co_names for c in kind.__mro__[:-1]]
    return word in code.co_names or any(
        _mentions(f, word, kind, seen)
        for f in methods
        if isinstance(f, FunctionType) and not f.__module__.startswith("torch.nn.")
    )


def _flattened_by_view(attempts: Attempts) -> dict[nn.Module, str]:
    """Untraced forwards above fused layers that use ``view``, which channels_last may not allow."""
    fused = [
        m
        for m, made in attempts.items()
        if isinstance(made, Conversion) and any(p.groups for p in made.programs)
    ]
    return {
        m: f"its forward calls view, where channels_last needs reshape, and is not traced ({why})"
        for m, why in attempts.items()
        if isinstance(why, str)
        and any(below in fused for below in m.modules())
        and _mentions(type(m).forward, "view", type(m), set())
    }


# ---- the report


def _rows(
    model: nn.Module,
    attempts: Attempts,
    obstacles: dict[nn.Module, str],
    names: dict[nn.Module, str],
) -> Iterator[ReportRow]:
    covered = _fused_children(attempts)
    callers: dict[nn.Module, nn.Module] = {}
    for m, made in attempts.items():
        path = names[m] or type(m).__name__
        if isinstance(made, Conversion):
            groups = {g: None for p in made.programs for g in p.groups}
            for group in groups:
                yield ReportRow(path, group.children, group.op)
            for program in made.programs:
                for name in program.calls:
                    callers.setdefault(m.get_submodule(name), m)
        elif any(_is_layer(below) for below in m.modules()):
            yield ReportRow(path, (), "unfused", made)
    for m in model.modules():
        if not _is_layer(m) or m in covered:
            continue
        reason = obstacles.get(m) or usable_reason(m)
        if reason is None and m not in callers:
            reason = "no traced forward calls it"
        elif reason is None and isinstance(m, nn.Conv2d):
            reason = "no batch norm alone uses its output"
        elif reason is None:
            reason = "neither a convolution before it nor a ReLU or addition alone behind it"
        yield ReportRow(names[m] or type(m).__name__, (), "unfused", reason)
