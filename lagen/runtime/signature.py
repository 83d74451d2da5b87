"""Signature: what an operator takes and gives, by named dims, and the check of a call against it.

Stands alone (torch and the standard library): it is copied into every built package as ``_signature.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Formula = int | str | tuple[str, "Formula", "Formula"]  # a size: a number, a dim, or (sign, left, right)


class ArgumentError(ValueError):
    """Says which argument does not fit, what it got and what it wants."""


@dataclass(frozen=True)
class Argument:
    """An input [B, T, *head, *dims], a param [*head, *dims], a state [B, *head, *dims] or an output [B, T, *head, *dims]."""

    name: str
    head: str  # "", "H" or "HV"
    dims: tuple[str, ...]
    init: float = 0.0  # of a state: its value before the first token
    gate: bool = False  # of an input: it feeds a decay, and stays in float32 under autocast

    def shape(self, *lead: str) -> tuple[str, ...]:
        """Returns the names of all dims, ``lead`` in front."""
        return (*lead, *((self.head,) if self.head else ()), *self.dims)


@dataclass(frozen=True)
class OperatorSpec:
    """What an operator takes and gives. ``states`` is empty where the variant is not causal."""

    name: str
    digest: str
    inputs: tuple[Argument, ...]
    params: tuple[Argument, ...]
    states: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    scaled: bool  # whether the spec mentions ``scale``, whose default is K ** -0.5
    causal: bool
    sizes: tuple[tuple[str, Formula], ...]  # of derived dims, in order
    doc: str
    source: str  # the spec's text


# ---- sizes and their check ------------------------------------------------------------------------------------------------------


def measure(formula: Formula, sizes: Mapping[str, int]) -> int:
    """Computes the size of a derived dim."""
    if isinstance(formula, int):
        return formula
    if isinstance(formula, str):
        return sizes[formula]
    sign, left, right = formula
    a, b = measure(left, sizes), measure(right, sizes)
    if sign in ("add", "sub"):
        return a + b if sign == "add" else a - b
    if sign == "pow":
        return int(a**b)
    assert sign in ("mul", "div"), f"no size rule for {sign}"
    return a * b if sign == "mul" else a // b


class Sizes:
    """The sizes of one call by dim, gathered argument by argument."""

    def __init__(self, spec: OperatorSpec) -> None:
        self.spec = spec
        self.known: dict[str, int] = {}
        self.source: dict[str, str] = {}

    def meet(self, what: str, x: Tensor, shape: tuple[str, ...]) -> None:
        """Takes the sizes of one argument; raises ArgumentError where they do not fit."""
        name = self.spec.name
        if x.dim() != len(shape):
            raise ArgumentError(f"{name}: {what} has {x.dim()} dims, {_shape(x)}; it wants {len(shape)}, [{', '.join(shape)}]")
        for dim, size in zip(shape, x.shape, strict=True):
            if dim not in self.known:
                self.known[dim], self.source[dim] = size, what
            elif self.known[dim] != size:
                raise ArgumentError(
                    f"{name}: {what} is {_shape(x)}; it wants [{', '.join(shape)}] with {dim} = {self.known[dim]}, "
                    f"as {self.source[dim]} has it, not {size}"
                )

    def meet_all(self, tensors: Sequence[Tensor], lead: tuple[str, ...]) -> None:
        """Takes the sizes of all inputs (with ``lead`` in front) and params; raises ArgumentError where they do not fit."""
        for i, (a, x) in enumerate(zip(self.spec.inputs + self.spec.params, tensors, strict=True)):
            self.meet(a.name, x, a.shape(*lead) if i < len(self.spec.inputs) else a.shape())
        self.finish()

    def meet_sequences(self, cu_seqlens: Tensor | None) -> str:
        """Takes the number of sequences; returns the name of the states' first dim."""
        if cu_seqlens is None:
            return "B"
        self.known["NSEQ"], self.source["NSEQ"] = cu_seqlens.shape[0] - 1, "cu_seqlens"
        return "NSEQ"

    def finish(self) -> None:
        """Completes head and derived dims; raises ArgumentError where HV is no multiple of H."""
        known = self.known
        h, hv = known.get("H"), known.get("HV")
        if h is not None and hv is not None and (hv % h if h else hv):
            raise ArgumentError(
                f"{self.spec.name}: {self.source['HV']} has HV = {hv} heads and {self.source['H']} has H = {h}; "
                "it wants HV to be a multiple of H"
            )
        if h is None and hv is not None:
            known["H"] = hv
        if hv is None and h is not None:
            known["HV"] = h
        for dim, formula in self.spec.sizes:
            size = measure(formula, known)
            if known.setdefault(dim, size) != size:
                raise ArgumentError(f"{self.spec.name}: {self.source[dim]} has {dim} = {known[dim]}; it wants {size}")

    def shape(self, a: Argument, *lead: str) -> tuple[int, ...]:
        """Returns an argument's shape as numbers."""
        return tuple(self.known[d] for d in a.shape(*lead))


def is_dense(a: Argument, x: Tensor) -> bool:
    """Tells whether the numbers of one token and head lie behind each other."""
    step = 1
    for i in range(-1, -1 - len(a.dims), -1):
        if x.shape[i] != 1 and x.stride(i) != step:
            return False
        step *= x.shape[i]
    return True


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_kind(name: str, what: str, x: object, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raises ArgumentError where ``x`` is no tensor of one of ``dtypes`` on ``device``."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name}: {what} is a {type(x).__name__}; it wants a tensor")
    if x.dtype not in dtypes:
        raise ArgumentError(f"{name}: {what} is {_dtypes([x.dtype])}; it wants {_dtypes(dtypes)}")
    if x.device != device:
        raise ArgumentError(f"{name}: {what} is on {x.device}; it wants {device}, where the first input is")
