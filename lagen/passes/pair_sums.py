"""Pair sums under a vector decay: which are stored as one, and which come of one matmul.

``gather`` finds pair sums that are only ever added up: their sum is stored. ``lag`` finds those that another one holds a token earlier.
``join`` joins those of one table: what readers sum over earlier writers, and what those writers sum over later readers. Both are sums
over the same pairs under the same decay, so at every level of the dyadic anchors one matmul gives both: its rows are the readers in the
upper half of each block, and the writers in the lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import LEAVES, Expr, walk
from lagen.ir.plan import Kernel
from lagen.passes.leads import push_leads


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


def tables_of(values: Iterable[Expr]) -> set[tuple[Expr, ...]]:
    """Lists the tables that pair sums below ``values`` are of, with their decay: by readers and writers."""
    return {(s.key[0], *s.key[2:]) for n in walk(*values) if (s := _apart(n)) is not None}


class _Term(NamedTuple):
    """An addend: what those that may be added up share, what is added up, and what else stands below it."""

    key: tuple[object, ...]
    core: Expr
    rest: tuple[Expr, ...]


def _add_up(
    kernels: Sequence[Kernel], term: Callable[[Expr], _Term | None], total: Callable[[_Term, list[Expr]], Expr]
) -> tuple[Kernel, ...]:
    """Puts cores that are always added to each other into a ``total``, for a term of theirs; ``term`` takes an addend apart."""
    found: dict[Expr, set[frozenset[Expr]]] = {}

    def groups(e: Expr) -> dict[tuple[object, ...], dict[Expr, tuple[Expr, _Term]]]:
        out: dict[tuple[object, ...], dict[Expr, tuple[Expr, _Term]]] = {}
        for t in E.addends(e):
            if (x := term(t)) is not None:
                out.setdefault(x.key, {})[x.core] = (t, x)
        return out

    def note(e: Expr) -> None:
        e = e.args[0] if e.op == "neg" else e
        for group in groups(e).values():
            for core in group:
                found.setdefault(core, set()).add(frozenset(group))
        for t in E.addends(e):
            x = term(t)
            for a in x.rest if x is not None else t.args if t.op != "neg" else t.args[0].args:
                note(a)

    for v in (v for k in kernels for v in k.values):
        note(v)
    order = {core: i for i, core in enumerate(found)}

    def rule(e: Expr) -> Expr | None:
        if e.op not in ("add", "sub"):
            return None
        terms, totals = E.addends(e), list[Expr]()
        for group in groups(e).values():
            mine = [t for t, _ in group.values()]
            if len(group) > 1 and all(found[c] == {frozenset(group)} for c in group) and sum(t in mine for t in terms) == len(group):
                totals.append(total(next(iter(group.values()))[1], sorted(group, key=order.__getitem__)))
                terms = [t for t in terms if t not in mine]
        return E.add(*(E.rewrite(t, rule) for t in terms), *totals) if totals else None

    return tuple(k.map(lambda e: E.rewrite(e, rule)) for k in kernels)


def gather(sweeps: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Puts pair sums of one decay that are always added to each other into a sum of their own."""

    def term(t: Expr) -> _Term | None:
        m = t.args[0] if t.op == "neg" else t
        return _Term((m.args[3], t.op == "neg"), m, m.args) if m.op == "mix" and is_pair_sum(m) else None

    return _add_up(sweeps, term, lambda x, sums: E.neg(E.add(*sums)) if x.key[1] else E.add(*sums))


def lag(sweeps: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Takes what readers of the state before their own decay sum from the sums of the token before, where those are there too.

    A sum over j < t under exp(b_{t-1} - b_j) is that of token t - 1 over j < t - 1, under the same decay, and the pair (t, t - 1), which
    decays by nothing: both read the same table, the one by its rows and the other by their leads.
    """
    found = {n: s for n in walk(*(v for k in sweeps for v in k.values)) if (s := _apart(n)) is not None and s.reader}
    inner: dict[Expr, Expr] = {}  # of a sum over earlier tokens: what stands a token before it, but for its row's numbers
    for n, s in found.items():
        gate, prev, a, b = s.key
        led = push_leads(E.lead(a), lambda x: x.op in LEAVES)
        if prev == "1" and any(x.key == (gate, "0", led, b) and x.vector == s.vector for x in found.values()):
            table = Expr("gram", (led, b), dims=(COL,), token=True)
            attrs = tuple((k, "0" if k == "prev" else v) for k, v in n.attrs)
            before = replace(n, args=(table, n.args[1], s.vector, gate), attrs=attrs, _hash=0)
            inner[n] = E.add(before, E.mul(Expr("diag", (table,), token=True), s.vector))

    def rule(e: Expr) -> Expr | None:
        terms = E.addends(e)
        if not all(t in inner for t in terms) or len({found[t].row for t in terms}) > 1:
            return None
        x = E.add(*(inner[t] for t in terms))
        return E.mul(found[terms[0]].row, Expr("lag", (x,), dims=x.dims, head=x.head, token=True))

    return tuple(k.map(lambda e: E.rewrite(e, rule)) for k in sweeps) if inner else sweeps


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
    """Joins the pair sums of a launch two by two: ``readers`` is what readers sum, ``writers`` what writers do, of one table or several."""
    table: dict[Expr, Expr] = {}
    readers = {n: s for n in walk(*k.values) if (s := _apart(n)) is not None and s.reader}
    for n, m in partners(k.values):
        if n in table:
            continue
        reader, writer = readers[n], _apart(m)
        assert writer is not None
        gate, prev, a, b = reader.key
        both = Expr("twins", (a, b, writer.vector, reader.vector, gate), dims=n.dims, head=n.head, token=True, attrs=(("prev", prev),))
        for x, s in readers.items():  # the same sum under another number of the row
            if s.key == reader.key and s.vector == reader.vector:
                table[x] = E.mul(s.row, Expr("readers", (both,), dims=n.dims, head=n.head, token=True))
        table[m] = E.mul(writer.row, Expr("writers", (both,), dims=n.dims, head=n.head, token=True))

    def term(t: Expr) -> _Term | None:
        sums = [f for f in E.factors(t) if f.op in ("readers", "writers")]
        row = E.mul(*(f for f in E.factors(t) if f not in sums))
        return _Term((sums[0].op, row), sums[0], (row,)) if len(sums) == 1 else None

    def total(x: _Term, sums: list[Expr]) -> Expr:
        return E.mul(*x.rest, replace(sums[0], args=tuple(a for n in sums for a in n.args), _hash=0))

    return _add_up([k.map(lambda e: E.substitute(e, table))], term, total)[0]
