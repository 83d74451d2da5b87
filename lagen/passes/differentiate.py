"""Differentiates a Recurrence: reverse mode on its expressions, and on its states by transposition.

A linear recurrence is closed under transposition: the adjoint of a readout by r is the same state read by the cotangent on the other
side; the adjoint of what was written is a reverse state, written by (r, cotangent) and read by the write's other side. So this
pass runs before chunking (DESIGN.md has it after): one lowering then serves forward and backward, the coordinate gradients hold
strict pairs by construction (MATH.md section 5), and a backend that runs token by token needs no chunks.

Element-wise adjoints come from ir/scalar.py; those of the vector ops stand in the table RULES below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Adjoint, Recurrence, Solve, State, Write, readout, solved
from lagen.ir.scalar import FUNCTIONS
from lagen.ir.variant import Tensor
from lagen.passes.peaks import shares

_CONSTANT = ("const", "size", "scale")


def differentiate(recurrence: Recurrence) -> Adjoint:
    """Derives the backward of ``recurrence``: reverse states and a gradient for every input and param."""
    cotangents = tuple(
        Tensor(f"d{name}", e.head, dims, True) for (name, e), dims in zip(recurrence.outputs, recurrence.output_dims, strict=True)
    )
    tape = _Tape(recurrence)
    for (_, e), d in zip(recurrence.outputs, cotangents, strict=True):
        tape.add(e, E.leaf("input", d.name, d.dims, d.head, token=True))
    solves = [u for s in recurrence.states for u in s.solves]
    for u in solves:  # as if it were an output: its cotangent is solved by the reverse state
        tape.add(u.value, _transposed(u))
    for node in reversed(tape.order([e for _, e in recurrence.outputs] + [u.value for u in solves])):
        tape.visit(node)
    tape.close()
    gradients = []
    for t in recurrence.inputs + recurrence.params:
        leaf = E.leaf("input" if t.token else "param", t.name, t.dims, t.head, t.token)
        gradients.append((t.name, E.expand(tape.cotangent.get(leaf, E.ZERO), leaf.dims)))
    return Adjoint(recurrence, cotangents, tuple(tape.reverse), tuple(gradients))


def pair(a: Expr, b: Expr) -> Expr:
    """Multiplies and sums over the dims that both have: the inner product of two vectors, or the product of two numbers."""
    return E.contract(a, b) if a.dims and a.dims == b.dims else E.mul(a, b)


def _total(d: Expr, x: Expr) -> Expr:
    """Sums a cotangent over the dims that its operand ``x`` lacks (the adjoint of broadcasting)."""
    missing = [dim for dim in d.dims if dim not in x.dims]
    if not missing:
        return d
    if len(d.dims) == 2:
        return _total(_without(d, missing[0]), x)
    assert len(missing) == 1 and len(d.dims) == 1, f"broadcast of {x.dims} to {d.dims}"
    if d.op == "mul" and all(a.dims == d.dims for a in d.args):
        return E.contract(*d.args)
    if d.op == "mul":  # a number times a vector: sum the vector
        number, vector = sorted(d.args, key=lambda a: len(a.dims))
        return E.mul(number, _total(vector, x))
    if d.op == "neg":
        return E.neg(_total(d.args[0], x))
    if d.op == "div" and not d.args[1].dims:
        return E.div(_total(d.args[0], x), d.args[1])
    return E.reduce("sum", d)


def _without(d: Expr, dim: str) -> Expr:
    """Sums a matrix over one of its dims: factors without the dim come out, a vector on it is contracted."""
    if d.op == "neg":
        return E.neg(_without(d.args[0], dim))
    if d.op in ("add", "sub") and all(a.dims == d.dims for a in d.args):
        return (E.add if d.op == "add" else E.sub)(*(_without(a, dim) for a in d.args))
    if d.op == "mul":
        narrow, wide = sorted(d.args, key=lambda a: len(a.dims))
        if dim not in narrow.dims:
            return E.mul(narrow, _without(wide, dim))
        if narrow.dims == (dim,):
            return E.contract(wide, narrow)
    if d.op == "outer":
        kept, gone = sorted(d.args, key=lambda a: dim in a.dims)
        return E.mul(E.reduce("sum", gone), kept)
    return E.sum_over(d, dim)


Rule = Callable[[Expr, Expr], tuple[Expr | None, ...]]


def _norm(mean: bool) -> Rule:
    """Makes the adjoint of x * rsqrt(sum or mean of x**2 + eps): s * (d - y * (y @ d)), or with the mean of y * d."""

    def rule(d: Expr, y: Expr) -> tuple[Expr | None, ...]:
        x, n = y.args[0], E.size(y.dims[0]) if mean else E.ONE
        s = E.call("rsqrt", E.add(E.div(E.contract(x, x), n), E.const(y.value)))
        return (E.mul(s, E.sub(d, E.mul(E.div(E.contract(y, d), n), y))),)

    return rule


def _rowmax(d: Expr, y: Expr) -> tuple[Expr | None, ...]:
    hit = E.call("where", E.call("eq", y.args[0], y), E.ONE, E.ZERO)
    return (E.mul(E.div(d, E.reduce("sum", hit)), hit),)


def _contraction(d: Expr, y: Expr) -> tuple[Expr | None, ...]:
    a, b = y.args
    return tuple(E.outer(d, w) if len(x.dims) == 2 else E.contract(d, w) if len(w.dims) == 2 else pair(d, w) for x, w in ((a, b), (b, a)))


RULES: dict[str, Rule] = {
    "pow": lambda d, y: (E.mul(d, E.const(y.value), E.power(y.args[0], y.value - 1)),),
    "contract": _contraction,
    "outer": lambda d, y: (E.contract(d, y.args[1]), E.contract(d, y.args[0])),
    "sum": lambda d, y: (E.expand(d, y.args[0].dims),),
    "mean": lambda d, y: (E.expand(E.div(d, E.size(y.attr("dim"))), y.args[0].dims),),
    "rowmax": _rowmax,
    "softmax": lambda d, y: (E.mul(y, E.sub(d, E.contract(d, y))),),
    "l2norm": _norm(mean=False),
    "rmsnorm": _norm(mean=True),
    "concat": lambda d, y: tuple(E.part(d, i, a.dims, (y.args[0], y.args[1])) for i, a in enumerate(y.args)),
    "taylor2": lambda d, y: (E.unsize("taylor2", d, y.args[0]),),
    "quad": lambda d, y: (E.unsize("quad", d, y.args[0]),),
    "rename": lambda d, y: (E.resize("rename", d, y.args[0].dims[0]),),
    "expand": lambda d, y: (d,),
}
"""The adjoint of each vector op, given the cotangent ``d`` of its result ``y``: one cotangent per operand."""


@dataclass
class _Gate:
    """What a log-decay's gradient is made of so far: strict terms of reads and writes, and the states it decays.

    States of different stages are swept apart, and have a gate each.
    """

    reads: Expr = E.ZERO
    writes: Expr = E.ZERO
    states: list[str] = field(default_factory=list)
    backs: list[str] = field(default_factory=list)


class _Tape:
    """The cotangents gathered while the graph is visited from outputs to leaves."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.states = {s.name: s for s in recurrence.states}
        self.bodies = {
            s.name: Expr("state", tuple(dict.fromkeys([*(x for w in s.writes for x in (w.row, w.col)), *s.decay])), name=s.name)
            for s in recurrence.states
        }
        self.cotangent: dict[Expr, Expr] = {}
        self.readouts: dict[str, list[tuple[Expr, Expr]]] = {s: [] for s in self.states}
        self.gates: dict[Expr, dict[tuple[int, int], _Gate]] = {}
        self.stage = recurrence.stage_of
        self.reverse: list[State] = []

    def order(self, roots: list[Expr]) -> list[Expr]:
        """Lists all nodes, operands (and the bodies of states that are read) before users."""
        seen: set[Expr] = set()
        stack = [(r, False) for r in roots] + [(b, False) for b in self.bodies.values()]
        out = []
        while stack:
            node, done = stack.pop()
            if done:
                out.append(node)
            elif node not in seen:
                seen.add(node)
                below = node.args + ((self.bodies[node.name],) if node.op == "readout" else ())
                stack.append((node, True))
                stack.extend((a, False) for a in below)
        return out

    def add(self, node: Expr, d: Expr | None) -> None:
        """Adds ``d`` to the cotangent of ``node``; constants take none."""
        if d is None or d == E.ZERO or node.op in _CONSTANT:
            return
        d = _total(d, node)
        self.cotangent[node] = E.add(self.cotangent[node], d) if node in self.cotangent else d

    def visit(self, node: Expr) -> None:
        """Hands the cotangent of ``node`` to its operands."""
        if node.op == "state":
            self.transpose(self.states[node.name])
            return
        for gate in self.gates.pop(node, {}).values():
            self.add(node, self.suffix(node, gate))
        d = self.cotangent.get(node)
        if d is None or not node.args:
            return
        d = E.expand(d, node.dims)
        if node.op == "readout":
            self.readouts[node.name].append((node, d))
            self.read(node, d)
            return
        given = FUNCTIONS[node.op].adjoint(E, d, node, *node.args) if node.op in FUNCTIONS else RULES[node.op](d, node)
        for a, da in zip(node.args, given, strict=True):
            self.add(a, da)

    def close(self) -> None:
        """Gives the reverse states what they solve: the cotangents of solved values, last correction first."""
        for i, back in enumerate(self.reverse):
            if back.name == f"d{back.of}":
                solves = tuple(
                    _solve(back, _transposed(u), self.cotangent.get(u.leaf, E.ZERO)) for u in reversed(self.states[back.of].solves)
                )
                self.reverse[i] = replace(back, solves=solves)

    def suffix(self, g: Expr, gate: _Gate) -> Expr:
        """Makes the gradient of a log-decay from its reads and writes."""
        head = "HV" if any(self.states[s].head == "HV" for s in gate.states) else self.states[gate.states[0]].head
        attrs: tuple[tuple[str, str], ...] = (("states", " ".join(gate.states)),)
        if gate.backs != [f"d{s}" for s in gate.states]:
            attrs = (("backs", " ".join(gate.backs)), *attrs)
        return Expr("suffix", (gate.reads, gate.writes), dims=g.dims, head=head, token=True, attrs=attrs)

    def read(self, node: Expr, d: Expr) -> None:
        """Gives a readout's vector its cotangent; with a decay, the token's own term stands apart."""
        state, vector = self.states[node.name], node.args[0]
        at = "decayed" if node.attr("at") == "now" and state.decay else node.attr("at")
        self.add(vector, readout(state, d, _other(state, node), at))
        if at != node.attr("at"):
            for w in state.writes:
                near, far = (w.row, w.col) if _on_row(state, node) else (w.col, w.row)
                self.add(vector, E.mul(pair(d, far), near))

    def transpose(self, state: State) -> None:
        """Makes the reverse state and gives writes and decays their cotangents."""
        reads = self.readouts[state.name]
        share, decay = shares(state) if state.peak else (E.ONE, E.ZERO)
        writes = tuple(
            Write(*((n.args[0], d) if _on_row(state, n) else (d, n.args[0])), decayed=n.attr("at") != "previous") for n, d in reads
        )
        back = State(
            f"d{state.name}",
            state.head,
            state.dims,
            (decay,) if state.peak else state.decay,
            writes,
            reverse=state.causal,
            causal=state.causal,
            of=state.name,
        )
        self.reverse.append(back)
        if state.peak:
            total = self.returning(back)
            for g in state.decay:
                self.add(g, E.mul(total, share))
            self.add(state.writes[0].row, E.mul(total, E.sub(E.ONE, share)))
            return
        inclusive = all(n.attr("at") == "now" for n, _ in reads) and not state.decay
        at = "all" if not state.causal else "since" if inclusive else "later"
        a, b = (*state.dims, "", "")[:2]
        learnt = [g for g in state.decay if any(n.op in ("input", "param", "readout") for n in E.walk(g))]  # of constants none is
        fading = [g for g in learnt if set(g.dims) != set(state.dims) or self.wider(g, state)]
        led = self.lead(state, back) if fading else back
        # a side that the decay's gradient is taken on shares its readout, where another one still reads the reverse state itself
        shared = [_faded(g, w)[0] for g in fading for w in state.writes]
        shared = shared if any(x not in shared and x.op not in _CONSTANT for w in state.writes for x in (w.row, w.col)) else []
        for w in state.writes:
            for side, other, dim in ((w.row, w.col, b), (w.col, w.row, a)):
                mine = led if side in shared else back
                self.add(side, readout(mine, other, dim, at))
                for (n, _), back_write in zip(reads, mine.writes, strict=True):
                    if not inclusive and (mine is not back or n.attr("at") == "now"):
                        near, far = (back_write.row, back_write.col) if side is w.row else (back_write.col, back_write.row)
                        self.add(side, E.mul(pair(far, other), near))
        for g in learnt:
            if g in fading:
                self.fade(state, led, g)
            else:
                self.add(g, E.mul(readout(state, E.ONE, "", "decayed"), self.returning(back)))

    def wider(self, g: Expr, state: State) -> bool:
        """Tells whether a log-decay also decays a state that has more dims: then one sum serves them all."""
        return any(g in s.decay and len(s.dims) > len(state.dims) for s in self.states.values())

    def returning(self, back: State) -> Expr:
        """Makes all that comes back to a token's state, number by number: from the tokens after, and from its own reads."""
        own = [E.mul(E.outer(w.row, w.col) if w.row.dims and w.col.dims else E.mul(w.row, w.col)) for w in back.writes if w.decayed]
        return E.add(readout(back, E.ONE, "", "later"), *own)

    def strict(self, state: State) -> list[tuple[Expr, Expr, Expr]]:
        """Lists a state's readouts, each with the vector and cotangent under which no pair is without decays between.

        An exclusive read of the token after is an inclusive one of this token.
        """
        return [
            (n, E.lead(n.args[0]), E.mul(E.FOLLOWS, E.lead(d))) if n.attr("at") == "previous" else (n, n.args[0], d)
            for n, d in self.readouts[state.name]
        ]

    def lead(self, state: State, back: State) -> State:
        """Returns the reverse state that a fading decay's gradient meets: that of the strict reads, where some are exclusive."""
        if all(n.attr("at") != "previous" for n, _ in self.readouts[state.name]):
            return back
        writes = tuple(Write(*((vector, d) if _on_row(state, n) else (d, vector))) for n, vector, d in self.strict(state))
        self.reverse.append(replace(back, name=f"{back.name}_lead", writes=writes))
        return self.reverse[-1]

    def fade(self, state: State, back: State, g: Expr) -> None:
        """Gives a log-decay its strict terms: of reads from the state, of writes from the reverse state of the same pairs."""
        gate = self.gates.setdefault(g, {}).setdefault(self.stage[state.name], _Gate())
        gate.states.append(state.name)
        gate.backs.append(back.name)
        for n, vector, d in self.strict(state):
            if set(g.dims) <= set(vector.dims):
                term = _on(vector, readout(state, d, _other(state, n), "decayed"), g.dims)
            else:
                term = _on(d, readout(state, vector, n.attr("dim"), "decayed"), g.dims)
            gate.reads = E.add(gate.reads, term)
        a, b = (*state.dims, "", "")[:2]
        for w in state.writes:
            mine, other = _faded(g, w)
            gate.writes = E.add(gate.writes, _on(mine, readout(back, other, b if mine is w.row else a, "later"), g.dims))


def _faded(g: Expr, w: Write) -> tuple[Expr, Expr]:
    """Returns the side of a write that a log-decay's gradient is taken on, and the other one."""
    return (w.row, w.col) if set(g.dims) <= set(w.row.dims) else (w.col, w.row)


def _transposed(u: Solve) -> Expr:
    """Makes the leaf that stands for the cotangent of a solved value."""
    return solved(f"d{u.leaf.name}", u.leaf.dims[0], u.leaf.head)


def _solve(back: State, leaf: Expr, d: Expr) -> Solve:
    """Splits a solved value's cotangent into what reads the reverse state and the rest."""
    terms = E.addends(d)
    reads = tuple(t for t in terms if t.op == "readout" and t.name == back.name)
    base = E.add(*(t for t in terms if t not in reads))
    assert reads and not any(n == leaf or (n.op == "readout" and n.name == back.name) for n in E.walk(base)), f"d{leaf} is not solved: {d}"
    return Solve(leaf, base, reads)


def _other(state: State, node: Expr) -> str:
    """Returns the dim of ``state`` that a readout leaves ("" where it leaves none)."""
    rest = [d for d in state.dims if d != node.attr("dim")]
    assert len(rest) <= 1, f"{node} leaves {rest}"
    return rest[0] if rest else ""


def _on_row(state: State, node: Expr) -> bool:
    """Tells whether a readout's vector stands on the state's first side (a number does only where the state has no dims)."""
    return node.args[0].dims == state.dims[:1]


def _on(x: Expr, dx: Expr, dims: tuple[str, ...]) -> Expr:
    """Multiplies a vector with its gradient and keeps ``dims``."""
    return E.mul(x, dx) if x.dims == dims else pair(x, dx)
