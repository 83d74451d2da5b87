"""Bounds: no value ever leaves its interval, decays are proved the way a person would, and refusals name what would settle them."""

from __future__ import annotations

import math
import random

import pytest

from lagen.ir import expr as E
from lagen.ir.bounds import Bounds, facts_of, interval, log_of, prove_nonpositive
from lagen.ir.expr import Expr
from lagen.spec import read_text

HEAD = """
name: a
inputs:
  k: [H, K]
  v: [H, V]
  g: [H, K]
  h: [H, K]
  f: [H]
  lb: [H, K]
  A: [H]
define:
  d: {decay}
assume:
{assume}
recurrence:
  S: S[t-1] + outer(k, v)
  o: (k + g + h + f + lb + A + d) @ S[t]
"""


def decay(text: str, *assume: str) -> tuple[Expr, tuple[Expr, ...]]:
    variant = read_text(HEAD.format(decay=text, assume="".join(f"  - {a}\n" for a in assume or ("k <= 9",))))
    return dict(variant.names)["d"], variant.assumptions


PROVED = [
    (("exp(g)", "g <= 0"), "g"),
    (("exp(g)", "-g >= 0"), "g"),
    (("exp(g)", "exp(g) <= 1"), "g"),
    (("exp(-exp(g))",), "-exp(g)"),
    (("exp(-exp(A) * softplus(f))",), "-(exp(A) * softplus(f))"),
    (("exp(A * softplus(f))", "A <= 0"), "A * softplus(f)"),
    (("sigmoid(g)",), "logsigmoid(g)"),
    (("1 - sigmoid(g)",), "logsigmoid(-g)"),
    (("sigmoid(f) ** 0.0625",), "0.0625 * logsigmoid(f)"),
    (("exp(logsigmoid(f) / 16)",), "logsigmoid(f) / 16"),
    (("exp(-abs(g)) * sigmoid(f)",), "-abs(g) + logsigmoid(f)"),
    (("lb + (1 - lb) * sigmoid(f)", "lb >= 0", "lb <= 1"), "log(lb + (1 - lb) * sigmoid(f))"),
    (("where(f > 0, exp(-f), sigmoid(g))",), "where(f > 0, -f, logsigmoid(g))"),
    (("where(f > 0, 0, sigmoid(g))",), "where(f > 0, -104, logsigmoid(g))"),
    (("lb", "lb >= 0", "lb <= 1"), "log(lb)"),
    (("f * f", "f >= -1", "f <= 1"), "log(f * f)"),
    (("1 / (1 + exp(f))",), "-log(1 + exp(f))"),
    (("exp(2 * g - 2 * h)", "g <= h"), "2 * g - 2 * h"),
    (("exp(g - lb)", "g <= h", "h <= lb"), "g - lb"),
    (("sqrt(sigmoid(g))",), "0.5 * logsigmoid(g)"),
    (("where(f != 0, 0.5, exp(f))",), f"where(f != 0, {math.log(0.5)}, f)"),
    (("0.5",), repr(math.log(0.5))),
]


@pytest.mark.parametrize("spec, log", PROVED, ids=[s[0] for s, _ in PROVED])
def test_decay_is_proved(spec: tuple[str, ...], log: str) -> None:
    e, facts = decay(*spec)
    assert str(log_of(e, facts)) == log
    proof = prove_nonpositive(log_of(e, facts), facts)
    assert proof.holds, proof


@pytest.mark.parametrize("spec, log", [c for c in PROVED if len(c[0]) > 1], ids=[s[0] for s, _ in PROVED if len(s) > 1])
def test_without_its_assumptions_it_is_not(spec: tuple[str, ...], log: str) -> None:
    e, facts = decay(spec[0])
    assert not prove_nonpositive(log_of(e, facts), facts).holds


@pytest.mark.parametrize(
    "text, found, wanted",
    [
        ("exp(g)", "g is in (-inf, inf)", ["g <= 0"]),
        ("exp(A * softplus(f))", "A * softplus(f) is in (-inf, inf)", ["A <= 0"]),
        ("lb + (1 - lb) * sigmoid(f)", "lb + (1 - lb) * sigmoid(f) is in (-inf, inf), so its log may not exist", ["lb >= 0", "lb <= 1"]),
        ("cos(f)", "cos(f) is in [-1, 1], so its log may not exist", ["cos(f) >= 0"]),
        ("1 + sigmoid(f)", "log(1 + sigmoid(f)) is in [0, 0.6931471805599453]", ["1 + sigmoid(f) <= 1"]),
        ("1.5", "0.4054651081081644 is in [0.4054651081081644, 0.4054651081081644]", []),
        ("where(f == 0, 1, exp(f))", "where(f == 0, 0, f) is in (-inf, inf)", ["f <= 0"]),
        ("f * g", "f * g is in (-inf, inf), so its log may not exist", ["f * g >= 0"]),
    ],
)
def test_refusal_names_what_would_settle_it(text: str, found: str, wanted: list[str]) -> None:
    e, facts = decay(text)
    proof = prove_nonpositive(log_of(e, facts), facts)
    assert not proof.holds and proof.text.startswith(found) and proof.wanted == tuple(wanted), proof
    assert all(f"`- {w}`" in proof.advice for w in wanted)


def test_product_that_may_be_negative_is_not_taken_apart() -> None:
    e, facts = decay("f * f * sigmoid(f)")
    assert "log(f)" not in str(log_of(e, facts))


def test_corners_are_for_affine_expressions_only() -> None:
    e, facts = decay("lb - lb * lb", "lb >= 0", "lb <= 1")
    low, high = interval(e, facts)
    assert low <= 0.0 and high >= 0.25


def test_peak_line_bounds_its_arguments() -> None:
    variant = read_text(
        """
name: mlstm
inputs:
  q: [H, K]
  k: [H, K]
  v: [H, V]
  i: [H]
  f: [H]
recurrence:
  m: max(m[t-1] + logsigmoid(f), i)
  S: exp(m[t-1] + logsigmoid(f) - m[t]) * S[t-1] + exp(i - m[t]) * outer(k, v)
  o: q @ S[t]
init: {m: -1.0e30}
"""
    )
    assert variant.state("m").peak and variant.state("m").init == -1.0e30
    exps = [n for n in E.walk(variant.state("S").expr) if n.op == "exp"]
    assert len(exps) == 2
    for n in exps:
        assert prove_nonpositive(n.args[0], facts_of(variant)).holds
        assert not prove_nonpositive(n.args[0]).holds


def test_row_functions() -> None:
    k = E.leaf("input", "k", ("K",), "H", token=True)
    unit = E.row("l2norm", k, 1e-6)
    assert interval(unit) == (-1.0, 1.0)
    assert interval(E.contract(unit, unit)) == (0.0, 1.0)
    assert interval(E.contract(k, k)) == (0.0, math.inf)
    assert interval(E.reduce("sum", E.row("softmax", k))) == (0.0, 1.0)
    assert interval(E.size("K")) == (1.0, math.inf)
    assert Bounds(sizes={"K": 4}).interval(E.size("K")) == (4.0, 4.0)


# ---- no value leaves its interval -----------------------------------------------------------------------------------------------

LEAVES = [E.leaf("input", n, (), "H", token=True) for n in "abc"]
ASSUMED = (E.call("ge", LEAVES[0], E.ZERO), E.call("le", LEAVES[0], E.ONE), E.call("le", LEAVES[1], LEAVES[2]))
ONE_ARGUMENT = ["exp", "abs", "sign", "sigmoid", "logsigmoid", "softplus", "tanh", "relu", "elu", "silu", "gelu", "cos", "sin"]


def value(e: Expr, at: dict[str, float]) -> float:
    """Evaluates a scalar expression in plain Python."""
    x = [value(a, at) for a in e.args]
    if e.op == "input":
        return at[e.name]
    if e.op == "const":
        return e.value
    if e.op == "pow":
        return x[0] ** e.value
    one = {
        "exp": lambda y: math.exp(y),
        "abs": abs,
        "neg": lambda y: -y,
        "sign": lambda y: (y > 0) - (y < 0),
        "sigmoid": lambda y: 1 / (1 + math.exp(-y)),
        "logsigmoid": lambda y: -math.log1p(math.exp(-y)),
        "softplus": lambda y: math.log1p(math.exp(y)),
        "tanh": math.tanh,
        "relu": lambda y: max(y, 0.0),
        "elu": lambda y: y if y > 0 else math.expm1(y),
        "silu": lambda y: y / (1 + math.exp(-y)),
        "gelu": lambda y: 0.5 * y * math.erfc(-y / math.sqrt(2)),
        "cos": math.cos,
        "sin": math.sin,
    }
    if e.op in one:
        return float(one[e.op](x[0]))
    two = {
        "add": lambda y, z: y + z,
        "sub": lambda y, z: y - z,
        "mul": lambda y, z: y * z,
        "div": lambda y, z: y / z,
        "min": min,
        "max": max,
        "lt": lambda y, z: float(y < z),
        "ge": lambda y, z: float(y >= z),
    }
    return float(two[e.op](*x)) if e.op in two else (x[1] if x[0] else x[2])


def random_expression(r: random.Random, depth: int) -> Expr:
    if depth == 0 or r.random() < 0.15:
        return r.choice([*LEAVES, E.const(r.choice([0.5, 1.0, 2.0, -1.0, 3.0]))])
    sub = [random_expression(r, depth - 1) for _ in range(2)]
    kind = r.randrange(8)
    if kind == 0:
        return E.call(r.choice(ONE_ARGUMENT), sub[0])
    if kind == 1:
        return E.power(sub[0], r.choice([2.0, 3.0]))
    if kind == 2:
        return E.call(r.choice(["min", "max"]), *sub)
    if kind == 3:
        return E.call("where", E.call(r.choice(["lt", "ge"]), r.choice(LEAVES), E.const(0.25)), *sub)
    if kind == 4:
        return E.div(sub[0], sub[1])
    return r.choice([E.add, E.sub, E.mul, E.mul])(*sub)


@pytest.mark.parametrize("seed", range(20))
def test_no_value_leaves_its_interval(seed: int) -> None:
    r = random.Random(seed)
    checked = 0
    for _ in range(60):
        e = random_expression(r, 4)
        lo, hi = interval(e, ASSUMED)
        for _ in range(12):
            b = r.gauss(0, 2)
            at = {"a": r.choice([0.0, 1.0, r.random()]), "b": b, "c": b + abs(r.gauss(0, 1)) * r.choice([0, 1])}
            try:
                x = value(e, at)
            except (OverflowError, ZeroDivisionError):
                continue
            slack = 1e-9 * max(1.0, abs(x))
            assert lo - slack <= x <= hi + slack, (str(e), at, x, (lo, hi))
            checked += 1
    assert checked > 300
