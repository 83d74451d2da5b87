"""bfloat16 in Triton's interpreter: as a device computes it; scans: row by row.

The interpreter (Triton 3.9) keeps bfloat16 as 16-bit patterns and computes with the patterns: a product of two bfloat16 tiles is that
of two integers. Inside ``faithful`` the patterns are widened to float32 for arithmetic and for tl.dot, and rounded to the nearest,
ties to even, on the way back, where the interpreter cuts off. tl.associative_scan combines whole rows, where the interpreter takes number
after number: the same results, in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from triton import language as tl
from triton.runtime import interpreter


def widen(patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Returns the numbers that bfloat16 patterns stand for."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns the patterns of the nearest bfloat16 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).reshape(np.shape(numbers))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is(handle) else handle


def _back(handle: Any) -> Any:
    if handle.data.dtype == np.bool_:  # a comparison
        return interpreter.TensorHandle(handle.data, tl.int1)
    return interpreter.TensorHandle(narrow(handle.data), tl.bfloat16)


def _scan(self: Any, given: Any) -> list[Any]:
    """Scans tiles along their axis; stands in for ScanOps.generic_scan."""
    tiles = [np.moveaxis(x.handle.data, self.axis, 0) for x in given]
    kinds = [x.dtype for x in given]
    met: list[tuple[Any, ...]] = []
    for row in zip(*tiles, strict=True):
        values = tuple(self.to_tensor(x, kind) for x, kind in zip(row, kinds, strict=True))
        made = self.combine_fn.fn(*met[-1], *values) if met else values
        met.append(made if isinstance(made, tuple) else (made,))
    shape = tiles[0][0].shape
    whole = (np.stack([_shaped(x.handle.data, shape) for x in rows]) for rows in zip(*met, strict=True))
    return [self.to_tensor(np.ascontiguousarray(np.moveaxis(w, 0, self.axis)), kind) for w, kind in zip(whole, kinds, strict=True)]


def _shaped(row: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Returns a row of a scan in its shape; of a tile with one axis it is a number."""
    return np.reshape(row, shape) if row.size == math.prod(shape) else np.broadcast_to(row, shape)


@contextmanager
def faithful() -> Iterator[None]:
    """Computes with bfloat16 as a device does, in every kernel interpreted inside the block."""
    builder = interpreter.InterpreterBuilder
    plain = {name: getattr(builder, name) for name in ("unary_op", "binary_op", "ternary_op", "cast_impl", "create_dot")}

    def arithmetic(name: str) -> Callable[..., Any]:
        def compute(self: Any, *handles: Any) -> Any:
            *operands, op = handles
            if op is np.where or not any(map(_is, operands)):  # choosing between patterns is right as it is
                return plain[name](self, *handles)
            return _back(plain[name](self, *map(_wide, operands), op))

        return compute

    def cast(self: Any, handle: Any, kind: Any) -> Any:
        if _is(handle) == bool(kind.scalar == tl.bfloat16):
            return plain["cast_impl"](self, handle, kind)
        if _is(handle):
            wide = _wide(handle)
            return wide if kind.scalar == tl.float32 else plain["cast_impl"](self, wide, kind)
        return interpreter.TensorHandle(narrow(handle.data.astype(np.float32)), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain["create_dot"](self, _wide(a), _wide(b), *rest)

    scans = mock.patch.object(interpreter.ScanOps, "generic_scan", _scan)
    with (
        scans,
        mock.patch.multiple(
            builder,
            unary_op=arithmetic("unary_op"),
            binary_op=arithmetic("binary_op"),
            ternary_op=arithmetic("ternary_op"),
            cast_impl=cast,
            create_dot=dot,
        ),
    ):
        yield
