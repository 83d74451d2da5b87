"""Rules for torch.vmap: a mapped dim joins the batch where nothing but tokens and states is mapped, else every element is a call.

Stands alone (torch and the standard library): it is copied into every built package as ``_vmapped.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]


def joined(call: Callable[..., Sequence[Tensor]], size: int, in_dims: Sequence[int | None], args: Sequence[Any], batched: int) -> Mapped:
    """Calls once: the first ``batched`` arguments are [B, ..] or None, and their mapped dim (an unmapped one repeats) joins B."""
    front = []
    for x, d in zip(args[:batched], in_dims, strict=False):
        if isinstance(x, Tensor):
            wide = x.movedim(d, 0) if d is not None else x.expand(size, *x.shape)
            front.append(wide.flatten(0, 1))
        else:
            front.append(x)
    made = call(*front, *args[batched:])
    # what is absent is empty and has no batch
    apart = tuple(x.unflatten(0, (size, -1)) if x.dim() > 1 and size else x.new_empty(size, *x.shape) for x in made)
    return apart, (0,) * len(apart)


def element(in_dims: Sequence[int | None], args: Sequence[Any], i: int) -> list[Any]:
    """Returns the arguments of one element of the mapped dim."""
    return [x.select(d, i) if d is not None else x for x, d in zip(args, in_dims, strict=True)]


def each(call: Callable[..., Sequence[Tensor]], size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Mapped:
    """Calls once for every element of the mapped dim; what a call writes, it writes into the mapped tensors."""
    rows = [call(*element(in_dims, args, i)) for i in range(size)]
    made = tuple(torch.stack(tuple(parts)) for parts in zip(*rows, strict=True))
    return made, (0,) * len(made)
