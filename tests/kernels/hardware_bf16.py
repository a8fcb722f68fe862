"""bfloat16 in Triton's interpreter as hardware has it: casts round to nearest even, dot products are of numbers.

The interpreter (3.6.0 to 3.9.0) keeps bfloat16 as uint16, truncates when it casts fp32 to it, and computes with the bit
patterns as integers, in tl.dot too. The kernels do bfloat16 arithmetic in fp32 except for tl.dot, so these two are all
that is needed; test_hardware_bf16.py shows that the first still is.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

truncating_cast = InterpreterBuilder.cast_impl
integer_dot = InterpreterBuilder.create_dot


def nearest_even(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 nearest to each fp32; ties to the even one, NaN to a quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def as_float(x: TensorHandle) -> TensorHandle:
    """The numbers whose bfloat16 bits x holds; anything else as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def cast_impl(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return TensorHandle(nearest_even(src.data), tl.bfloat16)
    return truncating_cast(self, src, dst_type)


def create_dot(self, a, b, d, *options):
    return integer_dot(self, as_float(a), as_float(b), d, *options)


def interpret_bf16_as_hardware_does() -> None:
    """Both put in place, for the process."""
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
