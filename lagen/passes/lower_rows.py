"""Rewrites row functions into sums and element-wise functions, so that only their numbers need to cross memory."""

from __future__ import annotations

from lagen.ir import expr as E
from lagen.ir.expr import Expr


def lower_rows(root: Expr) -> Expr:
    """Writes softmax as exp(x - max) / sum, l2norm and rmsnorm as x times one number."""

    def rule(n: Expr) -> Expr | None:
        if n.op not in ("softmax", "l2norm", "rmsnorm"):
            return None
        x = lower_rows(n.args[0])
        if n.op == "softmax":
            e = E.call("exp", E.sub(x, E.reduce("rowmax", x)))
            return E.div(e, E.reduce("sum", e))
        square = E.contract(x, x)
        mean = E.div(square, E.size(x.dims[0])) if n.op == "rmsnorm" else square
        return E.mul(E.call("rsqrt", E.add(mean, E.const(n.value))), x)

    return E.rewrite(root, rule)
