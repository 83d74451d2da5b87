"""Canonicalise: from the lines a person wrote to the canonical recurrence (ir/recurrence.py).

Every state line is expanded as a linear form in its own past; its decay is the past's coefficient, its writes are the rest. Every
output is lowered to a token-wise expression over readouts. An illegal line raises Refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

from lagen.ir import expr as E
from lagen.ir.bounds import Proof, log_of, prove_nonpositive
from lagen.ir.expr import ONE, Expr
from lagen.ir.recurrence import Recurrence, State, Write
from lagen.ir.variant import OutputLine, StateLine, Variant
from lagen.passes.corrections import Correction, corrections, refuse_two_sides, solve, without_reads
from lagen.passes.linear_form import Flat, Lines, Term, flat, product, product_of_all, split_scalar
from lagen.passes.normal_form import UNIT, Algebra, Polynomial
from lagen.passes.peaks import peak


def canonicalise(variant: Variant) -> Recurrence:
    """This function returns the canonical recurrence of ``variant``; raises Refused (passes/refusal)."""
    done: dict[str, State] = {}
    decays: dict[str, Flat] = {}
    proofs: list[str] = []
    for line in variant.states:
        state, decays[line.name], proved = _state(Lines(variant, done, decays, line), line)
        done[line.name] = state
        proofs.extend(proved)
    outputs = tuple((o.name, _output(Lines(variant, done, decays, o), o)) for o in variant.outputs)
    recurrence = Recurrence(
        name=variant.name,
        inputs=variant.inputs,
        params=variant.params,
        states=_joined(tuple(done.values())),
        outputs=outputs,
        output_dims=tuple(o.dims for o in variant.outputs),
        names=tuple((n, e) for n, e in variant.names if not E.reads(e, "past", "now")),
        sizes=variant.sizes,
        proofs=tuple(proofs),
        chunk_sizes=variant.chunk_sizes,
        chunk_default=variant.chunk_default,
    )
    recurrence.verify()
    return recurrence


# ---- states ---------------------------------------------------------------------------------------------------------------------


def _state(lines: Lines, line: StateLine) -> tuple[State, Flat, tuple[str, ...]]:
    if line.peak:
        return peak(lines, line), ((), ()), ()
    terms = tuple(lines.freed(t) for t in lines.expand(line.expr))
    past = [t for t in terms if t.state is not None and t.state.name == line.name]
    found: list[Correction] = []
    if any(_reads_own(line, t) for t in terms):
        if past:  # read again with the decay known, so that a read of the decayed past is known as one
            lines = Lines(lines.variant, lines.done, lines.decays | {line.name: _coefficient(lines, line, past)}, line)
            terms = tuple(lines.freed(t) for t in lines.expand(line.expr))
        found = [c for t in terms for c in corrections(lines, t)]
        refuse_two_sides(lines, found)
        terms = tuple(x for t in terms for x in without_reads(lines, t))
    writes = [t for t in terms if t.state is None]
    for t in terms:
        if t.state is not None and t.state.name != line.name:
            message = f"'{t}' puts the state {t.state} into {line.name} as a whole; read it by @ with a vector"
            lines.refuse("matrix-read", message, term=t.state)
    decay, factor, proofs = _decay(lines, line, past)
    if found and any(len(g.dims) > 1 for g in decay):
        message = f"{line.name} is corrected under a decay for every element"
        lines.refuse("nonlinear-state", message, "a delta rule's decay is a product of one factor a dim", found[0].read)
    plain = _merged(lines.algebra, tuple(_write(lines, line, t) for t in writes)) if writes or not found else ()
    state = State(line.name, line.head, line.dims, decay, plain, causal=lines.variant.causal, init=line.init)
    return solve(lines, state, found), factor, proofs


def _reads_own(line: StateLine, t: Term) -> bool:
    return any(r.name == line.name for f in (*t.factors, *t.over) for r in E.reads(f, "readout"))


def _decay(lines: Lines, line: StateLine, past: list[Term]) -> tuple[tuple[Expr, ...], Flat, tuple[str, ...]]:
    """Reads the log-decays off the coefficient of the past: one per subset of the state's dims, each shown to be <= 0.

    Returns them, the coefficient itself, and a line for each that says why it is <= 0.
    """
    if not past:
        if lines.variant.causal:
            _forgets(lines, line)
        return (), ((), ()), ()
    up, down = _coefficient(lines, line, past)
    factors: dict[tuple[str, ...], Expr] = {}
    for dims in sorted({f.dims for f in up + down}, key=lambda d: (len(d), [line.dims.index(x) for x in d])):
        factors[dims] = product(tuple(f for f in up if f.dims == dims), tuple(f for f in down if f.dims == dims))
    if any(len(dims) > 1 for dims in factors):
        factors = {tuple(sorted(line.dims)): product_of_all(up, down)}
    logs = {dims: log_of(f, lines.facts) for dims, f in factors.items()}
    proofs = {dims: _proof(lines, log) for dims, log in logs.items()}
    wider = next((dims for dims in logs if dims), ())
    if () in logs and wider and not all(p.holds for p in proofs.values()):  # one factor may make up for the other
        logs[wider] = E.add(logs.pop(()), logs[wider])
        proofs = {dims: _proof(lines, log) for dims, log in logs.items()}
    for dims, proof in proofs.items():
        if not proof.holds:
            message = f"the state {line.name} may grow: the log of its decay '{factors[dims]}' is not provably <= 0; {proof.text}"
            lines.refuse("decay-grows", message, proof.advice, factors[dims])
    kept = {dims: log for dims, log in logs.items() if log != E.ZERO}
    decay = tuple(E.call("logdecay", log) for log in kept.values())
    return decay, (up, down), tuple(f"{line.name}: {proofs[dims].text}" for dims in kept)


def _proof(lines: Lines, log: Expr) -> Proof:
    return prove_nonpositive(log, lines.facts, {e: n for n, e in lines.variant.names})


def _forgets(lines: Lines, line: StateLine) -> NoReturn:
    help = f"write {line.name}[t-1] into its line, or causal: false; a reset is where(condition, 0, 1) * {line.name}[t-1]"
    lines.refuse("no-past", f"the state {line.name} forgets its past at every token", help)


def _coefficient(lines: Lines, line: StateLine, past: list[Term]) -> Flat:
    """Returns the coefficient of the past as factors over divisors, flattened."""
    flats = []
    for t in past:
        ups, downs = [flat(f) for f in t.factors], [flat(f) for f in t.over]
        flats.append(
            (
                [f for u, _ in ups for f in u] + [f for _, d in downs for f in d],
                [f for _, d in ups for f in d] + [f for u, _ in downs for f in u],
            )
        )
    if len(flats) == 1:
        return tuple(flats[0][0]), tuple(flats[0][1])
    common = [_shared([u for u, _ in flats]), _shared([d for _, d in flats])]
    rests = [(tuple(_without(u, common[0])), tuple(_without(d, common[1]))) for u, d in flats]
    parts = [product_of_all(u, d) for u, d in rests]
    spanned = tuple(sorted({d for p in parts for d in p.dims}))
    if all(p.dims != spanned for p in parts):  # a factor on each dim, added: a number for every element
        parts[0] = E.expand(parts[0], spanned)
    total = _summed(parts)
    known = lines.algebra.of(total)
    if not known:
        _forgets(lines, line)
    up, down = ((), ()) if known == UNIT else flat(total)
    return (*common[0], *up), (*common[1], *down)


def _summed(values: list[Expr]) -> Expr:
    """Adds values; a negated one is subtracted."""
    total = values[0]
    for v in values[1:]:
        total = E.sub(total, v.args[0]) if v.op == "neg" else E.add(total, v)
    return total


def _shared(lists: list[list[Expr]]) -> tuple[Expr, ...]:
    shared: list[Expr] = []
    for f in lists[0]:
        if f not in shared and all(f in other for other in lists[1:]):
            shared.append(f)
    return tuple(shared)


def _without(items: Iterable[Expr], gone: tuple[Expr, ...]) -> list[Expr]:
    rest = list(items)
    for g in gone:
        rest.remove(g)
    return rest


def _write(lines: Lines, line: StateLine, t: Term) -> Write:
    """Splits a term into a row on the state's first dim and a column on its second; scalars go to the column."""
    if len(line.dims) < 2:
        value = product(t.factors, t.over)
        if value.dims != line.dims:
            lines.refuse("term-dims", f"the term '{t}' has dims {set(value.dims) or '{}'}, the state {line.name} has {line.dims}", term=t)
        return Write(value, ONE)
    first, second = line.dims
    dense = [f for f in (*t.factors, *t.over) if len(f.dims) > 1]
    (rows, rows_over), (cols, cols_over) = t.on(first), t.on(second)
    if dense or not (rows or rows_over) or not (cols or cols_over):
        what = f"'{dense[0]}' is not an outer product" if dense else f"it lacks the dim {second if rows or rows_over else first}"
        lines.refuse(
            "not-an-outer", f"'{t}' is written to {line.name}, but {what}", f"write outer(a, b) with a on {first} and b on {second}", t
        )
    s, row = split_scalar(product(rows, rows_over))
    r, col = split_scalar(product(cols, cols_over))
    free = product(tuple(f for f in t.factors if not f.dims), tuple(f for f in t.over if not f.dims))
    scalar = E.mul(free, s, r)
    if scalar.head == "HV" and row.head == "HV" and col.head != "HV":
        return Write(E.mul(scalar, row), col)
    return Write(row, E.mul(scalar, col))


def _merged(algebra: Algebra, writes: tuple[Write, ...]) -> tuple[Write, ...]:
    """Adds the columns of writes with the same row, then the rows of writes with the same column."""
    if any(not w.col.dims for w in writes):  # vector and scalar states: every column is ONE, so the rows add up
        return (Write(_summed([w.row for w in writes]), ONE),)
    by_row: dict[Polynomial, Write] = {}
    for w in writes:
        key = algebra.of(w.row)
        by_row[key] = Write(by_row[key].row, _summed([by_row[key].col, w.col])) if key in by_row else w
    by_col: dict[Polynomial, Write] = {}
    for w in by_row.values():
        key = algebra.of(w.col)
        by_col[key] = Write(_summed([by_col[key].row, w.row]), by_col[key].col) if key in by_col else w
    return tuple(by_col.values())


def _joined(states: tuple[State, ...]) -> tuple[State, ...]:
    """Lets a matrix state write the number times a vector that a vector state writes: what comes back to the two is then one sum."""
    algebra = Algebra(states)
    products = {algebra.of(w.row): w.row for s in states if len(s.dims) == 1 and not s.peak for w in s.writes}

    def join(w: Write) -> Write:
        number, col = split_scalar(w.col)
        row = products.get(algebra.of(E.mul(number, w.row))) if number != ONE else None
        return w if row is None else Write(row, col)

    return tuple(s if s.solves or len(s.dims) != 2 else replace(s, writes=tuple(map(join, s.writes))) for s in states)


# ---- outputs --------------------------------------------------------------------------------------------------------------------


def _output(lines: Lines, line: OutputLine) -> Expr:
    if len(line.expr.dims) > 1:
        lines.refuse("matrix-output", f"output {line.name} has both dims of a matrix; an output is a vector or a number", term=line.expr)
    return lines.value(line.expr)
