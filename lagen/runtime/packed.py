"""Packed sequences: several of any lengths behind each other in one batch element, sequence n from cu_seqlens[n] to cu_seqlens[n + 1].

Stands alone (torch and the standard library): it is copied into every built package as ``_packed.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lagen.runtime.signature import ArgumentError, Tensors

Forward = Callable[..., tuple[Tensors, "Tensors | None", Tensors]]
Backward = Callable[..., tuple[Tensors, Tensors, "Tensors | None"]]


def check_bounds(name: str, bounds: Sequence[int], time: int) -> None:
    """Raises ArgumentError where ``bounds`` do not run from 0 to ``time`` without a step back."""
    if bounds[0] != 0:
        raise ArgumentError(f"{name}: cu_seqlens starts at {bounds[0]}; it wants to start at 0")
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end < start:
            raise ArgumentError(f"{name}: cu_seqlens decreases from {start} to {end} after sequence {n}; a length is 0 or more")
    if bounds[-1] != time:
        raise ArgumentError(f"{name}: cu_seqlens ends at {bounds[-1]}; it wants to end at T = {time}")


def each_forward(forward: Forward) -> Forward:
    """Lets a forward of dense batches take ``cu_seqlens`` as its last argument: it is called once a sequence."""

    @functools.wraps(forward)
    def over(
        inputs: Tensors, params: Tensors, scale: float, initial_states: Tensors | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensors, Tensors | None, Tensors]:
        if cu_seqlens is None:
            return forward(inputs, params, scale, initial_states, output_final_state)
        made = []
        for n, (start, end) in enumerate(_spans(cu_seqlens)):
            states = None if initial_states is None else tuple(s[n : n + 1] for s in initial_states)
            made.append(forward(tuple(x[:, start:end] for x in inputs), params, scale, states, output_final_state))
        outputs = tuple(torch.cat(parts, 1) for parts in zip(*(m[0] for m in made), strict=True))
        count = cu_seqlens.shape[0] - 1
        finals = tuple(torch.cat(parts)[:count] for parts in zip(*(m[1] for m in made), strict=True)) if output_final_state else None
        return outputs, finals, ()

    return over


def each_backward(backward: Backward) -> Backward:
    """Lets a backward of dense batches take ``cu_seqlens`` likewise; the gradients of params are summed over the sequences."""

    @functools.wraps(backward)
    def over(
        inputs: Tensors,
        params: Tensors,
        scale: float,
        initial_states: Tensors | None,
        saved: Tensors,
        outputs: Tensors,
        final_states: Tensors | None,
        d_outputs: Tensors,
        d_final_states: Tensors | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensors, Tensors, Tensors | None]:
        if cu_seqlens is None:
            return backward(inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states)
        made = []
        for n, (start, end) in enumerate(_spans(cu_seqlens)):
            states, d_finals = (None if g is None else tuple(s[n : n + 1] for s in g) for g in (initial_states, d_final_states))
            own, d_own = (tuple(x[:, start:end] for x in g) for g in (inputs, d_outputs))
            made.append(backward(own, params, scale, states, (), (), None, d_own, d_finals))
        d_inputs = tuple(torch.cat(parts, 1) for parts in zip(*(m[0] for m in made), strict=True))
        d_params = tuple(functools.reduce(torch.add, parts) for parts in zip(*(m[1] for m in made), strict=True))
        if initial_states is None:
            return d_inputs, d_params, None
        return (
            d_inputs,
            d_params,
            tuple(
                torch.cat(parts)[: s.shape[0]]
                for parts, s in zip(zip(*(m[2] or () for m in made), strict=True), initial_states, strict=True)
            ),
        )

    return over


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Returns where each sequence begins and ends; of none, one that is empty, which gives the shapes."""
    bounds = cu_seqlens.tolist()
    return list(zip(bounds, bounds[1:], strict=False)) or [(0, 0)]
