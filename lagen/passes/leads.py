"""Moves leads down to what is stored: the value that the token after has is computed from what it loads, in the row below."""

from __future__ import annotations

from collections.abc import Callable

from lagen.ir import expr as E
from lagen.ir.expr import Expr


def push_leads(root: Expr, stored: Callable[[Expr], bool]) -> Expr:
    """Rewrites ``root`` so that every lead stands on a value that is ``stored`` for all tokens."""
    led: dict[Expr, Expr] = {}

    def push(n: Expr) -> Expr:
        if not n.token:
            return n
        if n not in led:
            led[n] = E.lead(n) if stored(n) else E.rebuild(n, tuple(map(push, n.args)))
        return led[n]

    return E.rewrite(root, lambda n: push(push_leads(n.args[0], stored)) if n.op == "lead" else None)
