"""Adjoint rules: each row of the functions' table by sympy and by autograd, vector rules and states by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

import lagen
from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.scalar import FUNCTIONS
from lagen.passes.differentiate import RULES
from lagen.spec import read_text
from lagen.verify.cases import Extent, make

# ---- element-wise functions -----------------------------------------------------------------------------------------------------

a, b, c, d = sympy.symbols("a b c d", real=True)
X = [E.leaf("input", str(s), (), token=True) for s in (a, b, c)]
D = E.leaf("input", "d", (), token=True)


def sigmoid(x: sympy.Expr) -> sympy.Expr:
    return 1 / (1 + sympy.exp(-x))


def cdf(x: sympy.Expr) -> sympy.Expr:
    return (1 + sympy.erf(x / sympy.sqrt(2))) / 2


def piecewise(condition: sympy.Expr, yes: sympy.Expr, no: sympy.Expr) -> sympy.Expr:
    return sympy.Piecewise((yes, condition), (no, True))


MEANING: dict[str, Callable[..., sympy.Expr]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "abs": lambda x: piecewise(x > 0, x, -x),
    "sign": lambda x: piecewise(x > 0, sympy.Integer(1), piecewise(x < 0, sympy.Integer(-1), sympy.Integer(0))),
    "min": lambda x, y: piecewise(x < y, x, y),
    "max": lambda x, y: piecewise(x > y, x, y),
    "where": lambda p, x, y: piecewise(sympy.Ne(p, 0), x, y),
    "lt": lambda x, y: piecewise(x < y, sympy.Integer(1), sympy.Integer(0)),
    "le": lambda x, y: piecewise(x <= y, sympy.Integer(1), sympy.Integer(0)),
    "gt": lambda x, y: piecewise(x > y, sympy.Integer(1), sympy.Integer(0)),
    "ge": lambda x, y: piecewise(x >= y, sympy.Integer(1), sympy.Integer(0)),
    "eq": lambda x, y: piecewise(sympy.Eq(x, y), sympy.Integer(1), sympy.Integer(0)),
    "ne": lambda x, y: piecewise(sympy.Eq(x, y), sympy.Integer(0), sympy.Integer(1)),
    "sigmoid": sigmoid,
    "logsigmoid": lambda x: -sympy.log(1 + sympy.exp(-x)),
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "tanh": sympy.tanh,
    "relu": lambda x: piecewise(x > 0, x, sympy.Integer(0)),
    "elu": lambda x: piecewise(x > 0, x, sympy.exp(x) - 1),
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * cdf(x),
    "cdf": cdf,
    "logdecay": lambda x: piecewise(x < -104, sympy.Integer(-104), piecewise(x > 0, sympy.Integer(0), x)),
    "cos": sympy.cos,
    "sin": sympy.sin,
}
POSITIVE = ("log", "sqrt", "rsqrt")
NEGATIVE = ("logdecay",)
POINTS = ((0.7, -1.3), (-2.1, 0.4), (1.9, 1.2), (-0.3, -0.8))


def meaning(e: Expr) -> sympy.Expr:
    """Turns an expression over numbers into sympy's."""
    if e.op == "const":
        return sympy.Float(e.value, 30)
    if e.op == "input":
        return sympy.Symbol(e.name, real=True)
    return MEANING[e.op](*map(meaning, e.args))


def points(name: str) -> list[tuple[float, ...]]:
    """Returns points inside the domain of a function, away from its kinks."""
    arity = FUNCTIONS[name].arity
    out: list[tuple[float, ...]] = []
    for x, y in POINTS:
        x = abs(x) if name in POSITIVE else -abs(x) if name in NEGATIVE else x
        out.append(((1.0 if x > 0 else 0.0), x, y) if name == "where" else (x, y)[:arity])
    return out


def test_the_tables_name_the_same_functions() -> None:
    assert set(MEANING) == set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_adjoint_is_the_derivative_that_sympy_finds(name: str) -> None:
    function = FUNCTIONS[name]
    leaves, symbols = X[: function.arity], (a, b, c)[: function.arity]
    y = Expr(name, tuple(leaves), token=True)
    given = function.adjoint(E, D, y, *leaves)
    assert len(given) == function.arity
    for i, adjoint in enumerate(given):
        wanted = d * sympy.diff(MEANING[name](*symbols), symbols[i])
        got = sympy.Integer(0) if adjoint is None else meaning(adjoint)
        for point in points(name):
            values = dict(zip(symbols, point, strict=True)) | {d: 1.7}
            difference = (got - wanted).subs(values)
            assert abs(float(difference.evalf(20))) < 1e-12, (i, point)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_torch_form_computes_the_function_and_autograd_agrees_with_the_adjoint(name: str) -> None:
    function = FUNCTIONS[name]
    leaves = X[: function.arity]
    given = function.adjoint(E, D, Expr(name, tuple(leaves), token=True), *leaves)
    for point in points(name):
        xs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in point]
        y = torch_of(Expr(name, tuple(leaves), token=True), dict(zip("abc", xs, strict=False)))
        wanted = MEANING[name](*(sympy.Float(x, 30) for x in point))
        assert float(y.detach()) == pytest.approx(float(wanted), rel=1e-12, abs=1e-15)
        if not y.requires_grad:
            assert all(g is None for g in given)
            continue
        grads = torch.autograd.grad(y, xs, torch.tensor(1.7, dtype=torch.float64), allow_unused=True)
        for adjoint, wanted_grad in zip(given, grads, strict=True):
            values = dict(zip("abcd", (*xs, *[xs[0]] * (3 - len(xs)), torch.tensor(1.7, dtype=torch.float64)), strict=True))
            got = 0.0 if adjoint is None else float(torch_of(adjoint, values))
            assert got == pytest.approx(0.0 if wanted_grad is None else float(wanted_grad), rel=1e-12, abs=1e-15)


def torch_of(e: Expr, values: dict[str, Tensor]) -> Tensor:
    """Evaluates an expression over numbers by torch's functions."""
    if e.op == "const":
        return torch.tensor(e.value, dtype=torch.float64)
    if e.op == "input":
        return values[e.name]
    xs = [torch_of(x, values) for x in e.args]
    table: dict[str, Callable[..., Tensor]] = {
        "neg": torch.neg,
        "min": torch.minimum,
        "max": torch.maximum,
        "where": lambda p, x, y: torch.where(p != 0, x, y),
        "logsigmoid": torch.nn.functional.logsigmoid,
        "softplus": torch.nn.functional.softplus,
        "elu": torch.nn.functional.elu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "cdf": torch.special.ndtr,
        "logdecay": lambda x: torch.clamp(x, -104.0, 0.0),
    }
    return (table.get(e.op) or getattr(torch, e.op))(*xs)


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "logsigmoid", "silu", "gelu", "tanh", "elu"])
@pytest.mark.parametrize("x", [-300.0, -100.0, 100.0, 300.0])
def test_adjoints_stay_finite_far_out(name: str, x: float) -> None:
    (adjoint,) = FUNCTIONS[name].adjoint(E, D, Expr(name, (X[0],), token=True), X[0])
    assert adjoint is not None
    assert math.isfinite(float(torch_of(adjoint, {"a": torch.tensor(x), "d": torch.tensor(1.0)})))


def test_a_tie_is_split_evenly() -> None:
    for name in ("min", "max"):
        given = FUNCTIONS[name].adjoint(E, D, Expr(name, (X[0], X[1]), token=True), X[0], X[1])
        at = {"a": torch.tensor(2.0), "b": torch.tensor(2.0), "d": torch.tensor(1.0)}
        assert [float(torch_of(g, at)) for g in given if g is not None] == [0.5, 0.5]


# ---- vector rules, and states ---------------------------------------------------------------------------------------------------

MAPS = {
    "softmax": "softmax(x)",
    "l2norm": "l2norm(x)",
    "rmsnorm": "rmsnorm(x, 0.01)",
    "concat": "concat(x, silu(x)) -> F",
    "taylor2": "taylor2(x) -> F",
    "quad": "quad(x) -> F",
    "contract": "x @ W",
    "outer": "x @ tanh(outer(x, x @ W))",
    "rowmax": "x - max(x)",
    "sum": "x * sum(x * x)",
    "mean": "x - mean(x)",
    "pow": "(1 + x * x) ** -1.5",
}
READS = {"inclusive": "phi(q) @ S[t]", "exclusive": "phi(q) @ S[t-1]", "decayed": "phi(q) @ (exp(g) * S[t-1])"}


def text(phi: str, read: str = READS["inclusive"], decay: str = "exp(g) * ", gate: str = "[H]", extra: str = "") -> str:
    """Writes a tiny spec; every tensor that is named is used."""
    params = "params: {W: [K, M]}\n" if "W" in phi else ""
    return (
        f"name: tiny\ninputs: {{q: [H, K], k: [H, K], v: [H, V], g: {gate}}}\n{params}assume:\n  - g <= 0\ndefine:\n  phi(x): {phi}\n"
        f"recurrence:\n  S: {decay}S[t-1] + outer(phi(k), v)\n{extra}  o: {read}\n"
    )


def check(spec: str) -> None:
    """Compares the generated backward in float64 with finite differences."""
    variant = read_text(spec)
    op = lagen.load(variant, printed=())
    case = make(variant, Extent(4, batch=1, heads=1, dims=(("K", 3), ("V", 2), ("M", 2))), carried=True)
    assert case.initial_states is not None
    given = [x.double().requires_grad_() for x in (*case.inputs, *case.params, *case.initial_states)]
    n = len(given) - len(case.initial_states)

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        states = xs[n:] if len(xs) - n > 1 else xs[n]
        o, final = op(*xs[:n], initial_state=states, output_final_state=True, backend="torch")
        return (o, *(final if isinstance(final, tuple) else (final,)))

    assert torch.autograd.gradcheck(run, given, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_every_rule_of_the_table_is_tried() -> None:
    assert set(RULES) - {"rename", "expand"} == set(MAPS)


@pytest.mark.parametrize("phi", MAPS)
def test_a_vector_rule_agrees_with_finite_differences(phi: str) -> None:
    check(text(MAPS[phi]))


@pytest.mark.parametrize("decay", ["[H]", "[H, K]", "[H, V]"])
@pytest.mark.parametrize("read", READS)
def test_states_and_decays_agree_with_finite_differences(read: str, decay: str) -> None:
    check(text("x", READS[read], gate=decay))


def test_a_normaliser_agrees_with_finite_differences() -> None:
    check(text("elu(x) + 1", "(phi(q) @ S[t]) / (phi(q) @ z[t])", extra="  z: exp(g) * z[t-1] + phi(k)\n"))
