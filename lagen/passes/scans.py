"""Plans scans: variants whose states have no matmul form, for their decay has a number for every element, or they are vectors.

A scan holds every state of its pass, takes a block of tokens at a time, and has one dim on the grid, the *tile*; the other dim of a
matrix state, its *rows*, is gone through a few rows at a time. The forward keeps each state as every block begins; the backward's
scan runs from the last block to the first, makes the states inside a block again from there, and holds the reverse states beside them.

 1. The tile is the dim that the outputs keep: what they contract over is whole in a program.
 2. What stands on the rows is computed while they are gone through, what sums over them afterwards: nothing on the rows may take such
    a sum. A readout that reverse states take is therefore kept by the forward.
 3. A result on the tile is stored where it is computed, the gradient of a param after the last block. Of a sum over the tile each
    program stores its share, and a finish kernel does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lagen.ir import expr as E
from lagen.ir.chunk import Carry, Term
from lagen.ir.expr import LEAVES, Expr, addends, walk
from lagen.ir.plan import Buffer, Hold, Kernel, Plan, Store
from lagen.ir.recurrence import Adjoint, Recurrence, State
from lagen.passes.chunk import sides
from lagen.passes.logs import compared
from lagen.passes.operands import ROWS, SIZED, choose_prepared, choose_saved, map_adjoint, serving, token_kernels


@dataclass(frozen=True)
class Axes:
    """The dims of a variant's scans: ``tile`` on the grid, ``rows`` gone through ("" where all states are vectors)."""

    tile: str
    rows: str


def scan_axes(recurrence: Recurrence, adjoint: Adjoint) -> Axes | None:
    """This function returns the dims of a variant's scans; None where it takes sweeps.

    Raises NotImplementedError for a dense decay beside what a scan does not hold.
    """
    states = recurrence.states
    widest = max(states, key=lambda s: (s.dense, len(s.dims)))
    other = next((s for s in states if not s.causal or s.solves or not set(s.dims) <= set(widest.dims)), None)
    other = other or next((s for s in states if len(s.dims) == 2 and not s.dense), None)
    values = [*(x for s in adjoint.states for x in s.operands), *(e for _, e in adjoint.gradients)]
    summed = any(E.reads(v, "suffix", "lead") for v in values)
    if widest.dense and (other or summed):
        beside = other.name if other else "another one"
        raise NotImplementedError(f"no Triton form for the dense decay of {widest.name} beside {beside}")
    if other or summed or not widest.dims:
        return None
    kept = [n.dims[0] for _, e in recurrence.outputs for n in E.reads(e, "readout") if n.name == widest.name and n.dims]
    tile = (kept or widest.dims)[0]
    return Axes(tile, next((d for d in widest.dims if d != tile), ""))


def plan_scans(
    recurrence: Recurrence,
    adjoint: Adjoint,
    axes: Axes,
    head: str,
    prepared: dict[Expr, Buffer],
    outputs: dict[str, Buffer],
    step: tuple[Kernel, ...],
    taken: set[str],
) -> Plan | None:
    """This function plans the scans of a variant whose operands are ``prepared``; None where sweeps may carry what scans do not.

    Raises NotImplementedError where a dense decay leaves no other way. ``taken`` are names that no buffer may have.
    """
    adjoint = map_adjoint(adjoint, compared)
    saved = choose_saved(recurrence, adjoint, head, lambda n: bool(n.attr("dim")))
    adjoint = map_adjoint(adjoint, lambda e: E.substitute(e, {n: b.leaf for n, b in saved.items()}))
    taken = taken | {b.name for b in saved.values()}
    scan = _Scan("backward", {s.name: s for s in recurrence.states + adjoint.states}, axes, head)
    apart = [n for s in adjoint.states for x in s.operands for n in walk(x) if not scan.computes(n) and not E.reads(n, "readout")]
    sums = choose_prepared(apart, (), "w", taken, head)
    adjoint = map_adjoint(adjoint, lambda e: E.substitute(e, {n: b.leaf for n, b in sums.items()}))
    kept = {b.name: b for b in saved.values() if b.name not in outputs}
    gradients = [
        (Buffer(f"d{t.name}", head, t.dims, t.token, "own"), e)
        for t, (_, e) in zip(recurrence.inputs + recurrence.params, adjoint.gradients, strict=True)
    ]
    states = {s.name: s for s in recurrence.states + adjoint.states}
    again = _needed([*(e for _, e in gradients), *(x for s in adjoint.states for x in s.operands)], states)
    marks = {s.name: f"mark_{s.name}" for s in recurrence.states if s.name in again}
    ahead = _Scan("forward", states, axes, head)
    for s in states.values():
        for x in s.operands:
            if not ahead.whole(x) and axes.rows:
                raise NotImplementedError(f"no Triton form in a scan for what {s.name} takes: {x}")
            if not ahead.whole(x):
                return None
    ahead.settle([(outputs[name], e) for name, e in recurrence.outputs] + [(b, n) for n, b in saved.items() if b.name in kept])
    behind = _Scan("backward", states, axes, head)
    behind.settle(gradients)
    holds = tuple(Hold(_carry(s, axes), f"initial_{s.name}", f"final_{s.name}", marks.get(s.name, "")) for s in recurrence.states)
    back = tuple(Hold(_carry(s, axes), marks[s.name], "") for s in recurrence.states if s.name in again)
    back += tuple(Hold(_carry(s, axes), f"dfinal_{s.of}", f"dinitial_{s.of}") for s in adjoint.states)
    prepare = tuple(
        k
        for h in dict.fromkeys(b.head for b in prepared.values())
        for k in _tokens(f"prepare_{h}".lower().rstrip("_"), [Store(b, n) for n, b in prepared.items() if b.head == h], axes)
    )
    made = Plan(
        recurrence.name,
        (*prepare, *ahead.kernels("states in registers, a block of tokens at a time", False, holds)),
        (
            *_tokens("backward_prepare", [Store(b, n) for n, b in sums.items()], axes),
            *behind.kernels("the states of each block again, reverse states beside them", True, back),
        ),
        (*serving(prepare, step), *step),
        (*prepared.values(), *kept.values(), *(_mark(states[name], head) for name in marks)),
        recurrence.states + adjoint.states,
    )
    made.verify()
    return made


def _tokens(name: str, stores: list[Store], axes: Axes) -> tuple[Kernel, ...]:
    """Makes the launches before scans; what is on the tile, which may be long, and sums over it, runs as torch operations."""
    long = [s for s in stores if any(axes.tile in n.dims for n in walk(s.value))]
    why = "row functions and size changes of the scans' operands"
    rest = token_kernels(name, [s for s in stores if s not in long], why)
    return (*rest, *((Kernel(f"{name}_{axes.tile}".lower(), "torch", tuple(long), f"{why}, as torch operations"),) if long else ()))


def _mark(s: State, head: str) -> Buffer:
    """Makes the buffer that keeps a state as each block begins; a vector may be what an exponent is made of."""
    return Buffer(f"mark_{s.name}", head, s.dims, True, "input" if len(s.dims) == 2 else "float32", per="chunk")


def _needed(roots: list[Expr], states: dict[str, State]) -> set[str]:
    """Lists the forward states that ``roots`` read, if only by way of others."""
    found: set[str] = set()
    queue = [n.name for r in roots for n in E.reads(r, "readout")]
    while queue:
        name = queue.pop()
        if name not in found and not states[name].reverse:
            found.add(name)
            queue += [n.name for x in states[name].operands for n in E.reads(x, "readout")]
    return found


def _carry(s: State, axes: Axes) -> Carry:
    """Makes the carry of a state; its factors and terms are those of one token."""
    x, y = (d if d in s.dims else "" for d in (axes.rows, axes.tile))
    terms = tuple(Term(*sides(s, x, w.row, w.col)) for w in s.writes)
    carry = Carry(s.name, x, y, s.reverse, tuple(E.call("exp", g) for g in s.decay), terms)
    if not s.peak:
        return carry
    peak = Expr("peak", (E.add(*s.decay), s.writes[0].row, carry.value), dims=s.dims, token=True, attrs=(("at", "now"),))
    return Carry(s.name, x, y, False, s.decay, (Term(s.writes[0].row, E.ONE),), peak=peak)


def row_sums(e: Expr, rows: str, states: dict[str, State], known: dict[Expr, int]) -> int:
    """This function returns how many sums over the rows stand one above the other in a value; ``known`` keeps what was found."""
    if e not in known:
        below = e.args if e.op != "readout" else (*e.args, *states[e.name].operands)
        inside = max((row_sums(a, rows, states, known) for a in below), default=0)
        known[e] = inside + (e.op in (*ROWS, "readout") and e.attr("dim") == rows != "")
    return known[e]


@dataclass
class _Scan:
    """The scan of one pass and what is finished after it, filled by ``settle``."""

    name: str
    states: dict[str, State]
    axes: Axes
    head: str
    stores: list[Store] = field(default_factory=list)
    finish: list[Store] = field(default_factory=list)
    temps: dict[Expr, Expr] = field(default_factory=dict)
    known: dict[Expr, int] = field(default_factory=dict)

    def settle(self, targets: list[tuple[Buffer, Expr]]) -> None:
        """Gives every target its kernel."""
        for buffer, e in targets:
            if self.axes.tile in buffer.dims and self.whole(e):
                self.stores.append(Store(buffer, e, summed=not buffer.token))
            else:
                self.finish.append(Store(buffer, self.frontier(e), summed=not buffer.token))

    def sums(self, e: Expr) -> int:
        """Returns how many sums over the rows stand one above the other in a value."""
        return row_sums(e, self.axes.rows, self.states, self.known)

    def whole(self, e: Expr) -> bool:
        """Tells whether the scan can compute a value."""
        return all(map(self.computes, walk(e)))

    def computes(self, n: Expr) -> bool:
        """Tells whether the scan computes a value whose operands it has."""
        if not set(n.dims) <= {self.axes.tile, self.axes.rows}:
            return False
        if n.op in SIZED and n.op != "outer":
            return False
        if n.op in (*ROWS, "readout") and n.attr("dim"):
            return n.op in ("contract", "sum", "readout") and n.attr("dim") == self.axes.rows
        return self.axes.rows not in n.dims or self.sums(n) == 0

    def share(self, e: Expr) -> bool:
        """Tells whether a value is linear in sums over the tile, so that each program may store its share."""
        if self.axes.tile in e.dims:  # a program has no share of the others' elements
            return False
        if e.op in ("contract", "sum", "readout") and e.attr("dim") == self.axes.tile:
            return all(map(self.whole, e.args)) and (self.axes.rows not in e.dims or self.sums(e) == 0)
        if e.op in ("add", "sub", "neg"):
            return all(map(self.share, e.args))
        if e.op == "mul":
            a, b = e.args
            fits = self.axes.rows not in e.dims or self.sums(e) == 0
            return fits and ((self.whole(a) and self.share(b)) or (self.whole(b) and self.share(a)))
        return False

    def store(self, e: Expr) -> Expr:
        """Lets the scan store ``e`` for the finish and returns the leaf that loads it."""
        if e not in self.temps:
            share = not self.whole(e)
            dtype = "float32" if share or not e.dims else "input"
            buffer = Buffer(f"t{len(self.temps)}", self.head, e.dims, True, dtype, self.axes.tile if share else "")
            self.stores.append(Store(buffer, e))
            self.temps[e] = buffer.leaf
        return self.temps[e]

    def frontier(self, e: Expr) -> Expr:
        """Rewrites ``e`` over what the scan stores, as much of it as it can compute; what has no part in it is left to the finish."""
        if not any(n.op == "readout" or self.axes.tile in n.dims for n in walk(e)):
            return e
        if e.op in LEAVES:
            return e
        if self.whole(e) or self.share(e):
            return self.store(e)
        terms = addends(e)
        if len(terms) > 1:
            groups: dict[object, list[Expr]] = {}
            for t in terms:
                groups.setdefault("whole" if self.whole(t) else "share" if self.share(t) else t, []).append(t)
            if len(groups) > 1:
                return E.add(*(self.frontier(E.add(*g)) for g in groups.values()))
        return E.rebuild(e, tuple(self.frontier(a) for a in e.args))

    def kernels(self, why: str, reverse: bool, holds: tuple[Hold, ...]) -> tuple[Kernel, ...]:
        """Makes the launches: the scan, then the finish."""
        scan = Kernel(f"{self.name}_scan", "scan", tuple(self.stores), why, self.axes.tile, reverse, holds)
        return (scan, *token_kernels(f"{self.name}_finish", self.finish, "what sums over the scan's tiles", (self.axes.tile,)))
