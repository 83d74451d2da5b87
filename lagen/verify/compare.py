"""Compare: how far a tensor is from its reference, and how far it may be.

Errors are relative in the norm of the whole tensor: one number a tensor, which a wrong sign, mask or gate cannot hide from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT32_LIMIT = 2e-5
"""The most that a float32 output, state or gradient may be off its float64 reference."""

YARDSTICK_FACTOR = 4.0
"""How much worse than the same recurrence in the same dtype, token by token, a result may be, where that is more than the base."""

BASE = {
    torch.float32: FLOAT32_LIMIT,
    # rounding the result alone: half a unit in the last place
    torch.bfloat16: YARDSTICK_FACTOR * 2.0**-9,
    torch.float16: YARDSTICK_FACTOR * 2.0**-12,
}
"""What is always allowed to a result computed from inputs of a dtype."""

NOISE = 1e-12
"""A float64 reference below this, measured by what it was made of, is rounding noise around an exact zero."""

UNDERFLOW = 1e-36
"""What float32 cannot hold to full precision counts as zero: exp(-200) is an honest 0."""


def size(x: Tensor) -> float:
    """Returns the root mean square of a tensor, 0 for an empty one."""
    return (x.detach().double().norm() / math.sqrt(x.numel())).item() if x.numel() else 0.0


def error(got: Tensor, wanted: Tensor, natural: float = 1.0) -> float:
    """Returns |got - wanted| / |wanted|, inf where shapes differ or got is not finite.

    Where the reference is zero but for noise, the error is measured by ``natural`` instead: the root mean square that such a
    tensor has where nothing cancels.
    """
    if got.shape != wanted.shape:
        return math.inf
    got, wanted = got.detach().to("cpu", torch.float64), wanted.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(got).all()):
        return math.inf
    off, scale = size(got - wanted), size(wanted)
    if off <= UNDERFLOW:
        return 0.0
    return off / (scale if scale > NOISE * natural else natural)


def limit(dtype: torch.dtype, yardstick: float = 0.0) -> float:
    """Returns the largest error allowed to a result computed from ``dtype`` inputs.

    ``yardstick`` is the error of the recurrence itself in that dtype. In float32 it counts only where the mathematics cancels (the
    gradient by q of a mean over one token), so that no order of evaluation can do better.
    """
    return max(BASE[dtype], YARDSTICK_FACTOR * yardstick)
