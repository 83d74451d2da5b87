"""Corrections: what a state line writes that depends on its own past, as in outer(k, beta * (v - k @ S[t-1])).

Rule 1 of the language allows outer(w, c * (r @ P)) with P the past, or mirrored, with a number c. ``corrections`` finds them in a term
and refuses everything else that reads the own past; ``solve`` makes them solved values of the state (ir/recurrence.py), one for each w.
Several updates a token (DeltaProduct) come expanded: a read of the state after an earlier correction is a read of the past by another
vector and what that correction wrote, so that all corrections of a token read its past alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

from lagen.ir import expr as E
from lagen.ir.expr import ONE, Expr
from lagen.ir.recurrence import Solve, State, Write, readout, solved
from lagen.passes.linear_form import Lines, Term, flat, product, split_scalar
from lagen.passes.normal_form import Polynomial


@dataclass(frozen=True)
class Correction:
    """``write`` on one dim of the state, times ``number``, times the vector that ``read`` (a readout of the own past) leaves."""

    write: Expr
    number: Expr
    read: Expr


def corrections(lines: Lines, term: Term) -> tuple[Correction, ...]:
    """Returns the corrections in a term of a state line, () where it reads no own past; raises Refused where rule 1 forbids them."""
    reading = [f for f in term.factors if _own(lines, f)]
    if any(_own(lines, f) for f in term.over):
        _refuse(lines, f"'{lines.say(term)}' divides by a read of {lines.own}'s own past")
    if not reading:
        return ()
    if len(reading) > 1 or term.state is not None:
        _refuse(lines, f"'{lines.say(term)}' multiplies {lines.own}'s own past by itself")
    others = [f for f in term.factors if f is not reading[0]]
    made = []
    for read, factor in _split(lines, reading[0]):
        if read is None:
            continue
        factors = [*others, factor]
        wide = [f for f in (*factors, *term.over) if set(f.dims) & set(read.dims) and f.dims]
        if not read.dims:
            _refuse(
                lines,
                f"'{lines.respell(read)}' is a number that {lines.own}'s own past makes; only a read by one vector may be written back",
            )
        if wide:
            scaled = wide[0].args[0] if wide[0].op == "neg" else wide[0]
            help = f"a correction's factor is a number; scale v alone, as in outer(k, {scaled} * v - k @ {lines.own}[t-1])"
            _refuse(lines, f"'{scaled}' has the dim {read.dims[0]} that the read '{lines.respell(read)}' leaves", help, scaled)
        write = product(tuple(f for f in factors if f.dims), tuple(f for f in term.over if f.dims))
        made.append(Correction(write, product(tuple(f for f in factors if not f.dims), tuple(f for f in term.over if not f.dims)), read))
    return tuple(made)


def without_reads(lines: Lines, term: Term) -> tuple[Term, ...]:
    """Returns what a term is without its reads of the own past: itself, its part that reads nothing, or nothing."""
    reading = [f for f in term.factors if _own(lines, f)]
    if not reading:
        return (term,)
    others = tuple(f for f in term.factors if f is not reading[0])
    rests = [factor for read, factor in _split(lines, reading[0]) if read is None]
    return tuple(Term((*others, *((r,) if r != ONE else ())), term.over, term.state) for r in rests)


def solve(lines: Lines, state: State, found: list[Correction]) -> State:
    """Gives ``state`` a solved value for each vector that its corrections write along, joined with the plain write along it."""
    if not found:
        return state
    dim = found[0].read.attr("dim")
    on_row = dim == state.dims[0]
    groups: dict[Polynomial, tuple[Expr, list[Expr]]] = {}
    for c in found:
        number, write = split_scalar(c.write)
        groups.setdefault(lines.algebra.of(write), (write, []))[1].append(_told(lines, state, c.read, E.mul(c.number, number)))
    writes, solves = list(state.writes), []
    kept = found[0].read.dims[0]
    for i, (key, (write, reads)) in enumerate(groups.items()):
        base: Expr = E.ZERO
        for w in writes:
            number, along = split_scalar(w.row if on_row else w.col)
            if lines.algebra.of(along) == key:
                base = E.mul(number, w.col if on_row else w.row)
                writes.remove(w)
                break
        kinds = dict.fromkeys(r.attr("at") for r in reads)
        gathered = tuple(_gathered(state, [r for r in reads if r.attr("at") == at], dim, at) for at in kinds)
        leaf = solved(f"{state.name}_u{i + 1 if len(groups) > 1 else ''}", kept, state.head)
        solves.append(Solve(leaf, base, gathered))
        writes.append(Write(write, leaf) if on_row else Write(leaf, write))
    return replace(state, writes=tuple(writes), solves=tuple(solves))


def _told(lines: Lines, state: State, read: Expr, number: Expr) -> Expr:
    """Puts a number into the vector of a read; where the number holds the decay, the read is one of the decayed past."""
    past = E.leaf("past", state.name, state.dims, state.head, token=True)
    up, down = flat(number)
    if read.attr("at") == "previous" and state.decay:
        up, down, at = lines.past_of(past, up, down)
        return readout(state, E.mul(product(up, down), read.args[0]), read.attr("dim"), at)
    return E.rebuild(read, (E.mul(number, read.args[0]),))


def _gathered(state: State, reads: list[Expr], dim: str, at: str) -> Expr:
    """Reads once what several reads of one kind add up to."""
    total = reads[0].args[0]
    for r in reads[1:]:
        vector = r.args[0]
        total = E.sub(total, vector.args[0]) if vector.op == "neg" else E.add(total, vector)
    return readout(state, total, dim, at)


def refuse_two_sides(lines: Lines, found: list[Correction]) -> None:
    """Raises Refused where a state is corrected on both of its sides, or where a read misses a decay on the dim that it leaves."""
    if len({c.read.attr("dim") for c in found}) > 1:
        _refuse(lines, f"{lines.own} is corrected on both of its sides", "correct one side: reads of one state contract one dim")
    up, down = lines.decays.get(lines.own, ((), ()))
    for c in found:
        if c.read.attr("at") == "previous" and any(f.dims == c.read.dims for f in up + down):
            _refuse(
                lines,
                f"'{lines.respell(c.read)}' reads the undecayed past, but the decay has the dim {c.read.dims[0]} that the read leaves",
                f"read the decayed past, as in k @ (decay * {lines.own}[t-1])",
                c.read,
            )


def _own(lines: Lines, x: Expr) -> bool:
    return any(r.name == lines.own for r in E.reads(x, "readout"))


def _refuse(lines: Lines, message: str, help: str = "", term: Expr | None = None) -> NoReturn:
    form = f"a state is linear in its own past, on one side: outer(w, c * (r @ {lines.own}[t-1])) with a number c"
    lines.refuse("nonlinear-state", message, help or form, term)


def _split(lines: Lines, x: Expr) -> list[tuple[Expr | None, Expr]]:
    """Splits a value that is linear in reads of the own past into (read, factor), and (None, the rest)."""
    if not _own(lines, x):
        return [(None, x)]
    if x.op == "readout" and not _own(lines, x.args[0]):
        return [(x, ONE)]
    if x.op in ("add", "sub"):
        right = _split(lines, x.args[1])
        return _split(lines, x.args[0]) + [(r, f if x.op == "add" else E.neg(f)) for r, f in right]
    if x.op == "neg":
        return [(r, E.neg(f)) for r, f in _split(lines, x.args[0])]
    if x.op == "mul":
        a, b = x.args
        if _own(lines, a) and _own(lines, b):
            _refuse(lines, f"'{lines.respell(x)}' multiplies {lines.own}'s own past by itself", term=x)
        one, other = (a, b) if _own(lines, a) else (b, a)
        return [(r, E.mul(other, f)) for r, f in _split(lines, one)]
    if x.op == "div" and not _own(lines, x.args[1]):
        return [(r, E.div(f, x.args[1])) for r, f in _split(lines, x.args[0])]
    _refuse(lines, f"'{lines.respell(x)}' is not a sum of reads of {lines.own}'s own past, each times a number", term=x)
