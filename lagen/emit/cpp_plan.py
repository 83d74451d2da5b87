"""The plan of one direction in C++: passes over the tokens, each a list of loops and sweeps over a tile of tokens.

What it is: a Recurrence (or its Adjoint) put in the order of a token-by-token evaluation. A *sweep* walks one state through a tile:
it writes the tile's rank-one terms and makes every readout that contracts one and the same dim; the dim that is left lies on the
vector lanes. A *loop* computes token-wise values of one shape. A *pass* goes over all tokens, forward (even) or reverse (odd): what
a later pass wants of an earlier one's readouts is kept per token (``kept``); the rest is computed again from the inputs.
What it is not: no text and no sizes. Who makes it: ``plan_forward`` and ``plan_backward``; who reads it: emit/cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lagen.emit.cpp_fit import LEAVES, REDUCTIONS, RESIZES, Fallback, outers, products, unfit
from lagen.emit.cpp_scan import Elements, elements, log_of
from lagen.ir import expr as E
from lagen.ir.expr import ONE, Expr, walk
from lagen.ir.recurrence import Adjoint, Recurrence, Solve, State, Write, closings, readout
from lagen.ir.scalar import FUNCTIONS
from lagen.ir.tunable import AtMost, Tunable, Tunables
from lagen.passes.leads import push_leads
from lagen.passes.lower_rows import lower_rows

LOADED = ("input", "lead", "follows")  # read from a row of the caller's or of an earlier pass
POST = ("now", "since")
EVERY, OFTEN = 64, 16  # tokens from one state that meets another to the next


@dataclass(frozen=True)
class Sweep:
    """One state's walk through a tile, for the readouts that contract ``rows``; ``lanes`` is the dim that they leave.

    ``rows`` is "" for a vector state and a number, whose readouts all leave the state's own dim. Writes are (on rows, on lanes, decayed);
    ``decay`` holds the factors exp(g).
    """

    state: State
    rows: str
    lanes: str
    level: int
    writes: tuple[tuple[Expr, Expr, bool], ...]
    decay: tuple[Expr, ...]
    reads: tuple[Expr, ...]
    whole: bool = False  # not causal: this pass only reads what an earlier one gathered
    elements: Elements | None = None  # a decay for every element; ``decay`` is empty then
    solves: tuple[Solve, ...] = ()  # values that it finds as it goes and writes; other sweeps of the state take them as they are
    back: Back | None = None  # of the gradient of a dense state

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Lists the values that it takes."""
        if self.back:
            return (*self.back.operands, *replace(self, back=None).operands)
        decay, own = self.elements.operands if self.elements else self.decay, [u.leaf for u in self.solves]
        solved = (x for u in self.solves for x in (*([u.base] if u.base != E.ZERO else []), *(r.args[0] for r in u.reads)))
        return (*decay, *(r.args[0] for r in self.reads), *(x for w in self.writes for x in w[:2] if x not in own), *solved)

    @property
    def makes(self) -> tuple[Expr, ...]:
        """Lists the values that it makes."""
        back = (*self.back.found, *self.back.sums) if self.back else ()
        return (*self.reads, *(u.leaf for u in self.solves), *back)

    @property
    def label(self) -> str:
        """Returns the name that tells this sweep from the others of its direction."""
        born = self.level - self.whole
        return "_".join(x for x in (self.state.name, self.rows, str(born) if born > 1 else "") if x) + "_"


@dataclass(frozen=True)
class Back:
    """What the reverse sweep of a dense state's gradient needs beside its own: the state, swept again through every tile.

    ``found`` are readouts of that state. ``sums`` are ``scanned`` values, reductions of values with two dims; ``gathers`` are such
    values themselves, which the gradients of params add up. All are element by element of both states.
    """

    first: Sweep
    found: tuple[Expr, ...]
    sums: tuple[Expr, ...]
    gathers: tuple[tuple[str, Expr], ...]

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Lists the values that it takes but for what stands in values with two dims."""
        vectors = (a for n in self.sums for a in n.args[0].args if len(a.dims) < 2)
        return (*self.first.operands, *(r.args[0] for r in self.found), *vectors)


@dataclass(frozen=True)
class Loop:
    """Token-wise values of one shape, operands first; ``dim`` is "" for numbers. Reductions over ``dim`` belong to its loop."""

    dim: str
    nodes: tuple[Expr, ...]


@dataclass(frozen=True)
class Resize:
    """A value whose lanes are not its operands': concat, part, rename, taylor2, quad and their adjoints, and a row times a param."""

    node: Expr


@dataclass(frozen=True)
class Suffix:
    """A running sum from the last token on: the gradient of a log-decay. Operands: x, y, exp(g) and, in fours, ``pairs``."""

    node: Expr


Step = Loop | Sweep | Resize | Suffix


@dataclass(frozen=True)
class Pass:
    """All tokens, once. ``loads`` are the inputs it reads, ``stores`` the sinks it fills, ``closings`` the suffixes it closes.

    ``outers`` are added up over its tokens: the gradient of a param with two dims, on its first dim and on its second.
    """

    reverse: bool
    loads: tuple[Expr, ...]
    steps: tuple[Step, ...]
    stores: tuple[tuple[str, Expr], ...]
    closings: tuple[tuple[Expr, Sweep, int], ...]  # suffix, the sweep of a state it covers, which of the sweep's decays
    outers: tuple[tuple[str, Expr, Expr], ...] = ()


@dataclass(frozen=True)
class Meeting:
    """A state and the reverse state that a suffix covers: what they hold between two tokens gives the suffix's value there.

    d/dg_t = <S_{t-1}, dS_{t-1}>, summed to where the decay stands. The sweep of the earlier pass keeps its state ``every`` so many tokens
    of the program, that of the later one meets it there, and the running sum starts anew: its differences cancel over few tokens, not
    over all. What one token rounds is in the sum of all tokens before it, so the gradient of a param, which adds those up, wants more
    meetings.
    """

    suffix: Expr
    first: Sweep
    second: Sweep


@dataclass(frozen=True)
class Program:
    """One direction. ``once`` is computed before the tokens; ``kept`` values have a row for every token."""

    head: str
    once: tuple[Step, ...]
    params: tuple[Expr, ...]
    passes: tuple[Pass, ...]
    kept: tuple[Expr, ...]
    sinks: tuple[tuple[str, Expr], ...]
    ends: tuple[Sweep, ...]  # per state in order, the sweep whose end is the state's final value
    meetings: tuple[Meeting, ...]
    every: int

    @property
    def given(self) -> set[str]:
        """Returns the names of what it makes: outputs, or the tensors that get a gradient."""
        gathered = (n for p in self.passes for s in p.steps if isinstance(s, Sweep) and s.back for n, _ in s.back.gathers)
        return {n for n, _ in self.sinks} | {o[0] for p in self.passes for o in p.outers} | set(gathered)

    def __str__(self) -> str:
        lines = [f"program over {self.head or 'no head'}"]
        for p in self.passes:
            lines.append("  pass, tokens last to first" if p.reverse else "  pass")
            for s in p.steps:
                if isinstance(s, Sweep):
                    shape = f"{len(s.writes)} writes, {len(s.reads)} reads over {s.rows or 'nothing'}, lanes {s.lanes or '1'}"
                    lines.append(f"    sweep {s.label}: {shape}")
                elif isinstance(s, Loop):
                    lines.append(f"    loop over {s.dim or 'tokens'}: " + "; ".join(str(n) for n in s.nodes))
                else:
                    lines.append(f"    {s.node}")
            lines.extend(f"    store {name}" for name, _ in p.stores)
        return "\n".join(lines)


REGISTERS = 32
"""Vector registers of the widest machine; where there are fewer, the C++ itself takes fewer tokens a group."""


def tile(program: Program) -> int:
    """Returns how many tokens a tile has by default: what decays on a dim of a matrix copies its operands, and half as many stay near."""
    sweeps = (s for p in program.passes for s in p.steps if isinstance(s, Sweep))
    return 8 if any(g.dims for s in sweeps if s.rows for g in s.decay) else 16


def tunables(program: Program, pass_: str, cores: int = 1) -> Tunables:
    """Returns what may be chosen of one direction: the macros of templates/cpp/sweep.h.j2, and how many of ``cores`` threads it takes."""
    sweeps = [s for p in program.passes for s in p.steps if isinstance(s, Sweep)]
    if not sweeps:
        return Tunables(())
    least = max(1, min(len(s.reads) for s in sweeps))
    found = [
        Tunable(f"{pass_} tile", (8, 16, 32, 64), tile(program), "tokens whose values are computed, then swept, at a time"),
        Tunable(f"{pass_} wide", (1, 2, 4), 4, "vectors of a state's row that a walk keeps in registers"),
        Tunable(f"{pass_} group", (1, 2, 4, 8), 4, "tokens that share a walk over the state, where the registers hold them"),
    ]
    if cores > 1:
        counts = (0, *(1 << i for i in range(cores.bit_length()) if 1 << i < cores))
        found.append(Tunable(f"{pass_} threads", counts, 0, "threads at most; 0: as many as torch has", static=False))
    limit = AtMost((f"{pass_} wide", f"{pass_} group"), max(8, REGISTERS // least), "no sweep's group would fit the registers")
    return Tunables(tuple(found), (limit,))


def plan_forward(recurrence: Recurrence) -> Program | Fallback:
    """Plans the forward of ``recurrence``."""
    return _plan(recurrence, recurrence.states, recurrence.outputs, recurrence.states)


def plan_backward(adjoint: Adjoint) -> Program | Fallback:
    """Plans the backward of ``adjoint``: its sinks are the gradients."""
    gradients = tuple((n, e) for n, e in adjoint.gradients if e != E.ZERO and not (e.op == "expand" and e.args[0] == E.ZERO))
    by_name = {s.name: s for s in adjoint.states}
    ends = tuple(by_name[f"d{s.name}"] for s in adjoint.recurrence.states)
    return _plan(adjoint.recurrence, adjoint.recurrence.states + adjoint.states, gradients, ends)


def _plan(
    recurrence: Recurrence, states: tuple[State, ...], sinks: tuple[tuple[str, Expr], ...], ends: tuple[State, ...]
) -> Program | Fallback:
    reason = unfit(recurrence, states, [e for _, e in sinks])
    return Fallback(reason) if reason else _Planner(recurrence, states, sinks, ends).program()


class _Planner:
    """What is known while one direction is planned."""

    def __init__(
        self, recurrence: Recurrence, states: tuple[State, ...], sinks: tuple[tuple[str, Expr], ...], ends: tuple[State, ...]
    ) -> None:
        self.sizes, self.params, self.outputs = dict(recurrence.sizes), recurrence.params, recurrence.outputs
        self.head = recurrence.outputs[0][1].head
        self.raw = {s.name: s for s in states}
        self.solver = {u.leaf: s.name for s in states for u in s.solves}
        self.states = self.raw
        self.pair = next(((s.of, s.name) for s in states if s.dense and s.reverse), ())
        own = {t.name for t in self.params}
        self.summed = any(n.op == "suffix" for name, e in sinks if name in own for n in walk(e))
        self.lowered: dict[Expr, Expr] = {}
        self.pure: dict[Expr, bool] = {}
        self.states = {s.name: self.lower_state(s) for s in states}
        self.sinks = tuple((n, _row(self.lower(e), e.dims, token=True)) for n, e in sinks if len(e.dims) < 2)
        self.gathers = tuple((n, self.lower(e)) for n, e in sinks if len(e.dims) > 1 and not outers(e))
        order = {t.name: t.dims for t in recurrence.params}
        self.outers: list[tuple[str, Expr, Expr]] = []
        for n, a, b in ((n, a, b) for n, e in sinks if len(e.dims) > 1 for a, b in outers(e)):
            first, second = sorted((_row(self.lower(x), x.dims, token=True) for x in (a, b)), key=lambda x: order[n].index(x.dims[0]))
            self.outers.append((n, first, second))
        self.ends = tuple(s.name for s in ends)
        self.levels: dict[Expr, int] = {}
        self.sweeps: dict[tuple[str, str, int], list[Expr]] = {}
        self.made: dict[tuple[str, str, int], Sweep] = {}

    # ---- lowering: row functions into sums, reads of vector states into the state itself

    def lower(self, root: Expr) -> Expr:
        """Rewrites ``root`` so that a vector state is read whole and its contraction is token-wise."""
        if root not in self.lowered:
            self.lowered[root] = E.rewrite(lower_rows(root), self._read)
        return self.lowered[root]

    def _read(self, n: Expr) -> Expr | None:
        if n.op == "mean":
            return E.div(E.reduce("sum", self.lower(n.args[0])), E.size(n.attr("dim")))
        if n.op == "suffix":
            covered = self.raw[n.attr("states").split()[0]]
            gate = next(g for g in covered.decay if g.dims == n.dims)
            return replace(n, args=(*(self.lower(a) for a in n.args), E.call("exp", self.lower(gate)), *self.pairs(n)))
        if n.op == "contract" and any(len(a.dims) > 1 and a.op == "param" for a in n.args):
            x, w = sorted(n.args, key=lambda a: len(a.dims))
            flat = Expr("param", name=w.name, dims=(f"{n.dims[0]}|{n.attr('dim')}",), head=w.head)
            return replace(n, op="product", args=(self.lower(x), flat))
        if n.op in ("sum", "contract") and any(len(a.dims) > 1 for a in n.args):
            reduction = replace(n, args=tuple(self.lower(a) for a in n.args))
            return Expr("scanned", (reduction,), dims=n.dims, head=n.head, token=True)
        if n.op == "lead":
            return push_leads(E.lead(self.lower(n.args[0])), self.stored)
        if n.op != "readout" or len(self.states[n.name].dims) > 1:
            return None
        state = replace(readout(self.states[n.name], ONE, "", n.attr("at")), head=self.states[n.name].head)
        vector = self.lower(n.args[0])
        return E.contract(vector, state) if n.attr("dim") else E.mul(vector, state)

    def pairs(self, suffix: Expr) -> tuple[Expr, ...]:
        """Lists the ``products`` of two tokens for a decay's gradient that a param adds up with all that it rounds."""
        both = [(self.raw[name], self.raw[back]) for name, back in closings(suffix)]
        return tuple(self.lower(x) for four in products(both) for x in four) if self.summed and not suffix.dims else ()

    def stored(self, n: Expr) -> bool:
        """Tells whether a value has a row for every token: an input, or what an earlier pass keeps."""
        return n.op == "input" or not (self.is_pure(n) or n.op in FUNCTIONS or n.op in ("pow", "expand"))

    def lower_state(self, s: State) -> State:
        """Lowers the decays and the writes of a state; a vector state's write becomes one product."""
        writes = tuple(Write(self.lower(w.row), self.lower(w.col), w.decayed) for w in s.writes)
        if len(s.dims) < 2:
            writes = tuple(Write(_row(E.mul(w.row, w.col), s.dims), ONE, w.decayed) for w in writes)
        decay = tuple(self.lower(g) for g in s.decay)
        solves = tuple(u.map(self.lower) for u in s.solves)
        s = replace(s, solves=tuple(u if u.base == E.ZERO else replace(u, base=_row(u.base, u.leaf.dims, True)) for u in solves))
        return replace(s, writes=writes, decay=decay if s.peak or s.dense else tuple(E.call("exp", g) for g in decay))

    # ---- levels: which pass can make a value

    def level(self, node: Expr) -> int:
        """Returns the first pass that can make ``node``; even passes go forward, odd ones in reverse."""
        if node not in self.levels:
            below = max((self.level(a) for a in node.args), default=0)
            if node.op == "scanned" or node.op == "readout" and node.name in self.pair:
                first, back = (self.states[name] for name in self.pair)
                below = self.parity(max(below, self.body_level(first), self.body_level(back)), True)
            elif node.op == "readout":
                state = self.states[node.name]
                gathered = self.body_level(state)
                below = max(below, gathered + 1) if node.attr("at") == "all" else self.parity(max(below, gathered), state.reverse)
            elif node.op == "solved":
                state = self.states[self.solver[node]]
                bodies = [x for x in self.bodies(state) if self.solver.get(x) != state.name]
                below = self.parity(max(map(self.level, bodies), default=0), state.reverse)
            elif node.op == "suffix":
                below = self.parity(below, True)
            elif node.op == "lead" and not self.is_pure(node):  # what the token after has is there once a pass is over
                below += 1
            self.levels[node] = below
        return self.levels[node]

    @staticmethod
    def parity(level: int, reverse: bool) -> int:
        """Returns the first pass from ``level`` on that goes in the wanted direction."""
        return level + (level % 2 != int(reverse))

    def body_level(self, state: State) -> int:
        """Returns the first pass that has the writes and decays of ``state``, in its direction."""
        least = max((self.level(x) for x in self.bodies(state)), default=0)
        return least if not state.causal else self.parity(least, state.reverse)

    @staticmethod
    def bodies(state: State) -> tuple[Expr, ...]:
        """Lists what a token brings to a state, and what it writes that the state solves."""
        return (*state.operands, *(x for w in state.writes for x in (w.row, w.col)))

    def is_pure(self, node: Expr) -> bool:
        """Tells whether ``node`` comes from inputs and params alone, so that any pass may compute it again."""
        if node not in self.pure:
            self.pure[node] = node.op not in ("readout", "suffix", "solved", "scanned") and all(self.is_pure(a) for a in node.args)
        return self.pure[node]

    # ---- sweeps

    def everything(self) -> list[Expr]:
        """Lists every node that the sinks and the ends of the states need, through the bodies of the states they read."""
        seen: set[Expr] = set()
        found: list[Expr] = []
        waiting = [*(e for _, e in self.sinks), *(x for _, *pair in self.outers for x in pair), *(e for _, e in self.gathers)]
        names = list(self.ends)
        done: set[str] = set()
        while waiting or names:
            while waiting:
                for n in walk(waiting.pop()):
                    if n not in seen:
                        seen.add(n)
                        found.append(n)
                        if n.op == "readout":
                            names.append(n.name)
                        if n.op == "suffix":
                            names.extend(n.attr("states").split())
                        if n in self.solver:
                            names.append(self.solver[n])
            while names:
                name = names.pop()
                if name not in done:
                    done.add(name)
                    waiting.extend(self.bodies(self.states[name]))
        return found

    def make_sweeps(self, nodes: list[Expr]) -> None:
        """Groups the readouts by state, contracted dim and pass, and adds a sweep for a state that nothing reads."""
        if self.pair:
            self.make_back(nodes)
        for n in nodes:
            if n.op == "readout" and n.name not in self.pair:
                self.sweeps.setdefault((n.name, n.attr("dim"), self.level(n)), []).append(n)
        covered = [s for n in nodes if n.op == "suffix" for s in n.attr("states").split()]
        for name in (*self.ends, *covered):
            if name not in self.pair and not any(key[0] == name for key in self.sweeps):
                state = self.states[name]
                self.sweeps[name, state.dims[0] if len(state.dims) > 1 else "", self.body_level(state)] = []
        solving = {self.solver[n] for n in nodes if n in self.solver}
        for name in sorted(solving):
            state = self.states[name]
            self.sweeps.setdefault((name, state.solves[0].reads[0].attr("dim"), self.body_level(state)), [])
        for (name, rows, level), reads in list(self.sweeps.items()):
            state = self.states[name]
            lanes = next((d for d in state.dims if d != rows), "")
            swap = len(state.dims) > 1 and rows == state.dims[1]
            writes = tuple((w.col, w.row, w.decayed) if swap else (w.row, w.col, w.decayed) for w in state.writes)
            if len(state.dims) < 2:
                writes = tuple((ONE, w.row, w.decayed) for w in state.writes)
            whole = any(n.attr("at") == "all" for n in reads)
            decay = () if whole or state.dense else state.decay
            each = elements([log_of(state.decay[0])], lanes, rows) if state.dense else None
            solves = state.solves if name in solving and rows != state.solves[0].leaf.dims[0] and level == self.body_level(state) else ()
            sweep = Sweep(state, rows, lanes, level, () if whole else writes, decay, tuple(reads), whole, each, solves)
            self.made[name, rows, level] = sweep
            if whole:
                self.made[name, rows, level - 1] = replace(sweep, level=level - 1, writes=writes, reads=(), whole=False)

    def make_back(self, nodes: list[Expr]) -> None:
        """Makes the sweep of a dense state, whose lanes are the dim of the outputs, and that of its gradient."""
        first, back = (self.states[name] for name in self.pair)
        lanes = next((d for _, e in self.outputs for d in e.dims if d in first.dims), first.dims[0])
        rows = next(d for d in first.dims if d != lanes)
        turned = first.dims[0] == lanes
        ours, theirs = (tuple((w.col, w.row, w.decayed) if turned else (w.row, w.col, w.decayed) for w in s.writes) for s in (first, back))
        log, level = log_of(first.decay[0]), self.body_level(first)
        one = Sweep(first, rows, lanes, level, ours, (), (), elements=elements([log], lanes, rows))
        reads = {name: tuple(n for n in nodes if n.op == "readout" and n.name == name and n.attr("dim")) for name in self.pair}
        sums = tuple(n for n in nodes if n.op == "scanned")
        matrices = [a for n in sums for a in n.args[0].args if len(a.dims) > 1]
        each = elements([log, *matrices, *(e for _, e in self.gathers)], lanes, rows)
        at = self.parity(max(self.body_level(first), self.body_level(back)), True)
        again = Back(one, reads[first.name], sums, self.gathers)
        self.made[first.name, rows, level] = one
        self.made[back.name, rows, at] = Sweep(back, rows, lanes, at, theirs, (), reads[back.name], elements=each, back=again)

    # ---- passes

    def program(self) -> Program:
        """Puts everything in order."""
        nodes = self.everything()
        self.make_sweeps(nodes)
        ends = tuple(self.first_sweep(name) for name in self.ends)
        closed = [
            (n, self.first_sweep(name), next(i for i, d in enumerate(self.states[name].decay) if d.dims == n.dims))
            for n in nodes
            if n.op == "suffix"
            for name in n.attr("states").split()
        ]
        behind = [(max(self.level(row), self.level(lane)), (name, row, lane)) for name, row, lane in self.outers]
        top = max([self.level(e) for _, e in self.sinks] + [s.level for s in self.made.values()] + [level for level, _ in behind])
        kept: dict[Expr, None] = {}
        passes: list[Pass] = []
        constants: dict[Expr, None] = {}
        for level in range(top, -1, -1):
            stores = tuple((name, e) for name, e in self.sinks if self.level(e) == level)
            sweeps = [s for s in self.made.values() if s.level == level]
            wanted = [e for _, e in stores] + [n for n in kept if self.level(n) == level]
            added = tuple(o for at, o in behind if at == level)
            wanted += [x for s in sweeps for x in s.operands] + [x for _, *pair in added for x in pair]
            needed, loads = self.needed(wanted, level, kept, constants)
            if needed or sweeps or stores or added:
                steps = schedule(needed, sweeps)
                here = tuple(c for c in closed if c[1].level == level)
                passes.append(Pass(bool(level % 2), loads, steps, stores, here, added))
        once = [n for n in constants if n.op not in LEAVES]
        params = tuple(n for n in constants if n.op == "param")
        every, meetings = 1 if self.pair else OFTEN if self.summed else EVERY, self.meetings(nodes)
        return Program(self.head, schedule(once, []), params, tuple(reversed(passes)), tuple(kept), self.sinks, ends, meetings, every)

    def meetings(self, nodes: list[Expr]) -> tuple[Meeting, ...]:
        """Finds where the states that each suffix covers meet: a suffix has all of its meetings, or none."""
        found: list[Meeting] = []
        for n in nodes:
            if n.op == "suffix":
                pairs = [self.meeting(n, name, back) for name, back in closings(n)]
                met = [m for m in pairs if m is not None]
                found += met if len(met) == len(pairs) else []
        return tuple(found)

    def meeting(self, suffix: Expr, name: str, back: str) -> Meeting | None:
        """Finds a meeting that is over when ``suffix`` wants it: the later sweep makes what the suffix sums."""
        wanted = set(walk(suffix))
        mine, theirs = ([s for s in self.made.values() if s.state.name == n and not s.whole] for n in (name, back))
        pairs = [(a, b) for a in mine for b in theirs]
        pairs += [(b, a) for a, b in pairs]
        fit = [(a, b) for a, b in pairs if a.level < b.level and wanted & set(b.reads)]
        best = min(fit, key=lambda p: (p[0].rows != p[1].rows, p[0].level, p[1].level, p[0].rows), default=None)
        return Meeting(suffix, *best) if best else None

    def first_sweep(self, name: str) -> Sweep:
        """Returns the earliest sweep of a state that writes."""
        return min((s for s in self.made.values() if s.state.name == name and not s.whole), key=lambda s: (s.level, s.rows))

    def needed(
        self, wanted: list[Expr], level: int, kept: dict[Expr, None], constants: dict[Expr, None]
    ) -> tuple[list[Expr], tuple[Expr, ...]]:
        """Lists what pass ``level`` computes for ``wanted``; notes what it takes from earlier passes and what is not per token."""
        order: dict[Expr, None] = {}
        loads: dict[Expr, None] = {}

        def visit(n: Expr) -> None:
            if n in order or n in loads or n in constants:
                return
            if not n.token:
                for a in n.args:
                    visit(a)
                constants[n] = None
            elif n.op in LOADED:
                loads[n] = None
                if not self.is_pure(n):
                    kept[n.args[0]] = None
            elif self.level(n) < level and not self.is_pure(n):
                kept[n] = None
            else:
                for a in n.args if n.op != "scanned" else ():
                    visit(a)
                order[n] = None

        for n in wanted:
            visit(n)
        return list(order), tuple(sorted(loads, key=lambda n: n.name or n.op))


def _row(x: Expr, dims: tuple[str, ...], token: bool = False) -> Expr:
    """Gives a value that is to be stored an array of its own: a constant or a param is repeated."""
    if x.dims == dims and x.op not in ("const", "size", "scale") and (x.token or not token):
        return x
    return Expr("expand", (x,), dims=dims, head=x.head, token=x.token or token)


def split_dim(recurrence: Recurrence, forward: Program) -> str:
    """Returns the dim whose slices are computed each by itself, so that threads can share a head; "" where there is none.

    It is the one dim of all outputs, and nothing in forward sums over it. Then every gradient without it is a sum over slices.
    """
    spanned = {e.dims for _, e in recurrence.outputs}
    dim = spanned.pop()[0] if len(spanned) == 1 and all(spanned) else ""
    if not dim or dim in dict(recurrence.sizes) or any(n.name == dim for _, e in recurrence.sizes for n in walk(e)):
        return ""
    for step in (*forward.once, *(s for p in forward.passes for s in p.steps)):
        if isinstance(step, Loop):
            mixed = any(n.op in REDUCTIONS and home(n) == dim for n in step.nodes)
        elif isinstance(step, Sweep):
            mixed = step.rows == dim
        else:
            mixed = dim in {d for n in (step.node, *step.node.args) for d in n.dims}
        if mixed:
            return ""
    return dim


def home(node: Expr) -> str:
    """Returns the dim of the loop that computes ``node``: a reduction belongs to its operand's."""
    return node.attr("dim") if node.op in REDUCTIONS else (node.dims or ("",))[0]


def schedule(nodes: list[Expr], sweeps: Iterable[Sweep]) -> tuple[Step, ...]:
    """Orders the nodes of a pass (operands first in ``nodes``) into loops, joining as many as can stand in one.

    A loop that gives no sweep anything waits until all sweeps are over: there it joins those that read what it makes.
    """
    left = dict.fromkeys(n for n in nodes if n.op not in ("readout", "solved", "scanned"))
    inside = set(nodes)
    pending = list(sweeps)
    steps: list[Step] = []

    def ready(n: Expr, missing: set[Expr]) -> bool:
        return not any(a in missing for a in n.args)

    while left or pending:
        missing = set(left) | {r for s in pending for r in s.makes if r in inside or r.op == "solved"}
        wanted = set(walk(*(x for s in pending for x in s.operands))) if pending else set(left)
        found = False
        for dim in dict.fromkeys(["", *sorted(home(n) for n in left)]):
            chosen: list[Expr] = []
            blocked = set(missing)
            for n in left:
                if n.op in RESIZES or n.op == "suffix" or home(n) != dim or not ready(n, blocked):
                    continue
                chosen.append(n)
                if n.op not in REDUCTIONS:
                    blocked.discard(n)
            if not wanted.isdisjoint(chosen):
                steps.append(Loop(dim, tuple(chosen)))
                for n in chosen:
                    del left[n]
                found = True
                break
        if found:
            continue
        for n in [n for n in left if n.op in (*RESIZES, "suffix") and n in wanted and ready(n, missing)]:
            steps.append(Suffix(n) if n.op == "suffix" else Resize(n))
            del left[n]
            found = True
        missing = set(left) | {r for s in pending for r in s.makes if r in inside or r.op == "solved"}
        for s in list(pending):
            if not any(x in missing for x in s.operands):
                steps.append(s)
                pending.remove(s)
                found = True
        assert found, f"no order for {[str(n) for n in left]} and {[s.label for s in pending]}"
    return tuple(steps)
