"""Pools of states: a step's rows advance the states that their slots name, -1 being padding; and what may not overlap in a step.

Stands alone (torch and the standard library): it is copied into every built package as ``_pool.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lagen.runtime.signature import ArgumentError, Tensors

Step = Callable[..., Tensors]
Writing = Callable[..., None]


def check_slots(name: str, slots: Sequence[int], size: int) -> None:
    """Raises ArgumentError where a slot is outside a pool of ``size`` states or named twice; -1 may be."""
    seen: dict[int, int] = {}
    for row, slot in enumerate(slots):
        if not -1 <= slot < size:
            raise ArgumentError(f"{name}: slots is {slot} at row {row}; it wants 0 to {size - 1}, a state of the pool, or -1 for padding")
        if slot >= 0 and seen.setdefault(slot, row) != row:
            raise ArgumentError(f"{name}: slots is {slot} at rows {seen[slot]} and {row}; a call may advance a state once")


def check_accepted(name: str, accepted: Sequence[int], tokens: int) -> None:
    """Raises ArgumentError where a row accepts less than none or more tokens than there are."""
    for row, count in enumerate(accepted):
        if not 0 <= count <= tokens:
            raise ArgumentError(f"{name}: accepted is {count} at row {row}; it wants 0 to {tokens}, the number of tokens")


def take(states: Tensors, slots: Tensor | None) -> Tensors:
    """Copies the states of the rows out of a pool; a padding row gets any."""
    if slots is None:
        return tuple(s.clone() for s in states)
    at = slots.clamp(min=0).long()
    return tuple(s[at] for s in states)


def put(states: Tensors, slots: Tensor, rows: Tensors) -> None:
    """Writes rows into a pool, padding rows nowhere; does not wait for a GPU."""
    if slots.device.type == "cpu":
        kept = (slots >= 0).nonzero().squeeze(1)
        for s, x in zip(states, rows, strict=True):
            s[slots[kept].long()] = x[kept]
        return
    size = states[0].shape[0]
    owner = torch.full((size + 1,), -1, dtype=torch.int64, device=slots.device)  # the last entry takes the padding
    owner[torch.where(slots < 0, size, slots).long()] = torch.arange(slots.shape[0], device=slots.device)
    owner = owner[:size]
    for s, x in zip(states, rows, strict=True):
        if x.shape[0]:
            s.copy_(torch.where((owner >= 0).reshape(-1, *[1] * (s.dim() - 1)), x[owner.clamp(min=0)], s))


def blank(outputs: Tensors, slots: Tensor) -> Tensors:
    """Returns outputs with zeros in the padding rows."""
    return tuple(o.masked_fill((slots < 0).reshape(-1, *[1] * (o.dim() - 1)), 0.0) for o in outputs)


def by_slots(step: Step) -> Writing:
    """Lets a step that returns outputs, and whose states are its rows', take ``slots`` and ``outputs`` as its last arguments.

    States are copied out of the pool and back, outputs into the caller's.
    """

    @functools.wraps(step)
    def over(inputs: Tensors, params: Tensors, scale: float, states: Tensors, slots: Tensor | None, outputs: Tensors) -> None:
        rows = states if slots is None else take(states, slots)
        made = step(inputs, params, scale, rows)
        if slots is not None:
            put(states, slots, rows)
            made = blank(made, slots)
        for o, x in zip(outputs, made, strict=True):
            o.copy_(x)

    return over


# ---- what overlaps --------------------------------------------------------------------------------------------------------------


def check_apart(name: str, read: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """Raises ArgumentError where a tensor that a step writes shares memory with another one of the call, or with itself.

    Both are by what a message calls them.
    """
    homes = [x.untyped_storage().data_ptr() for x in read.values()]
    own = [x.untyped_storage().data_ptr() for x in written.values()]
    if len({*own}) == len(own) and {*own}.isdisjoint(homes) and not any([0 in x.stride() for x in written.values()]):
        return
    listed = [*zip(read.items(), homes, strict=True), *zip(written.items(), own, strict=True)]
    for i, ((label, x), home) in enumerate(listed[len(read) :], len(read)):
        if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
            raise ArgumentError(f"{name}: {label} is an expanded view; a step wants a place of its own for each of its numbers")
        for (other, y), at in listed[:i]:
            if at == home and _meet(x, y):
                raise ArgumentError(f"{name}: {label} shares memory with {other}; a step writes it, and wants it apart")


def _meet(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors of one storage have a byte in common."""
    sides = [(x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.element_size()) for x in (a, b)]
    if not (a.numel() and b.numel()):
        return False
    low = [p for p, *_ in sides]
    high = [p + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) * size + size for p, shape, strides, size in sides]
    if high[0] <= low[1] or high[1] <= low[0]:
        return False
    return _common(low[1] - low[0], *sides[0][1:], *sides[1][1:])


@functools.lru_cache(maxsize=64)
def _common(
    apart: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int, other: tuple[int, ...], steps: tuple[int, ...], width: int
) -> bool:
    """Tells whether two views whose first bytes lie ``apart`` have a byte in common."""

    def places(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> Tensor:
        at = torch.arange(size)
        for n, s in zip(shape, strides, strict=True):
            at = (at[:, None] + torch.arange(n) * s * size).flatten().unique()
        return at

    return bool(torch.isin(places(other, steps, width) + apart, places(shape, strides, size), assume_unique=True).any())
