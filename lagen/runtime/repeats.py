"""Repeats: decode steps on a CPU that are like one that went before, taken past the dispatcher.

Stands alone (torch): it is copied into every built package as ``_repeats.py``.

That a step is like another is asked of torch's own guard, in C++: class, dtype, device, sizes, strides and whether a gradient is wanted,
of each tensor, under the same modes, autocast and transforms. Where this torch has no such guard, every step goes through the dispatcher.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
ALIKE, NOTED = 8, 256  # how many steps are remembered of one shape of the first tensor, and of how many shapes
PLAIN = (Tensor, torch.nn.Parameter)
SHARED = 2  # what a repeated step answers where what it writes shares memory with what it reads


@dataclass(frozen=True)
class StepPlan:
    """The words of a decode step for tensors of given shapes, with the places of their addresses."""

    words: array.array[int]
    places: tuple[int, ...]
    models: tuple[int | tuple[int, ...], ...]  # of each output: the tensor that it is like, which is the quickest to say, or its shape
    spans: tuple[int, ...]  # bytes from each tensor's first number to behind its last
    copied: frozenset[int]  # tensors that the words describe a contiguous copy of

    def flat(self, written: int) -> array.array[int]:
        """Returns the plan as the generated code reads it; the last ``written`` tensors are."""
        head = (len(self.words), len(self.places), written)
        return array.array("q", (*head, *self.words, *self.places, *self.spans))


@dataclass(frozen=True)
class Noted:
    """A step that went: what tells its like, and how the generated code takes that."""

    count: int
    same: Callable[..., bool]
    threads: int
    models: tuple[int | tuple[int, ...], ...]
    flat: array.array[int]
    address: int
    pack: Callable[..., bytes]


class Repeats:
    """The steps of one operator that went. ``entry`` is the generated code: it reads a plan and addresses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry: Callable[[int, bytes], int] | None = None
        self.noted: dict[torch.Size | None, list[Noted]] = {}  # by the first tensor's shape, for batches come in many sizes

    def again(self, tensors: Tensors, states: Tensors, outputs: Tensors | None = None) -> Tensors | None:
        """Takes a step; returns None where none like it was noted, or where the dispatcher has something to do.

        That is where a mode, autocast or a transform watches, where a tensor is of another class, wants a gradient, or shares the
        memory of the state or of the given ``outputs``, which are made where they are not given.
        """
        if torch._C._len_torch_dispatch_stack():  # FakeTensorMode, which guards do not see
            return None
        written = states if outputs is None else (*outputs, *states)
        whole = (*tensors, *written)
        for n in self.noted.get(getattr(tensors[0], "shape", None), ()):
            if n.count == len(whole) and n.same(*whole) and n.threads == torch.get_num_threads():
                break
        else:
            return None
        if outputs is None:
            outputs = tuple([tensors[0].new_empty(m) if isinstance(m, tuple) else torch.empty_like(tensors[m]) for m in n.models])
            whole = (*tensors, *outputs, *states)
        assert self.entry is not None
        failed = self.entry(n.address, n.pack(*[x.data_ptr() for x in whole]))
        if failed:
            if failed == SHARED:
                return None
            raise MemoryError(f"{self.name}: no memory for the scratch of a step")
        torch.autograd.graph.increment_version(written)
        return outputs

    def note(self, plan: StepPlan, tensors: Tensors, states: Tensors, outputs: Tensors | None) -> None:
        """Remembers a step that went on tensors that ``plan`` describes as they are."""
        written = states if outputs is None else (*outputs, *states)
        same = guard((*tensors, *written))
        if same is None or any(x.requires_grad for x in (*tensors, *written)):
            return
        if len(self.noted) >= NOTED:
            self.noted.clear()
        alike = self.noted.setdefault(tensors[0].shape, [])
        del alike[ALIKE - 1 :]
        flat, pack = plan.flat(len(written)), struct.Struct(f"{len(plan.places)}q").pack
        count = len(tensors) + len(written)
        alike.insert(0, Noted(count, same, torch.get_num_threads(), plan.models, flat, flat.buffer_info()[0], pack))


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Returns what tells whether others are like these plain tensors; None where nothing can."""
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if guards is None or not all(type(x) in PLAIN and not x.is_neg() for x in tensors):
        return None
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    same: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return same if same(*tensors) else None  # one tensor given twice is like no other
