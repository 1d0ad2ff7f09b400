"""What Triton's interpreter gets wrong for bfloat16, put right; loaded only where it is in use.

Triton 3.6 under TRITON_INTERPRET=1 truncates float32 to bfloat16, where every GPU rounds to
nearest even, and multiplies the bit patterns of bfloat16 matrices as integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(bits: Any) -> Any:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> Any:
    """float32 as bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def correct_bfloat16() -> None:
    """Replace the interpreter's conversions to and from bfloat16 and its product of matrices."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "resfast_bfloat16", False):
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
    builder.resfast_bfloat16 = True
