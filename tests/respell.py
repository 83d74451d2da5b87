"""Spells a canonical recurrence as a Variant again, so that the oracle can evaluate it and judge the passes that made it."""

from __future__ import annotations

from dataclasses import replace

import torch

from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Recurrence, State
from lagen.ir.variant import Variant


def respelled(variant: Variant, recurrence: Recurrence) -> Variant:
    """Returns ``variant`` with its lines made from ``recurrence``: decays, writes and readouts as products, sums and contractions."""
    states = {s.name: s for s in recurrence.states}
    lines = tuple(replace(s, expr=_line(states[s.name], states)) for s in variant.states)
    outputs = tuple(replace(o, expr=_tokenwise(e, states)) for o, (_, e) in zip(variant.outputs, recurrence.outputs, strict=True))
    return replace(variant, states=lines, outputs=outputs)


def random_tensors(variant: Variant, seed: int, sizes: dict[str, int]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Returns random float64 inputs and params; names assumed to be <= 0, >= 0 or both within bounds are (0 to 1)."""
    rng = torch.Generator().manual_seed(seed)
    bounds: dict[str, set[str]] = {}
    for a in variant.assumptions:
        if not a.args[0].args:
            bounds.setdefault(a.args[0].name, set()).add({"le": "<", "lt": "<", "ge": ">", "gt": ">"}[a.op])
    within = {"<": lambda x: -x.abs() - 0.1, ">": lambda x: x.abs() + 0.1, "<>": torch.sigmoid, "": lambda x: x}
    tensors = []
    for t in variant.inputs + variant.params:
        x = torch.randn([sizes[d] for d in t.shape], dtype=torch.float64, generator=rng)
        tensors.append(within["".join(sorted(bounds.get(t.name, ())))](x))
    return tuple(tensors[: len(variant.inputs)]), tuple(tensors[len(variant.inputs) :])


def _leaf(op: str, s: State) -> Expr:
    return E.leaf(op, s.name, s.dims, s.head, token=True)


def _decayed(s: State, states: dict[str, State]) -> Expr:
    value = _leaf("past", s)
    for g in s.decay:
        value = E.mul(E.call("exp", _tokenwise(g, states)), value)
    return value


def _line(s: State, states: dict[str, State]) -> Expr:
    if s.peak:
        past = E.add(_leaf("past", s), *(_tokenwise(g, states) for g in s.decay))
        return E.call("max", past, _tokenwise(s.writes[0].row, states))
    terms = [_decayed(s, states)] if s.causal else []
    for w in s.writes:
        row, col = _tokenwise(w.row, states), _tokenwise(w.col, states)
        terms.append(E.outer(row, col) if len(s.dims) == 2 else E.mul(row, col))
    return E.add(*terms)


def _tokenwise(root: Expr, states: dict[str, State]) -> Expr:
    def rule(x: Expr) -> Expr | None:
        if x.op == "logdecay":
            return E.call("max", _tokenwise(x.args[0], states), E.const(-104.0))
        if x.op == "solved":
            return _tokenwise(next(u.value for s in states.values() for u in s.solves if u.leaf == x), states)
        if x.op != "readout":
            return None
        s, vector = states[x.name], _tokenwise(x.args[0], states)
        value = {
            "now": lambda: _leaf("now", s),
            "all": lambda: _leaf("now", s),
            "previous": lambda: _leaf("past", s),
            "decayed": lambda: _decayed(s, states),
        }[x.attr("at")]()
        if vector.op == "expand":
            return E.mul(vector.args[0], E.reduce("sum", value))
        return E.contract(vector, value) if x.attr("dim") else E.mul(vector, value)

    return E.rewrite(root, rule)
