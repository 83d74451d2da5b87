"""Pair sums under a vector decay: which are stored as one, and which come of one matmul.

``take_own`` has pair sums take in what a token gives itself, where that is only ever added to them.
``gather`` finds pair sums that are only ever added up: their sum is stored. ``lag`` finds those that another one holds a token earlier.
``join`` joins those of one table: what readers sum over earlier writers, and what those writers sum over later readers. Both are sums
over the same pairs under the same decay, so at every level of the dyadic anchors one matmul gives both: its rows are the readers in the
upper half of each block, and the writers in the lower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lagen.ir import expr as E
from lagen.ir.chunk import COL, SIDES
from lagen.ir.expr import LEAVES, Expr, walk
from lagen.ir.plan import Kernel
from lagen.passes.leads import push_leads


class _Sum(NamedTuple):
    """A pair sum taken apart: row * (gram @ (col * vector)); ``key`` is what the two of a table share."""

    key: tuple[Expr, str, Expr, Expr]  # gate, prev, what readers and writers bring to the table
    reader: bool  # it sums over earlier writers
    row: Expr
    vector: Expr
    own: bool  # it takes tokens themselves in

    @property
    def diagonal(self) -> Expr:
        """Makes what a token gives itself, but for the row."""
        return E.mul(Expr("diag", (Expr("gram", self.key[2:], dims=(COL,), token=True),), token=True), self.vector)


def _apart(e: Expr) -> _Sum | None:
    """Takes a pair sum apart; None where it is none under a vector decay."""
    if e.op != "mix" or len(e.args) != 4 or e.args[1].args:  # a second decay weighs each side's pairs
        return None
    factors = E.factors(e.args[0])
    tables = [f for f in factors if f.op == "gram" and len(f.args) == 2]
    columns = [x for f in factors if f.op == "col" for x in E.factors(f.args[0])]
    rows = [f for f in factors if COL not in f.dims]
    if len(tables) != 1 or len(factors) != len(rows) + 1 + sum(f.op == "col" for f in factors):
        return None
    a, b = tables[0].args
    gate, prev, reader = e.args[3], e.attr("prev"), e.attr("reverse") == "0"
    return _Sum((gate, prev, *((a, b) if reader else (b, a))), reader, E.mul(*rows), E.mul(*columns, e.args[2]), e.attr("inclusive") == "1")


def is_pair_sum(e: Expr) -> bool:
    """Tells whether a value is a pair sum under a vector decay, or several of one decay added up."""
    terms = E.addends(e)
    return all(t.op == "mix" and len(t.args) == 4 for t in terms) and len({t.args[3] for t in terms}) == 1


def decay_of(sums: Sequence[Expr]) -> Expr | None:
    """Returns the one vector decay that pair sums are under; None where there is none, or they hang on what a sweep carries."""
    alike = bool(sums) and is_pair_sum(E.add(*sums))
    return sums[0].args[3] if alike and not any(x.op == "carry" for x in walk(*sums)) else None


def tables_of(values: Iterable[Expr]) -> set[tuple[Expr, ...]]:
    """Lists the tables that pair sums below ``values`` are of, with their decay: by readers and writers."""
    return {(s.key[0], *s.key[2:]) for n in walk(*values) if (s := _apart(n)) is not None}


def by_table(sums: Sequence[tuple[Expr, Expr]]) -> list[list[tuple[Expr, Expr]]]:
    """Groups pair sums, each with what it is multiplied by, by their tables, so that a group has all readers and writers of its table."""
    groups: dict[object, list[tuple[Expr, Expr]]] = {}
    sides: dict[object, set[bool]] = {}
    for left, mix in sums:
        s = _apart(mix)
        key = s.key if s is not None else None
        groups.setdefault(key, []).append((left, mix))
        sides.setdefault(key, set()).add(s is not None and s.reader)
    return list(groups.values()) if all(len(x) == 2 for x in sides.values()) else [list(sums)]


class _Term(NamedTuple):
    """An addend: what those that may be added up share, what is added up, and what else stands below it."""

    key: tuple[object, ...]
    core: Expr
    rest: tuple[Expr, ...]


def _add_up(
    kernels: Sequence[Kernel], term: Callable[[Expr], _Term | None], total: Callable[[_Term, list[Expr]], Expr], but: str = ""
) -> tuple[Kernel, ...]:
    """Puts cores that are always added to each other, ``but`` below such an op, into a ``total`` for a term of theirs.

    ``term`` takes an addend apart.
    """
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
        for t in (t for t in E.addends(e) if t.op != but):
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


def take_own(sweeps: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Lets pair sums take in what a token gives itself, where that stands beside them everywhere: one launch has the table for both.

    What it gives the token after stays in sweeps that run from chunk to chunk: beside the levels its vectors would spill.
    """
    beside: dict[Expr, bool] = {}

    def own(m: Expr, terms: Sequence[Expr], parallel: bool = True) -> Expr | None:
        s = _apart(m) if m.op == "mix" else None
        if s is None or s.own or (E.reads(s.vector, "lead") and not parallel):
            return None
        wanted = Counter(E.factors(E.mul(s.row, s.vector)))
        for t in terms:
            met = [f for f in E.factors(t) if f.op == "contract" and not f.dims and {*f.args} == {*s.key[2:]}]
            if met and Counter(E.factors(t)) - Counter(met[:1]) == wanted:
                return t
        return None

    def note(e: Expr, parallel: bool) -> None:
        terms = E.addends(e)
        for t in terms:
            if t.op == "mix":
                beside[t] = beside.get(t, True) and own(t, terms, parallel) is not None
            for a in t.args if t.op != "tail" else ():
                note(a, parallel)

    for k in sweeps:
        for v in k.values:
            note(v, k.parallel)

    def rule(e: Expr) -> Expr | None:
        terms = E.addends(e) if e.op in ("add", "sub") else []
        taken = {t: x for t in terms if beside.get(t) and (x := own(t, terms)) is not None}
        if not taken:
            return None
        return E.add(*(_whole(t) if t in taken else E.rewrite(t, rule) for t in terms if t not in taken.values()))

    return tuple(k.map(lambda e: E.rewrite(e, rule)) for k in sweeps)


def _whole(m: Expr) -> Expr:
    return replace(m, attrs=tuple((k, "1" if k == "inclusive" else v) for k, v in m.attrs), _hash=0)


def gather(sweeps: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Puts pair sums of one decay that are always added to each other into a sum of their own."""

    def term(t: Expr) -> _Term | None:
        m = t.args[0] if t.op == "neg" else t
        return _Term((m.args[3], t.op == "neg"), m, m.args) if m.op == "mix" and is_pair_sum(m) else None

    return _add_up(sweeps, term, lambda x, sums: E.neg(E.add(*sums)) if x.key[1] else E.add(*sums), "tail")


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
        if prev == "1" and not s.own and any(x.key == (gate, "0", led, b) and x.vector == s.vector for x in found.values()):
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


def _weighed(terms: Sequence[Expr], mix: Expr, row: Expr, vector: Expr) -> tuple[Expr, Expr] | None:
    """Finds the term that has a pair sum with ``row`` times a ``vector`` by numbers that all tokens share; returns it and those."""
    for t in terms:
        given = E.factors(t)
        if mix not in given:
            continue
        given.remove(mix)
        rest = Counter(f for x in (*given, row) for f in E.factors(x))
        for f in E.factors(vector):
            if not rest[f]:
                return None
            rest[f] -= 1
        numbers = E.mul(*rest.elements())
        return None if numbers.token or numbers.dims else (t, numbers)
    return None


def _take_between(terms: list[Expr], sides: Sequence[tuple[Expr, Expr, Expr, bool]], both: Expr) -> None:
    """Puts one term for what readers sum, less what writers do, where ``terms`` have both and weigh them alike.

    ``sides`` are pair sums, each with its row, the vectors that weigh it, and whether it is of readers.
    """
    found: dict[bool, tuple[Expr, Expr]] = {}
    for mix, row, vector, reader in sides:
        term = _weighed(terms, mix, row if reader else E.neg(row), vector)
        if term is not None:
            found.setdefault(reader, term)
    if len(found) == 2 and found[True][1] == found[False][1]:
        terms[:] = [t for t in terms if t not in (found[True][0], found[False][0])]
        terms.append(E.mul(found[True][1], Expr("between", (both,), dims=both.dims, head=both.head, token=True)))


def join(k: Kernel) -> Kernel:
    """Joins the pair sums of a launch two by two: ``readers`` is what readers sum, ``writers`` what writers do, of one table or several.

    Where each side is weighed by the vectors that the other one sums, ``between`` is the difference, made of the same product pair by pair.
    """
    table: dict[Expr, Expr] = {}
    tails = {n: E.addends(n.args[0]) for n in walk(*k.values) if n.op == "tail"}
    apart = {n: s for n in walk(*k.values) if (s := _apart(n)) is not None}
    for n, m in partners(k.values):
        if n in table or m in table:
            continue
        reader, writer = apart[n], apart[m]
        gate, prev, a, b = reader.key
        rows = {s.row for s in apart.values() if s.key == reader.key}
        number = reader.row if len(rows) == 1 and not (reader.row.token or reader.row.dims) else E.ONE  # what all share goes to the table
        operands = (a, b, writer.vector, reader.vector, number, gate)
        both = Expr("twins", operands, dims=n.dims, head=n.head, token=True, attrs=(("prev", prev),))
        # the same sums under other numbers of the row, or with what a token gives itself
        sides = {
            x: Expr("readers" if s.reader else "writers", (both,), dims=n.dims, head=n.head, token=True)
            for x, s in apart.items()
            if s.key == reader.key and s.vector == (reader if s.reader else writer).vector
        }
        rests = {x: E.ONE if apart[x].row == number else apart[x].row for x in sides}
        for x, side in sides.items():
            table[x] = E.add(E.mul(rests[x], side), *([E.mul(apart[x].row, apart[x].diagonal)] if apart[x].own else []))
        given = {True: writer.vector, False: reader.vector}  # by the side that is weighed by them
        for terms in tails.values():
            _take_between(terms, [(x, rests[x], given[apart[x].reader], apart[x].reader) for x in sides], both)
    table = {n: replace(n, args=(E.add(*(E.substitute(t, table) for t in terms)),), _hash=0) for n, terms in tails.items()} | table

    def term(t: Expr) -> _Term | None:
        sums = [f for f in E.factors(t) if f.op in SIDES]
        row = E.mul(*(f for f in E.factors(t) if f not in sums))
        return _Term((sums[0].op, row), sums[0], (row,)) if len(sums) == 1 else None

    def total(x: _Term, sums: list[Expr]) -> Expr:
        return E.mul(*x.rest, replace(sums[0], args=tuple(a for n in sums for a in n.args), _hash=0))

    return _add_up([k.map(lambda e: E.substitute(e, table))], term, total)[0]
