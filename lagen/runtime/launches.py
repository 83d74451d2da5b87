"""Launches: the kernels that an operator's forward, backward and step start on a target, gathered without the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lagen.ir.variant import Tensor, Variant
from lagen.runtime.load import load
from lagen.targets.launch import Launch, record
from lagen.targets.target import Target
from lagen.targets.tuned import Entry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of the call that is compiled for; ``dims`` overrides those of single dims.

    With ``sequences`` the B * T tokens are so many packed ones.
    """

    b: int
    t: int
    h: int
    k: int
    v: int
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...] = ()
    sequences: int = 0

    def size(self, dim: str) -> int:
        """Returns the size of a dim by name: V is v, HV is h, any other is k."""
        return {"B": self.b, "T": self.t, "H": self.h, "HV": self.h, "V": self.v, **dict(self.dims)}.get(dim, self.k)

    def tensor(self, declared: Tensor, token: bool) -> torch.Tensor:
        """Makes an input or param without memory; ``token`` keeps the time axis."""
        names = [d for d in declared.shape if token or d != "T"]
        packed = {"B": 1, "T": self.b * self.t} if token and self.sequences else {}
        return torch.empty([packed.get(d) or self.size(d) for d in names], dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Gathered:
    """One kernel of one pass of one variant, and how often the pass launches it."""

    variant: str
    phase: str
    launch: Launch
    launches: int


def gather(variant: Variant, shape: Shape, target: Target, states: bool = False, tuned: Sequence[Entry] | None = None) -> list[Gathered]:
    """Returns the distinct kernels that training and decoding launch on ``target``; none where the variant has no Triton form.

    With ``states`` the forward is given initial states and returns final ones; where sequences are packed, a step is over a pool.
    ``tuned`` are configs to take, where not those found.
    """
    operator = load(variant, tuned=tuned)
    if "triton" not in operator.backends:
        return []
    tensors = [shape.tensor(t, token=True).requires_grad_() for t in variant.inputs + variant.params]
    sizes = {d: shape.size(d) for t in variant.inputs + variant.params for d in t.shape if d not in ("B", "T")}
    carried = variant.causal and states
    fresh = tuple(_flat(operator.init_state(shape.sequences or shape.b, "meta", **sizes))) if variant.causal else ()
    options: dict[str, Any] = {"backend": "triton", "output_final_state": carried}
    if shape.sequences:
        options["cu_seqlens"] = torch.empty(shape.sequences + 1, dtype=torch.int32, device="meta")
    if carried:
        options["initial_state"] = _one(tuple(s.clone().requires_grad_() for s in fresh))
    found: dict[str, list[Launch]] = {}
    with record(target) as found["forward"]:
        made = _flat(operator(*tensors, **options))
    with record(target) as found["backward"]:
        torch.autograd.backward(made, [torch.empty_like(x) for x in made])
    if variant.causal:
        with record(target) as found["step"], torch.no_grad():
            slots = torch.empty(shape.b, dtype=torch.int32, device="meta") if shape.sequences else None
            token = [shape.tensor(t, token=False) for t in variant.inputs + variant.params]
            operator.step(*token, state=_one(fresh), slots=slots, backend="triton")
    return [
        Gathered(variant.name, phase, launch, launches.count(launch))
        for phase, launches in found.items()
        for launch in dict.fromkeys(launches)
    ]


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in _flat(part)]


def _one(states: tuple[torch.Tensor, ...]) -> Any:
    return states[0] if len(states) == 1 else states
