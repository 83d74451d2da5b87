"""Pair sums under a vector decay: which are stored as one, and which come of one matmul.

``gather`` finds pair sums that are only ever added up: their sum is stored. ``join`` joins those of one table: what readers sum over
earlier writers, and what those writers sum over later readers. Both are sums over the same pairs under the same decay, so at every
level of the dyadic anchors one matmul gives both: its rows are the readers in the upper half of each block, and the writers in the lower.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import Expr, walk
from lagen.ir.plan import Kernel


class _Sum(NamedTuple):
    """A pair sum taken apart: row * (gram @ (col * vector)); ``key`` is what the two of a table share."""

    key: tuple[Expr, str, Expr, Expr]  # gate, prev, what readers and writers bring to the table
    reader: bool  # it sums over earlier writers
    row: Expr
    vector: Expr


def _apart(e: Expr) -> _Sum | None:
    """Takes a pair sum apart; None where it is none under a vector decay, or takes tokens themselves in."""
    if e.op != "mix" or len(e.args) != 4 or e.attr("inclusive") == "1" or e.args[1].args:  # a second decay weighs each side's pairs
        return None
    factors = E.factors(e.args[0])
    tables = [f for f in factors if f.op == "gram" and len(f.args) == 2]
    columns = [x for f in factors if f.op == "col" for x in E.factors(f.args[0])]
    rows = [f for f in factors if COL not in f.dims]
    if len(tables) != 1 or len(factors) != len(rows) + 1 + sum(f.op == "col" for f in factors):
        return None
    a, b = tables[0].args
    gate, prev, reader = e.args[3], e.attr("prev"), e.attr("reverse") == "0"
    return _Sum((gate, prev, *((a, b) if reader else (b, a))), reader, E.mul(*rows), E.mul(*columns, e.args[2]))


def is_pair_sum(e: Expr) -> bool:
    """Tells whether a value is a pair sum under a vector decay, or several of one decay added up."""
    terms = E.addends(e)
    return all(t.op == "mix" and len(t.args) == 4 for t in terms) and len({t.args[3] for t in terms}) == 1


def gather(sweeps: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Puts pair sums of one decay that are always added to each other into a sum of their own."""
    found: dict[Expr, set[frozenset[Expr]]] = {}

    def groups(e: Expr) -> dict[tuple[Expr, bool], list[Expr]]:
        out: dict[tuple[Expr, bool], list[Expr]] = {}  # by decay, and whether they are taken off
        for t in E.addends(e):
            m = t.args[0] if t.op == "neg" else t
            if m.op == "mix" and is_pair_sum(m):
                out.setdefault((m.args[3], t.op == "neg"), []).append(m)
        return out

    def note(e: Expr) -> None:
        e = e.args[0] if e.op == "neg" else e
        for group in groups(e).values():
            for t in group:
                found.setdefault(t, set()).add(frozenset(group))
        for t in E.addends(e):
            for a in t.args if t.op != "neg" else t.args[0].args:
                note(a)

    for v in (v for k in sweeps for v in k.values):
        note(v)

    def rule(e: Expr) -> Expr | None:
        if e.op not in ("add", "sub"):
            return None
        terms, changed = E.addends(e), False
        for (_, off), group in groups(e).items():
            if len(group) > 1 and len(set(group)) == len(group) and all(found[t] == {frozenset(group)} for t in group):
                total = E.add(*sorted(group, key=order.__getitem__))
                rest = [t for t in terms if (t.args[0] if off and t.op == "neg" else t) not in group]
                terms = [*rest, E.neg(total) if off else total]
                changed = True
        return E.add(*(E.rewrite(t, rule) if t.op != "mix" and not is_pair_sum(t) else t for t in terms)) if changed else None

    order = {t: i for i, t in enumerate(found)}
    return tuple(k.map(lambda e: E.rewrite(e, rule)) for k in sweeps)


def partners(values: Iterable[Expr]) -> list[tuple[Expr, Expr]]:
    """Lists the pair sums of ``values`` that are of one table, readers' and writers'."""
    apart = {n: s for n in walk(*values) if (s := _apart(n)) is not None}
    found: dict[Expr, Expr] = {}
    for n, s in apart.items():
        for m, x in apart.items():
            if s.reader and not x.reader and x.key == s.key and m not in found.values():
                found[n] = m
                break
    return list(found.items())


def join(k: Kernel) -> Kernel:
    """Joins the pair sums of a launch two by two: ``readers`` is what readers sum, ``writers`` what writers do."""
    table: dict[Expr, Expr] = {}
    for n, m in partners(k.values):
        reader, writer = _apart(n), _apart(m)
        assert reader is not None and writer is not None
        gate, prev, a, b = reader.key
        both = Expr("twins", (a, b, writer.vector, reader.vector, gate), dims=n.dims, head=n.head, token=True, attrs=(("prev", prev),))
        table[n], table[m] = (
            E.mul(s.row, Expr(op, (both,), dims=n.dims, head=n.head, token=True)) for op, s in (("readers", reader), ("writers", writer))
        )
    return k.map(lambda e: E.substitute(e, table))
