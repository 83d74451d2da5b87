"""Random spellings: a line rewritten by the laws of algebra keeps its digest and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from respell import random_tensors, respelled

from lagen.data import specs
from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.digest import digest
from lagen.passes.refusal import Refused
from lagen.spec import read
from lagen.verify.oracle import oracle

SIZES = {"B": 1, "T": 5, "H": 2, "HV": 4, "K": 4, "V": 3, "M": 5, "D": 3, "E": 4, "N": 2}
VARIANTS = [read(p) for p in specs()]


def commute(x: Expr) -> Expr | None:
    """a + b = b + a, a * b = b * a, a @ b = b @ a."""
    maker: dict[str, Callable[[Expr, Expr], Expr]] = {"add": E.add, "mul": E.mul, "contract": E.contract}
    return maker[x.op](x.args[1], x.args[0]) if x.op in maker else None


def regroup(x: Expr) -> Expr | None:
    """(a + b) + c = a + (b + c), (a * b) * c = a * (b * c) where b * c has a type."""
    if x.op not in ("add", "mul") or x.args[0].op != x.op:
        return None
    (a, b), c = x.args[0].args, x.args[1]
    if not set(b.dims) <= set(c.dims) and not set(c.dims) <= set(b.dims):
        return None
    return E.call(x.op, a, E.call(x.op, b, c))


def distribute(x: Expr) -> Expr | None:
    """(a + b) * c = a * c + b * c, and the same of outer and @, where both terms have the dims."""
    maker: dict[str, Callable[[Expr, Expr], Expr]] = {"mul": E.mul, "contract": E.contract, "outer": E.outer}
    if x.op not in maker or x.args[0].op not in ("add", "sub"):
        return None
    (a, b), c = x.args[0].args, x.args[1]
    if x.op != "mul" and a.dims != b.dims:
        return None
    return E.call(x.args[0].op, maker[x.op](a, c), maker[x.op](b, c))


def move_number(x: Expr) -> Expr | None:
    """s * (a @ b) = (s * a) @ b, outer(s * a, b) = outer(a, s * b)."""
    if x.op == "mul" and not x.args[0].dims and x.args[1].op == "contract":
        a, b = x.args[1].args
        return E.contract(E.mul(x.args[0], a), b)
    if x.op == "outer" and x.args[0].op == "mul" and not x.args[0].args[0].dims:
        s, a = x.args[0].args
        return E.outer(a, E.mul(s, x.args[1])) if a.dims else None
    return None


def split(x: Expr) -> Expr | None:
    """a = 2 * a - a."""
    return E.sub(E.mul(E.const(2.0), x), x) if x.op in ("outer", "contract") else None


def exps(x: Expr) -> Expr | None:
    """exp(a) = 1 / exp(-a)."""
    return E.div(E.ONE, E.call("exp", E.neg(x.args[0]))) if x.op == "exp" else None


def signs(x: Expr) -> Expr | None:
    """a + b = a - (-b)."""
    return E.call("sub", x.args[0], E.call("neg", x.args[1])) if x.op == "add" else None


LAWS = (commute, regroup, distribute, move_number, split, exps, signs)


def scrambled(x: Expr, rng: Random, chance: float = 0.8) -> Expr:
    """Rewrites nodes of ``x`` at random, each by a law that fits it."""
    x = E.rebuild(x, tuple(scrambled(a, rng, chance) for a in x.args))
    if rng.random() < chance:
        law = rng.choice(LAWS)
        x = law(x) or x
    return x


def respelled_at_random(variant: Variant, rng: Random) -> Variant:
    """Returns the variant in another spelling; S[t] in an output may be spelled out."""
    lines = {s.name: s for s in variant.states}

    def spell_out(n: Expr) -> Expr | None:
        return scrambled(lines[n.name].expr, rng) if n.op == "now" and variant.causal and rng.random() < 0.3 else None

    states = tuple(replace(s, expr=scrambled(s.expr, rng)) for s in variant.states)
    outputs = tuple(replace(o, expr=scrambled(E.rewrite(o.expr, spell_out), rng)) for o in variant.outputs)
    return replace(variant, states=states, outputs=outputs)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000))
def test_spellings_at_random(variant: Variant, seed: int) -> None:
    other = respelled_at_random(variant, Random(seed))
    try:
        recurrence = canonicalise(other)
    except Refused as refused:  # what is assumed of a decay's own spelling says nothing of another one
        assert (variant.name, refused.code) == ("longhorn", "decay-grows")
        return
    assert digest(recurrence) == digest(canonicalise(variant)), "\n".join(str(x.expr) for x in (*other.states, *other.outputs))
    inputs, params = random_tensors(variant, seed, SIZES)
    wanted, got = oracle(variant, inputs, params), oracle(respelled(other, recurrence), inputs, params)
    for a, b in zip(wanted[0] + (wanted[1] or ()), got[0] + (got[1] or ()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
