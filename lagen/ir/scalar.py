"""Element-wise functions, one row each: arity, adjoint, and the form it takes in torch, Triton and C++.

A function stays an atom from the spec to the printed kernel: softplus expanded to log(1 + exp(x)) has the derivative NaN at x = 100.
An adjoint is written once, over expressions: given the cotangent ``d`` of the result ``y`` it returns one cotangent per operand
(None where the operand gets none). ``m`` is lagen.ir.expr, handed in so that this table stays below it. Forms are
templates over operands ``{0}``, ``{1}``, ...; names in capitals or with a leading ``lg_`` come from the backend's prelude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lagen.ir.expr import Expr

Adjoint = Callable[..., "tuple[Expr | None, ...]"]


@dataclass(frozen=True)
class Function:
    """One element-wise function. ``zero`` tells that it maps zeros to zero (so padding stays padding)."""

    name: str
    arity: int
    adjoint: Adjoint
    torch: str
    triton: str
    cpp: str
    zero: bool = False


def _smooth(derivative: Callable[[ModuleType, Expr, Expr], Expr]) -> Adjoint:
    """Makes the adjoint of a one-argument function from its derivative as a function of argument x and result y."""
    return lambda m, d, y, x: (m.mul(d, derivative(m, x, y)),)


def _pick(m: ModuleType, d: Expr, a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Splits a cotangent between a and b where a > b, evenly at a tie, as torch.maximum does."""
    half = m.call("where", m.call("eq", a, b), m.mul(m.const(0.5), d), m.ZERO)
    return m.add(m.call("where", m.call("gt", a, b), d, m.ZERO), half), m.add(m.call("where", m.call("gt", b, a), d, m.ZERO), half)


def _none(m: ModuleType, d: Expr, y: Expr, *args: Expr) -> tuple[None, ...]:
    return (None,) * len(args)


CLOSED = -41.5
"""The log of a gate that lets less than 1e-18 through: its gradient is taken to be 0."""

_SQRT_2_OVER_PI = 0.3989422804014327  # 1 / sqrt(2 pi), the normal density at 0

_ROWS = (
    Function("add", 2, lambda m, d, y, a, b: (d, d), "{0} + {1}", "{0} + {1}", "{0} + {1}", True),
    Function("sub", 2, lambda m, d, y, a, b: (d, m.neg(d)), "{0} - {1}", "{0} - {1}", "{0} - {1}", True),
    Function("mul", 2, lambda m, d, y, a, b: (m.mul(d, b), m.mul(d, a)), "{0} * {1}", "{0} * {1}", "{0} * {1}", True),
    Function("div", 2, lambda m, d, y, a, b: (m.div(d, b), m.neg(m.mul(m.div(d, b), y))), "{0} / {1}", "{0} / {1}", "{0} / {1}", True),
    Function("neg", 1, lambda m, d, y, x: (m.neg(d),), "-{0}", "-{0}", "-{0}", True),
    Function("exp", 1, _smooth(lambda m, x, y: y), "torch.exp({0})", "tl.exp({0})", "lg_exp({0})"),
    # a gate that has closed to 0 sends back 0, not 0 / 0: 1e-37 is about the least normal float32
    Function("log", 1, lambda m, d, y, x: (m.div(d, m.call("max", x, m.const(1e-37))),), "torch.log({0})", "tl.log({0})", "lg_log({0})"),
    Function("sqrt", 1, lambda m, d, y, x: (m.div(m.mul(m.const(0.5), d), y),), "torch.sqrt({0})", "tl.sqrt({0})", "lg_sqrt({0})", True),
    Function(
        "rsqrt", 1, _smooth(lambda m, x, y: m.mul(m.const(-0.5), y, y, y)), "torch.rsqrt({0})", "tl.rsqrt({0})", "(1.0f / lg_sqrt({0}))"
    ),
    Function("abs", 1, _smooth(lambda m, x, y: m.call("sign", x)), "torch.abs({0})", "tl.abs({0})", "lg_abs({0})", True),
    Function("sign", 1, _none, "torch.sign({0})", "lg_sign({0})", "lg_sign({0})", True),
    Function(
        "min", 2, lambda m, d, y, a, b: _pick(m, d, b, a), "torch.minimum({0}, {1})", "tl.minimum({0}, {1})", "lg_min({0}, {1})", True
    ),
    Function(
        "max", 2, lambda m, d, y, a, b: _pick(m, d, a, b), "torch.maximum({0}, {1})", "tl.maximum({0}, {1})", "lg_max({0}, {1})", True
    ),
    Function(
        "where",
        3,
        lambda m, d, y, c, a, b: (None, m.call("where", c, d, m.ZERO), m.call("where", c, m.ZERO, d)),
        "torch.where({0}, {1}, {2})",
        "tl.where({0}, {1}, {2})",
        "lg_where({0}, {1}, {2})",
    ),
    *(
        Function(name, 2, _none, f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}}", f"({{0}} {sign} {{1}})")
        for name, sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!="))
    ),
    Function(  # not y (1 - y), which rounds an open gate's slope to 0
        "sigmoid",
        1,
        _smooth(lambda m, x, y: m.mul(y, m.call("sigmoid", m.neg(x)))),
        "torch.sigmoid({0})",
        "tl.sigmoid({0})",
        "lg_sigmoid({0})",
    ),
    Function(
        "logsigmoid",
        1,
        _smooth(lambda m, x, y: m.call("sigmoid", m.neg(x))),
        "torch.nn.functional.logsigmoid({0})",
        "lg_logsigmoid({0})",
        "lg_logsigmoid({0})",
    ),
    Function(
        "softplus",
        1,
        _smooth(lambda m, x, y: m.call("sigmoid", x)),
        "torch.nn.functional.softplus({0})",
        "lg_softplus({0})",
        "lg_softplus({0})",
    ),
    Function("tanh", 1, _smooth(lambda m, x, y: m.sub(m.ONE, m.mul(y, y))), "torch.tanh({0})", "lg_tanh({0})", "lg_tanh({0})", True),
    Function(
        "relu",
        1,
        lambda m, d, y, x: (m.call("where", m.call("gt", x, m.ZERO), d, m.ZERO),),
        "torch.relu({0})",
        "tl.maximum({0}, 0.0)",
        "lg_max({0}, 0.0f)",
        True,
    ),
    Function(
        "elu",
        1,
        _smooth(lambda m, x, y: m.call("exp", m.call("min", x, m.ZERO))),
        "torch.nn.functional.elu({0})",
        "lg_elu({0})",
        "lg_elu({0})",
        True,
    ),
    Function(
        "silu",
        1,
        _smooth(lambda m, x, y: m.add(m.call("sigmoid", x), m.mul(y, m.sub(m.ONE, m.call("sigmoid", x))))),
        "torch.nn.functional.silu({0})",
        "{0} * tl.sigmoid({0})",
        "({0} * lg_sigmoid({0}))",
        True,
    ),
    Function(
        "gelu",
        1,
        _smooth(lambda m, x, y: m.add(m.call("cdf", x), m.mul(m.const(_SQRT_2_OVER_PI), x, m.call("exp", m.mul(m.const(-0.5), x, x))))),
        "torch.nn.functional.gelu({0})",
        "{0} * lg_cdf({0})",
        "({0} * lg_cdf({0}))",
        True,
    ),
    Function(  # the normal distribution function, for gelu's derivative; not part of the spec language
        "cdf",
        1,
        _smooth(lambda m, x, y: m.mul(m.const(_SQRT_2_OVER_PI), m.call("exp", m.mul(m.const(-0.5), x, x)))),
        "torch.special.ndtr({0})",
        "lg_cdf({0})",
        "lg_cdf({0})",
    ),
    # What kernels accumulate of a log-decay: exp(-104) is 0 in float32, so a hard reset (-inf) is legal. A gate's gradient is a
    # difference of sums; what rounding leaves of it where the gate lets less than 1e-18 through is noise, and no gradient is handed on.
    Function(
        "logdecay",
        1,
        lambda m, d, y, x: (m.call("where", m.call("lt", x, m.const(CLOSED)), m.ZERO, d),),
        "torch.clamp({0}, -104.0, 0.0)",
        "tl.minimum(tl.maximum({0}, -104.0), 0.0)",
        "lg_min(lg_max({0}, -104.0f), 0.0f)",
        True,
    ),
    Function("cos", 1, _smooth(lambda m, x, y: m.neg(m.call("sin", x))), "torch.cos({0})", "tl.cos({0})", "lg_cos({0})"),
    Function("sin", 1, _smooth(lambda m, x, y: m.call("cos", x)), "torch.sin({0})", "tl.sin({0})", "lg_sin({0})", True),
)

FUNCTIONS: dict[str, Function] = {f.name: f for f in _ROWS}
"""Every element-wise function, by name. Spec files may name all of them but the operators, cdf and logdecay."""
