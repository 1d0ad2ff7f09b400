"""Out-of-bounds checks of Triton kernels: every buffer they get lies between guards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.kernels import launch

GUARD = 1 << 17  # bytes on each side: more than a tile of 128 pixels and 256 float32 channels
POISON = 0xFF  # in every byte: NaN in every float format, the extreme in integers
ALIGNMENT = 64  # what torch's allocators keep at least; Triton specialises on 16


class OutOfBounds(AssertionError):
    """A kernel touched memory that is not its arguments'."""


@dataclass
class _Buffer:
    """A copy of what one storage's arguments span; all bytes they do not own are poison."""

    data: Tensor  # bytes
    owned: Tensor  # of bool, for each
    origin: int  # the address in the original that data[0] stands for

    def twin(self, t: Tensor) -> Tensor:
        """The guarded copy of ``t``."""
        offset = (_address(t) - self.origin) // t.element_size()
        alike = torch.empty(0, dtype=t.dtype, device=t.device)
        return alike.set_(self.data.untyped_storage(), offset, t.shape, t.stride())


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size()


def _distinct(t: Tensor) -> Tensor:
    """``t`` without the dimensions that an expand repeated."""
    sizes = [
        1 if stride == 0 and size else size
        for size, stride in zip(t.shape, t.stride(), strict=True)
    ]
    return t.detach().as_strided(sizes, t.stride(), t.storage_offset())


def _end(t: Tensor) -> int:
    """The address after the last element."""
    if t.numel() == 0:
        return _address(t)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return _address(t) + span * t.element_size()


def _buffer(tensors: list[Tensor], guard: int) -> _Buffer:
    """Where all of ``tensors``, views of one storage, keep their places beside each other."""
    first, device = min(map(_address, tensors)), tensors[0].device
    origin = (first - guard) // ALIGNMENT * ALIGNMENT
    size = max(map(_end, tensors)) + guard - origin
    data = torch.full((size,), POISON, dtype=torch.uint8, device=device)
    assert data.data_ptr() % ALIGNMENT == 0
    buffer = _Buffer(data, torch.zeros(size, dtype=torch.bool, device=device), origin)
    for t in map(_distinct, tensors):
        buffer.twin(t).copy_(t)
        width = t.element_size()
        buffer.owned.as_strided(
            (*t.shape, width),
            (*(stride * width for stride in t.stride()), 1),
            _address(t) - origin,
        ).fill_(True)
    return buffer


def _nearest(arguments: dict[str, Tensor], address: int) -> str:
    """The argument that ``address`` misses by least, and by how much."""

    def miss(name: str) -> tuple[int, str]:
        before, after = _address(arguments[name]) - address, address - _end(arguments[name])
        if before > 0:
            return before, f"from {before} bytes before its start"
        return (after, f"from {after} bytes after its end") if after >= 0 else (-1, "in its gaps")

    name = min(arguments, key=miss)
    return f"{name} {list(arguments[name].shape)}, {miss(name)[1]}"


def _check_guards(name: str, arguments: dict[str, Tensor], buffers: list[_Buffer]) -> None:
    for buffer in buffers:
        harmed = torch.nonzero((buffer.data != POISON) & ~buffer.owned)
        if len(harmed):
            where = _nearest(arguments, buffer.data.data_ptr() + int(harmed[0]))
            raise OutOfBounds(f"{name} wrote {len(harmed)} bytes outside {where}")


@contextlib.contextmanager
def _addresses_checked(
    name: str, arguments: dict[str, Tensor], buffers: list[_Buffer]
) -> Iterator[None]:
    """In the interpreter: every address loaded from or stored to belongs to an argument."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    spans = [(b.data.data_ptr(), len(b.owned), b.owned.numpy()) for b in buffers]
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def check(what: str, pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        active = np.broadcast_to(mask.data, pointers.data.shape)
        at = np.unique(pointers.data[active].astype(np.int64))
        good = np.zeros(at.shape, dtype=bool)
        for begin, size, owned in spans:
            inside = (at >= begin) & (at + width <= begin + size)
            places = at[inside] - begin
            good[inside] = owned[places] & owned[places + width - 1]
        if not good.all():
            where = _nearest(arguments, int(at[~good][0]))
            raise OutOfBounds(f"{name} {what} {(~good).sum()} elements outside {where}")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("wrote", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
    try:
        yield
    except Exception as error:
        # the interpreter wraps what is raised inside a kernel, once for each function called
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OutOfBounds):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


@contextlib.contextmanager
def _uninitialised_poisoned() -> Iterator[None]:
    """torch.empty and its like give NaN, or an integer's largest value."""
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


@contextlib.contextmanager
def guarded(guard: int = GUARD, addresses: bool = True) -> Iterator[None]:
    """Launches inside run on copies of their tensors, each between ``guard`` bytes of poison.

    A kernel that writes outside its arguments' elements raises OutOfBounds, naming itself and the
    argument. Reads outside them give NaN; in the interpreter they raise too, unless ``addresses``
    is False. Arguments that share a storage keep their places in one buffer, the bytes between
    them guarded. Uninitialised outputs are poison as well.
    """
    run = launch.run

    def guarded_run(
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constexprs: dict[str, Any],
        device: torch.device,
    ) -> None:
        assert not any(isinstance(value, Tensor) for value in constexprs.values())
        storages: dict[int, list[Tensor]] = {}
        for t in args:
            if isinstance(t, Tensor):
                storages.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        buffers = {key: _buffer(tensors, guard) for key, tensors in storages.items()}
        twins = tuple(
            buffers[t.untyped_storage().data_ptr()].twin(t) if isinstance(t, Tensor) else t
            for t in args
        )
        named = {
            name: t
            for name, t in zip(kernel.arg_names, twins, strict=False)
            if isinstance(t, Tensor)
        }
        with contextlib.ExitStack() as stack:
            if addresses and launch.INTERPRETED and device.type == "cpu":
                stack.enter_context(
                    _addresses_checked(kernel.__name__, named, list(buffers.values()))
                )
            run(kernel, grid, twins, constexprs, device)
        _check_guards(kernel.__name__, named, list(buffers.values()))
        for t, twin in zip(args, twins, strict=True):
            if isinstance(t, Tensor):
                _distinct(t).copy_(_distinct(twin))

    launch.run = guarded_run
    try:
        with torch.no_grad(), _uninitialised_poisoned():
            yield
    finally:
        launch.run = run


def tensors_of(results: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, dict):
        results = list(results.values())
    if isinstance(results, (tuple, list)):
        return [t for item in results for t in tensors_of(item)]
    return []


def check_bounds(call: Callable[[], Any]) -> None:
    """``call``, which launches kernels, stays in bounds; twice, without guards and with.

    It makes its own in-place arguments, and returns all that its kernels write.
    """
    plain = tensors_of(call())
    with guarded():
        behind_guards = tensors_of(call())
    assert len(plain) == len(behind_guards) > 0
    for i, (expected, actual) in enumerate(zip(plain, behind_guards, strict=True)):
        assert not actual.isnan().any(), f"result {i}: NaN, from a guard or never written"
        assert torch.equal(actual, expected), f"result {i} differs behind guards"


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Says which of several checks an error inside is from."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error
