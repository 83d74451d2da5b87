"""Roles: what a variant's own lines say of its tensors: the interval of each, which feed a decay, which are keys.

Read off the Variant as it stands, before any algebra. Who reads it: whoever makes data or layers for a variant (verify/cases, nn).
"""

from __future__ import annotations

import math

from lagen.ir.expr import Expr, reads
from lagen.ir.variant import StateLine, Variant


def bounds(variant: Variant, name: str) -> tuple[float, float]:
    """Returns the interval that the assumptions give an input or param."""
    low, high = -math.inf, math.inf
    for fact in variant.assumptions:
        if fact.op not in ("lt", "le", "gt", "ge"):
            continue
        left, right = fact.args if fact.op in ("lt", "le") else fact.args[::-1]
        if left.name == name and right.op == "const":
            high = min(high, right.value)
        if right.name == name and left.op == "const":
            low = max(low, left.value)
        if left.op == "neg" and left.args[0].name == name and right.op == "const":
            low = max(low, -right.value)
    return low, high


def decays(line: StateLine) -> list[Expr]:
    """Returns the factors that stand before a state's own past, by reading down the sums and products of its line."""
    found: list[Expr] = []

    def descend(node: Expr, factors: tuple[Expr, ...]) -> None:
        if node.op == "past" and node.name == line.name:
            found.extend(f for f in factors if f not in found and reads(f, "input", "param"))
        elif node.op in ("add", "sub", "neg"):
            for a in node.args:
                descend(a, factors)
        elif node.op == "mul":
            a, b = node.args
            descend(a, (*factors, b))
            descend(b, (*factors, a))

    if not line.peak:
        descend(line.expr, ())
    return [f for f in found if not reads(f, "past", "now")]


def gates(variant: Variant) -> tuple[Expr, ...]:
    """Returns the distinct decay factors of all states."""
    return tuple(dict.fromkeys(f for line in variant.states for f in decays(line)))


def gate_inputs(variant: Variant) -> frozenset[str]:
    """Returns the names of the inputs that feed a decay: they stay in float32, whatever the dtype of the rest."""
    peaks = (line.expr for line in variant.states if line.peak)
    return frozenset(n.name for f in (*gates(variant), *peaks) for n in reads(f, "input"))


def keys(variant: Variant) -> frozenset[str]:
    """Returns the names of the inputs, gates apart, that are written on the first dim of a matrix state."""
    found: set[str] = set()
    for line in variant.states:
        for write in reads(line.expr, "outer"):
            for side in write.args:
                if len(line.dims) == 2 and side.dims == line.dims[:1]:
                    found.update(n.name for n in reads(side, "input") if n.dims)
    return frozenset(found) - gate_inputs(variant)
