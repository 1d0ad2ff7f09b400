"""What Triton's interpreter gets wrong, put right; loaded only where it is in use.

Triton 3.6 under TRITON_INTERPRET=1 truncates float32 to bfloat16, where every GPU rounds to
nearest even, multiplies the bit patterns of bfloat16 matrices as integers, adds up rows one after
the other, where a GPU's threads and lanes add in a tree, and counts loops by arrays of one element,
which NumPy 2.4 no longer takes for numbers. It is sped up several times besides: most of its time
goes to bookkeeping that nobody reads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


def _widened(bits: Any) -> Any:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> Any:
    """float32 as bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _tree_sum(self: Any, values: Any) -> Any:
    """The sum of a power of two of floats along ``self.axis``, halves first."""
    data = np.moveaxis(values.handle.data, self.axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        data = data[:half] + data[half:]
    data = np.moveaxis(data, 0, self.axis) if self.keep_dims else data[0]
    return self.to_tensor(data, values.dtype)


def _speed_up() -> None:
    """No types of tuples and names of blocks before someone asks, and no check of each sum of
    integers for overflow, which costs three more; shapes for which it could matter are too large
    to interpret.
    """
    core = tl.core

    def lazy(owner: Any, name: str, compute: Any) -> None:
        attribute = functools.cached_property(compute)
        attribute.__set_name__(owner, name)
        setattr(owner, name, attribute)

    def tuple_init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape = core.tuple(core._unwrap_shape(shape))
        if not self.shape:
            raise TypeError("0d block_type is forbidden")
        self.numel = core.validate_block_shape(self.shape)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def tensor_shape(self: Any) -> Any:
        return core.tuple([core.constexpr(s) for s in self.type.get_block_shapes()])

    lazy(
        core.tensor,
        "shape",
        lambda self: tensor_shape(self) if self.type.is_block() else core.tuple([]),
    )
    lazy(core.tensor, "numel", lambda self: core.constexpr(math.prod(s.value for s in self.shape)))
    core.tensor.__init__ = tensor_init
    lazy(core.tuple, "type", lambda self: core._type_for_tuple_values(self.values))
    lazy(core.block_type, "name", lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tuple.__init__ = tuple_init
    core.block_type.__init__ = block_init

    of_numbers = functools.cache(interpreter._get_np_dtype)  # which builds its table at each call

    def np_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        pointer = isinstance(element, core.pointer_type)  # which has no hash
        return np.dtype(np.uint64) if pointer else of_numbers(element)

    interpreter._get_np_dtype = np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


def correct() -> None:
    """Replace conversions to and from bfloat16, products, sums and loops' counters."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "corrected_by_resfast", False):
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = [
            interpreter.TensorHandle(_widened(t.data), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return dot(self, *wide, d, *options)

    def through(name: str) -> None:
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in ("create_fp_ext", "create_fp_trunc"):
        through(name)
    builder.corrected_by_resfast = True
    _speed_up()

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    in_order = interpreter.ReduceOps.sum

    def total(self: Any, values: Any) -> Any:
        floats = np.issubdtype(values.handle.data.dtype, np.floating)
        return (
            _tree_sum(self, values) if floats and self.axis is not None else in_order(self, values)
        )

    interpreter.ReduceOps.sum = total

    @functools.cache
    def language_modules(fn: Any) -> list[Any]:
        return [m for m in fn.__globals__.values() if m is tl or m is tl.core]

    call = interpreter.InterpretedFunction.__call__

    def device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = language_modules(self.fn)
        if any(tl.core.is_builtin(m.full) for m in modules):
            return call(self, *args, **kwargs)  # patches the modules first
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter._patch_lang_tensor = patch_lang_tensor
    # the original patches triton.language at every call
    interpreter.InterpretedFunction.__call__ = device_call
