"""Takes logarithms away where a kernel wants what they are taken of: of a decay for every element they cost as much as all the rest."""

from __future__ import annotations

import math

from lagen.ir import expr as E
from lagen.ir.expr import Expr


def compared(root: Expr) -> Expr:
    """This function compares what a logarithm is taken of, where a logarithm was compared with a number."""

    def rule(n: Expr) -> Expr | None:
        if n.op != "lt" or n.args[1].op != "const" or n.args[0].op not in ("log", "logsigmoid") or n.args[1].value >= 0:
            return None
        (x,), limit = n.args[0].args, n.args[1].value
        bound = math.exp(limit) if n.args[0].op == "log" else limit - math.log1p(-math.exp(limit))
        return E.call("lt", compared(x), E.const(bound))

    return E.rewrite(root, rule)


def decay(g: Expr) -> Expr:
    """This function returns the factor whose logarithm is ``g``, in [0, 1], without taking the logarithm first."""
    if g.op != "logdecay" or g.args[0].op not in ("log", "logsigmoid"):
        return E.call("exp", g)
    (x,) = g.args[0].args
    return E.call("sigmoid", x) if g.args[0].op == "logsigmoid" else E.call("min", E.call("max", x, E.ZERO), E.ONE)
