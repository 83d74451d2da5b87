"""Recurrence: the canonical step form. Linear states with decays and writes, joined by token-wise expressions that read them.

    forward state    S_t = exp(g_t) * S_{t-1} + sum_m row_m,t (x) col_m,t                 t = 1 .. T, S_0 given or zero
    reverse state    R_t = exp(g_{t+1}) * R_{t+1} + sum_m e_m * row_m,t+1 (x) col_m,t+1    t = T-1 .. 0, R_T given or zero
                     e_m = exp(g_{t+1}) for a write that is ``decayed``, 1 for one that is not

    readout(r; S, a, at)   contracts the dim ``a`` of a state with the token's vector r:
        at = now       r_t @ S_t                       (inclusive; forward states only)
        at = decayed   r_t @ (exp(g_t) * S_{t-1})       (everything but the token's own write)
        at = previous  r_t @ S_{t-1}                    (exclusive read: the undecayed past)
        at = later     r_t @ R_t                        (reverse states: what tokens after t wrote)
        at = since     r_t @ (R_t + sum_m row_m,t (x) col_m,t)   (reverse, inclusive; undecayed states only)
        at = all       r_t @ S_T                        (not causal: the sum over all tokens)
    A vector state contracts its one dim and leaves a number; with dim "" nothing is contracted and r (a number) multiplies the state.
        A matrix state is read so only where its decay is dense: the gradient of such a decay is what decayed into the token times
        what comes back to it, number by number.
    R_{t} for at = later is what tokens s > t wrote, in the coordinates of the end of token t.
    peak state       m_t = max(m_{t-1} + a_t, b_t): linear in the max-plus sense, ``decay`` holds a and the one write b. Its reverse
        state is linear as any other: what comes back goes to the past or to the write, whichever was the larger (passes/peaks).

    solve(u; base, reads)_t = base_t + sum of the reads, which are readouts of the state that writes u: a low-rank correction such as
        u_t = beta_t v_t - (beta_t k_t) @ (exp(g_t) * S_{t-1}), S_t = exp(g_t) * S_{t-1} + k_t (x) u_t (the delta rule). Reads are at
        decayed, previous or (reverse) later: no token reads its own u, so that over the tokens of a chunk u solves a unit triangular
        system (passes/chunk). The transpose of such a state is one again: the cotangent of u is solved by the reverse state.

    suffix(x, y; states)_t = sum_{s >= t} x_s - sum_{t <= s < T} y_s + closing: the gradient of a log-decay. The closing is the
        gradient of the final states times what decayed into them, <dS_T, exp(g_T) * S_{T-1}>, summed to the dims of x.
        A pair of reader and writer counts in x and in y and cancels where the decay is not between them. A pair without any decay
        between must be in neither: it is large where the rest is small, and sums of float32 cancel only to their rounding. An
        exclusive read pairs each token with the one before it so. It is r_{t+1} @ S_t as well: x and y take it as what token t reads,
        the token's own write left out, by lead(r)_t = r_{t+1}; its reverse state for y, dS_lead, is written by the leads.

The set is closed under differentiation: the adjoint of a readout reads the same state by another side, or a reverse state whose
writes are (r, cotangent). So one lowering (passes/chunk) and one loop (the C++ backend) serve forward and backward alike, and the
token's own term never enters a decay's gradient (MATH.md section 5).

What it is not: no chunks, no tiles. Who makes it: passes/canonicalise (Recurrence), passes/differentiate (Adjoint).
Who reads it: passes/chunk and the backends that run token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lagen.ir.expr import ZERO, Expr, add, reads, rebuild, show, walk
from lagen.ir.variant import Tensor

READS = ("now", "decayed", "previous", "later", "since", "all")


@dataclass(frozen=True)
class Write:
    """One rank-one write: ``row`` on the state's first dim, ``col`` on its second; ONE where the state lacks that dim."""

    row: Expr
    col: Expr
    decayed: bool = True  # of a reverse state: whether the write meets its own token's decay on the way back


@dataclass(frozen=True)
class Solve:
    """A value that a state writes and that depends on the state's own past; ``leaf`` (op solved) stands for it wherever it is used."""

    leaf: Expr
    base: Expr  # what does not depend on the past
    reads: tuple[Expr, ...]  # readouts of the state, one for each ``at``

    @property
    def value(self) -> Expr:
        """Returns the value as an expression over readouts of its own state."""
        return add(*((self.base,) if self.base != ZERO else ()), *self.reads)

    def map(self, f: Callable[[Expr], Expr]) -> Solve:
        """Returns it with ``f`` applied to what it takes."""
        return Solve(self.leaf, f(self.base), tuple(rebuild(r, tuple(map(f, r.args))) for r in self.reads))

    def __str__(self) -> str:
        return f"{self.leaf} = {self.value}"


@dataclass(frozen=True)
class State:
    """A linear state [B, head, *dims] in float32. ``decay`` holds log-decays <= 0, at most one per subset of the dims.

    A decay on both dims of a matrix state is *dense*; no other stands beside it. Of a peak the decay may have any sign.
    """

    name: str
    head: str
    dims: tuple[str, ...]
    decay: tuple[Expr, ...]
    writes: tuple[Write, ...]
    reverse: bool = False
    causal: bool = True
    init: float = 0.0
    of: str = ""  # of a reverse state: the forward state that it is the gradient of
    solves: tuple[Solve, ...] = ()  # all over one dim; what stands in writes as a solved leaf
    peak: bool = False  # a running maximum: max(S[t-1] + decay, write)

    @property
    def dense(self) -> bool:
        """Tells whether the decay has a number for every element of a matrix state."""
        return any(len(g.dims) > 1 for g in self.decay)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Lists what a token brings: both sides of writes but what is solved, what the solved values take, decays."""
        sides = (x for w in self.writes for x in (w.row, w.col) if x.op != "solved")
        return (*sides, *(x for s in self.solves for x in (s.base, *(r.args[0] for r in s.reads))), *self.decay)

    def map(self, f: Callable[[Expr], Expr]) -> State:
        """Returns the state with ``f`` applied to what a token brings."""
        writes = tuple(Write(f(w.row), f(w.col), w.decayed) for w in self.writes)
        return replace(self, decay=tuple(map(f, self.decay)), writes=writes, solves=tuple(s.map(f) for s in self.solves))

    def decay_on(self, *dims: str) -> Expr | None:
        """Returns the log-decay whose dims are exactly ``dims``, or None."""
        return next((g for g in self.decay if set(g.dims) == set(dims)), None)

    def __str__(self) -> str:
        step = "t+1" if self.reverse else "t-1"
        if self.peak:
            return f"{self.name}[t] = max({self.name}[t-1]{''.join(f' + {g}' for g in self.decay)}, {self.writes[0].row})"
        factor = " * ".join(f"exp({g})" for g in self.decay)
        terms = [f"{factor} * {self.name}[{step}]" if factor else f"{self.name}[{step}]"]
        for w in self.writes:
            parts = [str(x) for x in (w.row, w.col) if x.op != "const"]
            terms.append(f"outer({', '.join(parts)})" if len(parts) == 2 else (parts or ["1"])[0])
        return f"{self.name}[t] = " + " + ".join(terms)


@dataclass(frozen=True)
class Recurrence:
    """A variant in canonical form: states in stage order, outputs over inputs, params and readouts.

    ``proofs`` says of every log-decay how it was shown to be <= 0 (text for explain).
    """

    name: str
    inputs: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    states: tuple[State, ...]
    outputs: tuple[tuple[str, Expr], ...]
    output_dims: tuple[tuple[str, ...], ...]  # storage order
    names: tuple[tuple[str, Expr], ...]
    sizes: tuple[tuple[str, Expr], ...]
    proofs: tuple[str, ...]
    chunk_sizes: tuple[int, ...]
    chunk_default: int

    def state(self, name: str) -> State:
        """Returns the state called ``name``; raises KeyError."""
        return {s.name: s for s in self.states}[name]

    @property
    def stage_of(self) -> dict[str, tuple[int, int]]:
        """Says of each state how many follow one on another up to it, and how many after it, as readouts of one feed the next.

        A state is fed by the readouts that it is written or decayed by, and by those that make the vectors it is read with.
        """
        reading = dict.fromkeys(
            n for x in (*(e for _, e in self.outputs), *(x for s in self.states for x in s.operands)) for n in reads(x, "readout")
        )
        fed: dict[str, set[str]] = {}
        for s in self.states:
            given = (*s.operands, *(n.args[0] for n in reading if n.name == s.name))
            fed[s.name] = {n.name for x in given for n in reads(x, "readout")} - {s.name}

        def longest(name: str, ways: dict[str, set[str]]) -> int:
            return max((1 + longest(other, ways) for other in ways[name]), default=0)

        feeding = {name: {other for other, found in fed.items() if name in found} for name in fed}
        return {name: (longest(name, fed), longest(name, feeding)) for name in fed}

    def verify(self) -> None:
        """Raises AssertionError with the value that breaks the canonical form."""
        seen: set[str] = set()
        for s in self.states:
            for g in s.decay:
                assert set(g.dims) <= set(s.dims), f"{s.name}: decay {g} on {g.dims}"
                assert len(g.dims) < 2 or len(s.decay) == 1, f"{s.name}: a dense decay {g} beside another"
            assert not s.peak or (len(s.dims) < 2 and len(s.writes) == 1), f"{s.name}: a peak is a number or a vector with one write"
            for w in s.writes:
                for side, dim in ((w.row, s.dims[:1]), (w.col, s.dims[1:])):
                    assert side.dims == tuple(dim), f"{s.name}: write {side} on {side.dims}, wanted {dim}"
            for u in s.solves:
                assert all(r.name == s.name and r.attr("at") in ("decayed", "previous") for r in u.reads), f"{s.name}: {u}"
            assert len({r.attr("dim") for u in s.solves for r in u.reads}) <= 1, f"{s.name} is corrected on two sides"
            for r in (n for e in s.operands for n in reads(e, "readout")):
                assert r.name in seen, f"{s.name} reads {r.name} before it is done"
            seen.add(s.name)
        for name, e in self.outputs:
            assert len(e.dims) < 2, f"{name} = {e} has both dims of a matrix"
            for n in walk(e):
                assert n.op not in ("past", "now"), f"not canonical: {n}"
                assert n.op != "readout" or n.attr("at") in READS, n

    def __str__(self) -> str:
        names = {e: n for n, e in self.names}
        lines = [f"recurrence {self.name}"] + [f"  {x}" for s in self.states for x in (*s.solves, s)]
        return "\n".join(lines + [f"  {n} = {show(e, names)}" for n, e in self.outputs])


def solved(name: str, dim: str, head: str) -> Expr:
    """Makes the leaf of a solved value on ``dim``."""
    return Expr("solved", name=name, dims=(dim,), head=head, token=True)


def readout(state: State, vector: Expr, dim: str, at: str) -> Expr:
    """Makes the readout of ``state`` by ``vector`` over ``dim`` ("" where the state has no dims)."""
    assert at in READS, at
    rest = tuple(d for d in state.dims if d != dim)
    return Expr(
        "readout",
        (vector,),
        name=state.name,
        dims=tuple(sorted(rest)),
        head="HV" if "HV" in (state.head, vector.head) else (state.head or vector.head),
        token=True,
        attrs=(("dim", dim), ("at", at)),
    )


def closings(suffix: Expr) -> tuple[tuple[str, str], ...]:
    """Lists the states that a suffix covers, each with the reverse state that starts from its final state's gradient."""
    states = suffix.attr("states").split()
    backs = dict(suffix.attrs).get("backs", "").split() or [f"d{s}" for s in states]
    return tuple(zip(states, backs, strict=True))


@dataclass(frozen=True)
class Adjoint:
    """The backward of a Recurrence: reverse states, and one expression per gradient.

    ``gradients`` names inputs and params; an input's expression is per token, a param's is per token too and is summed over batch
    and time by whoever stores it. A gradient on a narrower head than its expression is summed over the heads that share it.
    Cotangents of outputs are input leaves named d<output>. The gradient of an initial state S is R_0 of the reverse state dS; every
    reverse state of S starts from the final state's gradient.
    """

    recurrence: Recurrence
    cotangents: tuple[Tensor, ...]
    states: tuple[State, ...]  # reverse states, named d<state>, and d<state>_lead where a decay's gradient wants the leads
    gradients: tuple[tuple[str, Expr], ...]

    def __str__(self) -> str:
        names = {e: n for n, e in self.recurrence.names}
        lines = [f"adjoint {self.recurrence.name}"] + [f"  {x}" for s in self.states for x in (*s.solves, s)]
        return "\n".join(lines + [f"  d{n} = {show(e, names)}" for n, e in self.gradients])
