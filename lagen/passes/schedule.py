"""Schedules a kernel's tiles: how wide a dim on the grid may be before what is alive at once no longer fits the registers."""

from __future__ import annotations

from lagen.ir.expr import walk
from lagen.ir.plan import Kernel

_OPERANDS = 8
"""Matrix operands that a sweep of 64-wide tiles keeps in flight without spilling (8 warps, 128 x 128 states, bf16)."""


def widest_tile(k: Kernel) -> int:
    """Returns the widest tile of a kernel's grid dim, judged by the matrices it has in flight."""
    operands = {n for n in walk(*k.values) if n.op in ("input", "stored") and n.dims}
    if k.kind == "chunks":  # pair sums of both kinds of read keep two sets of exponents
        return 32 if len({n.attr("prev") for n in walk(*k.values) if n.op == "mix"}) <= 1 else 16
    matrices = sum(bool(h.carry.x and h.carry.y) for h in k.holds)
    return 64 if matrices <= 1 and len(operands) <= _OPERANDS else 32
