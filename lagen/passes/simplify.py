"""Simplifies expressions before they are lowered: finds again what differentiation took apart.

``absorb`` joins a strict readout with the token's own term into an inclusive readout, where no decay's gradient wants the strict one.
``gather`` adds what meets the same vector in an inner product. ``factor`` pulls numbers out of inner products, so that matmul
operands stay what was loaded.
"""

from __future__ import annotations

from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.expr import Expr, addends, walk
from lagen.ir.recurrence import Adjoint, State, readout
from lagen.passes.chunk import sides, strip
from lagen.passes.differentiate import pair

_INCLUSIVE = {"decayed": "now", "later": "since"}


def simplify(adjoint: Adjoint) -> Adjoint:
    """Joins strict readouts with own terms in every gradient of ``adjoint``, and in what reverse states are written."""
    states = {s.name: s for s in adjoint.recurrence.states + adjoint.states}
    given = [*(e for _, e in adjoint.gradients), *(x for s in adjoint.states for w in s.writes for x in (w.row, w.col))]
    strict = {n for e in given for s in E.reads(e, "suffix") for a in s.args for n in walk(a) if n.op == "readout"}

    def simple(e: Expr) -> Expr:
        return gather(absorb(e, states, strict))

    return replace(
        adjoint,
        states=tuple(replace(s, writes=tuple(replace(w, row=simple(w.row), col=simple(w.col)) for w in s.writes)) for s in adjoint.states),
        gradients=tuple((name, simple(e)) for name, e in adjoint.gradients),
    )


def own_terms(node: Expr, state: State) -> list[Expr]:
    """Lists what an inclusive readout adds to a strict one: the token's own writes."""
    out = []
    for w in state.writes:
        if len(state.dims) > 1 and not node.attr("dim"):  # read element by element
            out.append(E.outer(w.row, w.col))
            continue
        near, far = sides(state, node.attr("dim"), w.row, w.col)
        out.append(E.mul(pair(near, node.args[0]), far))
    return out


def absorb(root: Expr, states: dict[str, State], strict: set[Expr]) -> Expr:
    """Joins strict readouts with their own terms in every sum of ``root``; ``strict`` ones are left alone."""

    def rule(n: Expr) -> Expr | None:
        if n.op not in ("add", "sub"):
            return None
        terms, changed = addends(n), False
        for t in list(terms):
            if t.op != "readout" or t in strict or t.attr("at") not in _INCLUSIVE:
                continue
            state = states[t.name]
            if len(t.dims) > 1:  # a dense state number by number: what its decay's gradient is made of
                continue
            own = own_terms(t, state)
            if all(o in terms for o in own) and all(w.decayed for w in state.writes):
                for o in own:
                    terms.remove(o)
                terms[terms.index(t)] = readout(state, t.args[0], t.attr("dim"), _INCLUSIVE[t.attr("at")])
                changed = True
        return E.add(*(absorb(t, states, strict) for t in terms)) if changed else None

    return E.rewrite(root, rule)


def gather(root: Expr) -> Expr:
    """Adds what meets the same vector in an inner product before it meets it, so that its pair sums can be one."""

    def rule(n: Expr) -> Expr | None:
        if n.op != "add" or n.dims:
            return None
        terms = addends(n)
        by_vector: dict[Expr, list[Expr]] = {}
        for t in terms:
            if t.op == "contract" and E.reads(t.args[1], "readout"):
                by_vector.setdefault(t.args[0], []).append(t)
        if all(len(ts) == 1 for ts in by_vector.values()):
            return None
        out = [t for t in terms if not any(t in ts for ts in by_vector.values())]
        for vector, ts in by_vector.items():
            out.append(E.contract(vector, E.add(*(gather(t.args[1]) for t in ts))))
        return E.add(*out)

    return E.rewrite(root, rule)


def factor(root: Expr) -> Expr:
    """Pulls numbers out of inner products of vectors."""

    def rule(n: Expr) -> Expr | None:
        if n.op != "contract" or n.dims or n.args[0].op == "readout":
            return None
        (n1, v1), (n2, v2) = strip(factor(n.args[0])), strip(factor(n.args[1]))
        if n1 == n2 == E.ONE or not (v1.dims and v2.dims):
            return None
        return E.mul(n1, n2, E.contract(v1, v2))

    return E.rewrite(root, rule)
