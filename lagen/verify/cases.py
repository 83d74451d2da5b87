"""Cases: random inputs for a variant that keep to what it assumes, in the regimes that break kernels.

A regime says where the log-decays lie. Where the decay is exp(g) of an input g it is set; elsewhere (-exp(A_log) * softplus(dt),
a bounded sigmoid) the input that feeds the gate is searched for, by evaluating the decay as the spec states it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lagen.ir.expr import Expr, reads, show
from lagen.ir.roles import bounds, gate_inputs, gates, keys
from lagen.ir.variant import Tensor as Declared
from lagen.ir.variant import Variant
from lagen.verify.oracle import Tensors, derive_sizes, evaluate, oracle

REGIMES = ("mild", "gates at -5", "gates at -20", "no decay", "resets", "equal keys")
"""mild: gates around -1. resets: every gate drawn from RESETS, so that hard resets stand beside open gates."""

TARGETS = {"gates at -5": -5.0, "gates at -20": -20.0, "no decay": 0.0}
RESETS = (-200.0, -50.0, -5.0, -0.1, 0.0)
OPEN = -1e-3  # the nearest to 0 that a computed gate is driven: its complement may be what is written, and normalised by

ODD = {"K": 13, "V": 11}
SPARE = (9, 7, 10, 5)


@dataclass(frozen=True)
class Extent:
    """How large a case is. ``dims`` overrides the odd sizes that dims have by default."""

    time: int
    batch: int = 2
    heads: int = 2
    group: int = 2
    dims: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Case:
    """Data for one check. Cotangents are what a loss would send back for outputs and final states."""

    regime: str
    dtype: torch.dtype
    inputs: Tensors
    params: Tensors
    initial_states: Tensors | None
    d_outputs: Tensors
    d_states: Tensors

    def __str__(self) -> str:
        time = self.inputs[0].shape[1]
        state = "" if self.initial_states is None else ", carried state"
        return f"T {time}, {str(self.dtype).removeprefix('torch.')}, {self.regime}{state}"


# ---- which regimes a variant has ------------------------------------------------------------------------------------------------


def regimes(variant: Variant) -> tuple[str, ...]:
    """Returns the regimes that mean something for a variant."""
    named = [r for r in REGIMES if r == "mild" or (gates(variant) and r != "equal keys")]
    return (*named, "equal keys") if keys(variant) else tuple(named)


# ---- making the tensors ---------------------------------------------------------------------------------------------------------


def sizes(variant: Variant, extent: Extent) -> dict[str, int]:
    """Returns the size of every dim of a case: HV is H times the group where the spec names both."""
    declared = variant.inputs + variant.params
    heads = {t.head for t in declared}
    known = {"B": extent.batch, "T": extent.time, "H": extent.heads, "HV": extent.heads * (extent.group if {"H", "HV"} <= heads else 1)}
    derived = {d for d, _ in variant.sizes}
    chosen, spare = dict(extent.dims), iter(SPARE * 4)
    for dim in dict.fromkeys(d for t in declared for d in t.dims if d not in derived):
        known[dim] = chosen.get(dim) or ODD.get(dim) or next(spare)
    return {**known, **derive_sizes(variant, {d: n for d, n in known.items() if d not in ("B", "T", "H", "HV")})}


def _draw(variant: Variant, declared: Declared, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws a tensor inside its bounds; params are half as wide as inputs."""
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * (1.0 if declared.token else 0.5)
    low, high = bounds(variant, declared.name)
    if math.isfinite(low) and math.isfinite(high):
        return low + (high - low) * x.sigmoid()
    if math.isfinite(high):
        return high - x.exp().log1p()
    return low + x.exp().log1p() if math.isfinite(low) else x


def _given(variant: Variant, table: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Returns a table's inputs and params in spec order."""
    return tuple(table[t.name] for t in variant.inputs), tuple(table[t.name] for t in variant.params)


def _direct(gate: Expr) -> tuple[str, float] | None:
    """Returns the leaf and the sign where a gate is exp(leaf) or exp(-leaf), else None."""
    if gate.op != "exp":
        return None
    inner, sign = (gate.args[0].args[0], -1.0) if gate.args[0].op == "neg" else (gate.args[0], 1.0)
    return (inner.name, sign) if inner.op in ("input", "param") else None


def _feeders(variant: Variant, gate: Expr) -> list[Declared]:
    """Returns the tensors to move a gate by: its inputs, or its params where it has none."""
    leaves = reads(gate, "input") or reads(gate, "param")
    return [variant.tensor(n.name) for n in leaves]


def _search(variant: Variant, gate: Expr, feeder: Declared, target: float, table: dict[str, Tensor], known: dict[str, int]) -> float:
    """Searches the constant value of ``feeder`` whose mean log-decay is nearest to ``target``, many candidates at once as tokens."""
    low, high = bounds(variant, feeder.name)
    centre, width = 0.0, 256.0
    target = min(target, OPEN)
    for _ in range(5):
        tries = (centre + torch.linspace(-width, width, 129, dtype=torch.float64)).clamp(low, high)
        trial = {t.name: table[t.name] for t in variant.params}
        trial |= {t.name: table[t.name][:1, :1].expand(1, 129, *table[t.name].shape[2:]) for t in variant.inputs}
        shape = [129 if d == "T" else 1 if d == "B" else known[d] for d in feeder.shape]
        if feeder.token:
            trial[feeder.name] = tries.reshape(1, 129, *[1] * (len(shape) - 2)).expand(shape)
            factor = evaluate(variant, [gate], *_given(variant, trial))[0]
            means = factor.clamp(min=1e-300).log().reshape(129, -1).mean(1)
        else:
            rows = []
            for value in tries:
                trial[feeder.name] = torch.full(shape, float(value), dtype=torch.float64)
                rows.append(evaluate(variant, [gate], *_given(variant, trial))[0].clamp(min=1e-300).log().mean())
            means = torch.stack(rows)
        best = int((means - target).abs().argmin())
        centre, width = float(tries[best]), width / 32
    return centre


def _set_gates(variant: Variant, regime: str, table: dict[str, Tensor], known: dict[str, int], generator: torch.Generator) -> None:
    """Moves the tensors that feed the decays so that the log-decays lie where the regime wants them."""
    moved: set[str] = set()
    for gate in gates(variant):
        for param in (variant.tensor(n.name) for n in reads(gate, "param")):
            low, high = bounds(variant, param.name)
            if regime != "resets" and reads(gate, "input") and math.isfinite(low) and math.isfinite(high):
                table[param.name] = torch.full_like(table[param.name], low)  # a floor under the gate would keep it from closing
        direct, feeder = _direct(gate), _feeders(variant, gate)[0]
        if feeder.name in moved:
            continue
        moved.add(feeder.name)
        targets = RESETS if regime == "resets" else (TARGETS[regime],)
        if direct is not None:
            values = [direct[1] * t for t in targets]
        else:
            values = [_search(variant, gate, feeder, t, table, known) for t in targets]
        pick = torch.randint(len(values), table[feeder.name].shape, generator=generator)
        table[feeder.name] = torch.tensor(values, dtype=torch.float64)[pick]


def _settle(variant: Variant, table: dict[str, Tensor]) -> None:
    """Shrinks inputs until every assumption holds; raises ValueError naming one that will not."""
    fixed = gate_inputs(variant)
    for fact in variant.assumptions:
        for _ in range(12):
            if bool((evaluate(variant, [fact], *_given(variant, table))[0] != 0).all()):
                break
            for n in reads(fact, "input"):
                if n.name not in fixed:
                    table[n.name] = table[n.name] / 2
        else:
            raise ValueError(f"{variant.name}: found no data that keep to the assumption {show(fact)}")


def make(
    variant: Variant, extent: Extent, regime: str = "mild", dtype: torch.dtype = torch.float32, carried: bool = False, seed: int = 0
) -> Case:
    """Makes the case of a regime, the same for the same arguments; ``carried`` gives it an initial state.

    Gates and params are float32, other inputs and the outputs' cotangents ``dtype``, states float32. Raises ValueError where no
    data keep to the assumptions.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant.name} {regime} {extent} {seed}".encode()))
    known = sizes(variant, extent)

    def draw(shape: tuple[str, ...]) -> Tensor:
        return torch.randn([known[d] for d in shape], dtype=torch.float64, generator=generator)

    declared = variant.inputs + variant.params
    table = {t.name: _draw(variant, t, tuple(known[d] for d in t.shape), generator) for t in declared}
    initial: Tensors | None = None
    if carried and variant.causal:
        # what a few tokens leave behind: a random state would make normalisers vanish
        before = {t.name: _draw(variant, t, tuple(5 if d == "T" else known[d] for d in t.shape), generator) for t in variant.inputs}
        before = table | before
        _settle(variant, before)
        _, final = oracle(variant, *_given(variant, before))
        assert final is not None
        initial = tuple(s.float() for s in final)
    if regime in TARGETS or regime == "resets":
        _set_gates(variant, regime, table, known, generator)
    if regime == "equal keys":
        for name in keys(variant):
            table[name] = table[name][:, :1].expand_as(table[name]).contiguous()
    _settle(variant, table)
    precise = gate_inputs(variant)
    inputs = tuple(table[t.name].to(torch.float32 if t.name in precise else dtype) for t in variant.inputs)
    states = (draw(("B", *([s.head] if s.head else []), *s.dims)).float() for s in variant.states if variant.causal)
    return Case(
        regime=regime,
        dtype=dtype,
        inputs=inputs,
        params=tuple(table[t.name].float() for t in variant.params),
        initial_states=initial,
        d_outputs=tuple(draw(("B", "T", *([o.head] if o.head else []), *o.dims)).to(inputs[0].dtype) for o in variant.outputs),
        d_states=tuple(states),
    )


def lengths(variant: Variant) -> Iterator[int]:
    """Yields the sequence lengths around a chunk of C tokens: 0, 1, C - 1, C, C + 1 and 3 C + 5."""
    c = variant.chunk_default
    yield from (0, 1, c - 1, c, c + 1, 3 * c + 5)
