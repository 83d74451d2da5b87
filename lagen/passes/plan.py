"""Plans the launches of a variant: what is prepared, what each sweep computes, what is finished afterwards.

Rules, none of them about a variant:
 1. A readout that keeps dim Y belongs to the sweep of its direction with Y on the grid: there its contraction is whole (KERNELS.md).
 2. A sweep computes element-wise work and sums over whole dims; what its operands need beyond that is prepared. A minimum cut chooses
    which values cross memory (passes/cut).
 3. A result whose readouts live in one sweep, and that sums over no tiled dim, is stored by that sweep. Otherwise the sweeps store the
    largest pieces they can compute (sums over the tiled dim as partial sums) and a finish kernel does the rest.
 4. Where a solved value needs a reverse sweep of its own, a tile that would be swept both ways is not swept again: all states are kept as
    each chunk begins, and one kernel, parallel over chunks, reads both directions from what was kept.
 5. Pair scores whose decay rides on the contracted dim cost log2(C) matmuls: they are stored once and loaded by every tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lagen.ir import expr as E
from lagen.ir.chunk import Carry
from lagen.ir.expr import LEAVES, Expr, addends, walk
from lagen.ir.plan import Buffer, Hold, Kernel, Plan, Store
from lagen.ir.recurrence import Adjoint, Recurrence, State, closings, readout
from lagen.passes.chunk import carry_of, lower_readout, lower_solve, merge
from lagen.passes.decode import plan_step
from lagen.passes.leads import push_leads
from lagen.passes.lower_rows import lower_rows
from lagen.passes.operands import (
    ROWS,
    SIZED,
    choose_prepared,
    choose_saved,
    map_adjoint,
    map_recurrence,
    operands_of,
    serving,
    token_kernels,
)
from lagen.passes.order import beside, in_circles, in_order
from lagen.passes.packing import pack
from lagen.passes.pair_sums import gather, join, lag, take_own
from lagen.passes.peak_sweeps import peak_sweeps
from lagen.passes.scans import plan_scans, scan_axes
from lagen.passes.simplify import factor, simplify
from lagen.passes.spans import split_spans, tails
from lagen.passes.stages import Stage, stages
from lagen.passes.turn import turn
from lagen.passes.whole_decay import load, load_tables, others, stored, take_inverses, take_out, take_tables

CORE = ("readout", "suffix")
Key = tuple[int, str]
"""A sweep: reversed or not, or MET, and the dim on the grid."""
REVERSE, MET = 1, 2
"""MET: what needs states of both directions, each kept as its chunk begins: nothing runs from chunk to chunk any more."""


def plan(recurrence: Recurrence, adjoint: Adjoint) -> Plan:
    """Plans forward, backward and step of ``recurrence``; raises NotImplementedError for what no sweep carries."""
    head = max((t.head for t in recurrence.inputs + recurrence.params), key=E.HEADS.index)
    # each head sums its own share of a gradient over all tokens; what the sum gives is added up over the heads at the end
    adjoint = replace(adjoint, states=tuple(s if s.causal else replace(s, head=head) for s in adjoint.states))
    free = {s.name: s for s in recurrence.states + adjoint.states}
    lowered = map_recurrence(recurrence, lambda e: _totals(lower_rows(e), free))
    back = map_adjoint(simplify(adjoint), lambda e: _totals(lower_rows(e), free))
    taken = {t.name for t in recurrence.inputs + recurrence.params} | {n for n, _ in recurrence.outputs}
    prepared = choose_prepared(operands_of(lowered.states, [e for _, e in lowered.outputs]), recurrence.names, "x", taken)
    table = {n: b.leaf for n, b in prepared.items()}
    core = map_recurrence(lowered, lambda e: E.substitute(e, table))
    back = map_adjoint(back, lambda e: E.substitute(e, table))
    outputs = {name: Buffer(name, e.head, dims, True, "input") for (name, e), dims in zip(core.outputs, core.output_dims, strict=True)}
    step, stepped = plan_step(lowered, prepared, outputs, head), core.states
    if (axes := scan_axes(core, back)) and (scans := plan_scans(core, back, axes, head, prepared, outputs, step, taken)):
        return scans
    roots = [*(e for _, e in core.outputs), *operands_of(back.states, [e for _, e in back.gradients]), *(e for _, e in back.gradients)]
    peaks, maxima = peak_sweeps(core.states, roots, taken)
    maximum = {n: b.leaf for n, b in maxima.items()}
    core = map_recurrence(replace(core, states=tuple(s for s in core.states if not s.peak)), lambda e: E.substitute(e, maximum))
    back = map_adjoint(back, lambda e: E.substitute(e, maximum))
    # solved values cross memory: their own sweep computes them, all others load them
    solved = {u.leaf: Buffer(u.leaf.name, head, u.leaf.dims, True, "input") for s in core.states + back.states for u in s.solves}
    core = replace(core, states=tuple(_known(s, solved) for s in core.states))
    back = replace(map_adjoint(back, lambda e: E.substitute(e, _leaves(solved))), states=tuple(_known(s, solved) for s in back.states))
    saved = choose_saved(core, back, head)
    kept = {b.name: b for b in saved.values() if b.name not in outputs}
    targets = [(outputs[name], e) for name, e in core.outputs] + [(kept[b.name], n) for n, b in saved.items() if b.name in kept]
    buffers = {b.leaf: b for b in solved.values()}
    own, back_own = ([(buffers[u.leaf], u.leaf) for s in states for u in s.solves] for states in (core.states, back.states))
    taken |= {b.name for b in (*kept.values(), *solved.values())}
    onward = stages(core.states, targets + own, head, taken)
    crossed = {e: b for stage in onward for b, e in stage.targets if b not in [x for x, _ in targets + own]}
    loads = _leaves(saved | crossed)
    # numbers leave inner products only now: before, they would take outputs apart that the backward is given whole
    back = map_adjoint(back, lambda e: factor(push_leads(E.substitute(e, loads), _loaded)))
    numbers = choose_prepared(operands_of(back.states, [e for _, e in back.gradients]), (), "w", taken, head)
    back = map_adjoint(back, lambda e: E.substitute(e, {n: b.leaf for n, b in numbers.items()}))

    prepare = tuple(
        k
        for h in dict.fromkeys(b.head for b in prepared.values())
        for k in token_kernels(
            f"prepare_{h}".lower().rstrip("_"),
            [Store(b, n) for n, b in prepared.items() if b.head == h],
            "row functions and size changes of the sweeps' operands",
        )
    )
    gradients = [
        (Buffer(f"d{t.name}", head, t.dims, t.token, "own"), e)
        for t, (_, e) in zip(recurrence.inputs + recurrence.params, back.gradients, strict=True)
    ]
    ends = {s.name: (f"initial_{s.name}", f"final_{s.name}") for s in core.states}
    ahead = _stages("forward", onward, head, ends, (), taken, {})
    decayed = {n: b for launched in ahead for n, b in stored(launched.chunked).items()}
    ends = {s.name: (f"initial_{s.name}", "") for s in core.states}
    ends |= {s.name: (f"dfinal_{s.name[1:]}", f"dinitial_{s.of}" if s.name == f"d{s.of}" else "") for s in back.states}
    known = tuple(replace(s, solves=()).map(lambda e: E.substitute(e, loads)) for s in core.states)
    behind = _stages("backward", stages(known + back.states, gradients + back_own, head, taken), head, ends, known, taken, decayed)
    undone = {n: b for launched in behind for n, b in stored(launched.chunked).items()}
    returned = [k for launched in behind for k in launched.kernels]
    first = token_kernels("backward_prepare", [Store(b, n) for n, b in numbers.items()], "row sums that several sweeps take")
    # what the forward stores beyond its results and what was chosen to be saved serves the backward too
    loaded = {n for k in (*first, *returned) for n in walk(*k.values)}
    reused = [b for b in (*decayed.values(), *crossed.values()) if b.leaf in loaded]
    whole = len(ahead) == len(behind) == 1 and not peaks  # what crosses between stages is not there when scans are cut
    borders = tuple(load(load(_border(s), decayed), undone) for s in core.states + back.states) if whole else ()
    # nor is what a sweep solves
    late = {leaf for _, leaf in back_own}
    late |= {b.leaf for n, b in undone.items() if not late.isdisjoint(walk(n))}
    cuttable = late.isdisjoint(walk(*(v for k in borders for v in k.values)))
    made_before = [*prepared.values(), *kept.values(), *maxima.values(), *(b for b, _ in own)]
    made = Plan(
        recurrence.name,
        (*prepare, *peaks, *(k for launched in ahead for k in launched.kernels)),
        (*first, *returned),
        (*serving(prepare, step), *step) if all(s.causal for s in core.states) else (),
        (*made_before, *reused, *(_total(s) for s in core.states if not s.causal)),
        stepped + back.states,
        borders if cuttable and all(s.causal and s.head == head for s in core.states) else (),
    )
    made = pack(made)
    made.verify()
    return made


@dataclass(frozen=True)
class _Launched:
    """The launches of one stage: what decays make of its chunks, then its sweeps."""

    chunked: tuple[Kernel, ...]
    sweeps: tuple[Kernel, ...]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Lists all launches, each after those whose values it loads."""
        return in_order((*map(join, self.chunked), *self.sweeps))


def _stages(
    name: str,
    found: tuple[Stage, ...],
    head: str,
    ends: dict[str, tuple[str, str]],
    given: tuple[State, ...],
    taken: set[str],
    decayed: dict[Expr, Buffer],
) -> list[_Launched]:
    """Makes the launches of a pass, stage by stage; ``decayed`` is what decays made of chunks before."""
    out: list[_Launched] = []
    sunk: set[str] = set()
    for i, stage in enumerate(found):
        label = name if i == 0 else f"{name}_{i}"
        one = _Pass(label, stage.states, head, "t" if i == 0 else f"t{i}_")
        one.settle(list(stage.targets))
        sweeps = tuple(load(k, decayed) for k in lag(gather(take_own(tails(one.kernels(ends, given, sunk))))))
        inverses = take_inverses(sweeps, head, taken)
        sweeps = tuple(load(k, {s.value: s.buffer for s in inverses}) for k in sweeps)
        tables = take_tables(sweeps, head, taken)
        sweeps = tuple(load_tables(k, tables) for k in sweeps)
        chunked, sweeps = take_out(label, sweeps, head, taken, frozenset(one.solved), [*inverses, *tables])
        decayed = decayed | stored(chunked)
        out.append(_Launched(tuple(load(k, others(decayed, k)) for k in chunked), tuple(load(k, decayed) for k in sweeps)))
        given = (*given, *(s for s in stage.states if not s.causal))
    return out


def _loaded(n: Expr) -> bool:
    """Tells whether a value is loaded; raises NotImplementedError where the backward computes what a token needs of the next one."""
    if n.op in CORE:
        raise NotImplementedError(f"no Triton form for what the token after reads: {n}")
    return n.op in LEAVES


def _total(s: State) -> Buffer:
    """Names the buffer of a state that is summed over all tokens."""
    return Buffer(f"total_{s.name}", s.head, s.dims, False, "float32")


def _totals(e: Expr, states: dict[str, State]) -> Expr:
    """Turns free reads of a vector summed over all tokens into loads: to a sweep they are like params."""

    def rule(n: Expr) -> Expr | None:
        if n.op == "readout" and n.attr("at") == "all" and n.attr("dim") == "" and n.dims:
            return E.mul(_totals(n.args[0], states), _total(states[n.name]).leaf)
        return None

    return E.rewrite(e, rule)


def _leaves(buffers: dict[Expr, Buffer]) -> dict[Expr, Expr]:
    return {e: b.leaf for e, b in buffers.items()}


def _known(s: State, solved: dict[Expr, Buffer]) -> State:
    """Gives a state the buffers of what is solved in place of the values."""
    made = s.map(lambda e: E.substitute(e, _leaves(solved)))
    return replace(made, solves=tuple(replace(u, leaf=solved[u.leaf].leaf) for u in made.solves))


def _border(s: State) -> Kernel:
    """Makes the launch that stores a state where every segment begins (of a reverse state: where it ends)."""
    x, tile = (s.dims[0], s.dims[1]) if len(s.dims) == 2 else ("", (*s.dims, "")[0])
    if s.solves:  # the border's own sweep solves: what is solved stands on the dim that is tiled
        tile = s.solves[0].leaf.dims[0]
        x = next(d for d in s.dims if d != tile)
    source = f"dfinal_{s.name[1:]}" if s.reverse else f"initial_{s.name}"
    solving = {u.leaf: lower_solve(u.leaf, s, carry_of(s, x)) for u in s.solves}
    hold = Hold(carry_of(s, x).map(lambda e: E.substitute(e, solving)), source, f"border_{s.name}")
    return Kernel(f"cut_{s.name}".lower(), "sweep", (), f"{s.name} where segments meet", tile, s.reverse, (hold,))


# ---- one pass -------------------------------------------------------------------------------------------------------------------


class _Pass:
    """The sweeps of one pass, filled by ``settle`` and turned into kernels."""

    def __init__(self, name: str, states: tuple[State, ...], head: str, stem: str) -> None:
        self.name = name
        self.stem = stem  # of what crosses memory inside the pass
        self.states = {s.name: s for s in states}
        self.sweeps: dict[Key, list[Store]] = {}
        self.finish: list[Store] = []
        self.home: dict[Expr, Key] = {}
        self.temps: dict[Expr, Expr] = {}
        self.marks: dict[str, Key] = {}  # states that are kept as each chunk begins, each with the sweep that keeps it
        self.solved = {u.leaf: s for s in states for u in s.solves}
        self.head = head

    def settle(self, targets: list[tuple[Buffer, Expr]]) -> None:
        """Gives every target its kernel."""
        elementwise = self.elementwise([e for _, e in targets])
        targets = [(b, E.rewrite(e, elementwise)) for b, e in targets]
        self.states = {name: s.map(lambda e: E.rewrite(e, elementwise)) for name, s in self.states.items()}
        self.place([e for _, e in targets])
        for buffer, e in targets:
            keys = self.keys(e)
            last = self.last(e, keys) if buffer.token else None
            if last is not None:
                self.sweeps[last[0]].append(Store(buffer, last[1]))
            else:
                # what a decay's gradient is made of cancels: it crosses memory in float32
                dtype = "float32" if E.reads(e, "suffix") else ""
                self.finish.append(Store(buffer, self.frontier(e, dtype), summed=not buffer.token))
        for key, stores in list(self.sweeps.items()):
            self.sweeps[key] = [replace(s, value=self.fill(s.value, key)) for s in stores]

    def last(self, e: Expr, keys: set[Key]) -> tuple[Key, Expr] | None:
        """Returns the sweep that can store ``e`` whole, and ``e`` over what earlier sweeps of the same tiles store; None where none can."""
        if len({tile for _, tile in keys}) != 1:
            return None
        key = max(keys)  # a reverse sweep comes after those in order
        if len(keys) > 1:
            parts = [t for t in addends(e) if self.keys(t) and key not in self.keys(t)]
            rest = [t for t in addends(e) if t not in parts]
            earlier = E.add(*parts)
            if not parts or len(self.keys(earlier)) > 1 or not self.clean(earlier, next(iter(self.keys(earlier)))):
                return None
            if any(self.keys(t) - {key} for t in rest) or not all(self.clean(t, key) for t in rest):
                return None
            return key, E.add(*rest, self.store(earlier, next(iter(self.keys(earlier))), "float32" if E.reads(e, "suffix") else ""))
        return (key, e) if self.clean(e, key) else None

    def elementwise(self, roots: list[Expr]) -> Callable[[Expr], Expr | None]:
        """Returns the rule that reads a vector state element by element where its own dim is the only one on a grid.

        A sweep without tiles would read it whole, and each tile of a sum over tokens would add all of that to its share.
        """
        operands = [x for s in self.states.values() for x in s.operands]
        reads = [n for n in walk(*roots, *operands) if n.op == "readout"]
        kept = {n: tuple(d for d in self.states[n.name].dims if d != n.attr("dim")) for n in reads}
        tiles = {(self.states[n.name].reverse, dims[0]) for n, dims in kept.items() if dims}

        def rule(n: Expr) -> Expr | None:
            if n.op != "readout" or n.attr("at") == "all" or not (x := n.attr("dim")) or kept[n]:
                return None
            state = self.states[n.name]
            if all(d != x for _, d in tiles) or any(way == state.reverse and d != x for way, d in tiles):
                return None
            return E.contract(E.rewrite(n.args[0], rule), readout(state, E.ONE, "", n.attr("at")))

        return rule

    def place(self, roots: list[Expr]) -> None:
        """Chooses the sweep of every readout and suffix."""
        operands = [x for s in self.states.values() for x in (*s.operands, *(r for u in s.solves for r in u.reads))]
        cores = [n for n in walk(*roots, *operands) if n.op in CORE]
        for leaf, s in self.solved.items():
            self.home[leaf] = (s.reverse, leaf.dims[0])
        loose = []
        for n in cores:
            if n.op == "readout":
                state = self.states[n.name]
                kept = [d for d in state.dims if d != n.attr("dim")]
                if kept:
                    self.home[n] = (state.reverse, kept[0])
                else:
                    loose.append(n)
        for n in loose:
            state, x = self.states[n.name], n.attr("dim")
            fits = [k for k in self.home.values() if k[0] == state.reverse and k[1] != x]
            self.home[n] = fits[0] if fits else (state.reverse, "")
        self.meet()
        for n in cores:
            if n.op == "suffix":
                homes = {self.home[r] for a in n.args for r in E.reads(a, "readout") if self.home[r][0]}
                if not homes:  # an earlier stage stored both sides: any reverse sweep can sum them
                    homes = set([k for k in self.home.values() if k[0]][:1])
                if not homes:
                    raise NotImplementedError(f"no Triton form for a sum over what earlier stages stored: {n}")
                assert len(homes) == 1, f"a suffix sum over several sweeps: {n}"
                self.home[n] = homes.pop()
        for key in dict.fromkeys(self.home.values()):
            self.sweeps.setdefault(key, [])

    def meet(self) -> None:
        """Reads the tiles that would be swept both ways from states that are kept, where another tile is swept to solve."""
        solving = {leaf.dims[0] for leaf, s in self.solved.items() if s.reverse}
        ways = set(self.home.values())
        both = {tile for _, tile in ways if tile not in solving and {(False, tile), (True, tile)} <= ways} if solving else set()
        self.home = {n: (MET, key[1]) if key[1] in both else key for n, key in self.home.items()}
        for n, key in self.home.items():
            if key[0] == MET and n.attr("at") != "all":
                swept = [k for m, k in self.home.items() if m.name == n.name and m.op == "readout" and k[0] != MET]
                self.marks.setdefault(n.name, (swept or [(self.states[n.name].reverse, key[1])])[0])

    def keys(self, e: Expr) -> set[Key]:
        """Returns the sweeps whose results ``e`` uses."""
        if e in self.home:
            return {self.home[e]}
        if e.op == "lead":  # of what is stored, and loaded from the row below
            return set()
        return set().union(*(self.keys(a) for a in e.args)) if e.args else set()

    def clean(self, e: Expr, key: Key) -> bool:
        """Tells whether the sweep can compute ``e`` whole: no size change, no sum over its tiled dim."""
        if e.op in SIZED or (e.op in ROWS and (e.attr("dim") == key[1] or e.dims)):
            return False
        if e.op == "suffix":
            return not any(self.partial(a, key) for a in e.args)
        if e in self.home:
            return True
        return all(self.clean(a, key) for a in e.args)

    def partial(self, e: Expr, key: Key) -> bool:
        """Tells whether ``e`` is linear in sums over the tiled dim, so that tiles may store their shares."""
        if key[1] in e.dims:  # a program has no share of the others' elements
            return False
        if e.op in ("contract", "sum"):
            return e.attr("dim") == key[1] and not e.dims and all(self.clean(a, key) for a in e.args)
        if e.op == "suffix":
            return any(self.partial(a, self.side(a, key)) for a in e.args)
        if e.op == "spans":
            return self.partial(e.args[0], key)
        if e.op in ("add", "sub"):
            return all(self.partial(a, key) for a in e.args)
        if e.op == "neg":
            return self.partial(e.args[0], key)
        if e.op == "mul":
            a, b = e.args
            return (self.clean(a, key) and self.partial(b, key)) or (self.clean(b, key) and self.partial(a, key))
        return False

    def side(self, e: Expr, key: Key) -> Key:
        """Returns the sweep that computes one side of a suffix sum."""
        return next(iter(self.keys(e)), key)

    def store(self, e: Expr, key: Key, dtype: str = "") -> Expr:
        """Lets the sweep store ``e`` for a later kernel and returns the leaf that loads it."""
        if e not in self.temps:
            partial = key[1] if not self.clean(e, key) else ""
            whole = [a for n in E.reads(e, "suffix") for a in n.args if partial and a.args and not self.partial(a, self.side(a, key))]
            if whole:
                raise NotImplementedError(f"no Triton form for {e}: each tile's share of it would have all of {whole[0]}")
            name = f"{self.stem}{len(self.temps)}"
            buffer = Buffer(name, self.head, e.dims, True, dtype or ("input" if e.dims else "float32"), partial)
            self.sweeps[key].append(Store(buffer, e))
            self.temps[e] = buffer.leaf
        return self.temps[e]

    def kind(self, e: Expr) -> object:
        """Tells which sweep could store ``e``, and whether whole or in shares; an addend that none could is a kind of its own."""
        for key in self.keys(e) if len(self.keys(e)) == 1 else ():
            if self.clean(e, key):
                return key, "whole"
            if self.partial(e, key):
                return key, "shares"
        return e

    def frontier(self, e: Expr, dtype: str) -> Expr:
        """Rewrites ``e`` over what sweeps store, as much of it as they can compute."""
        keys = self.keys(e)
        if not keys:
            return e
        if len(keys) == 1:
            key = next(iter(keys))
            if self.clean(e, key) or self.partial(e, key):
                return self.store(e, key, dtype)
        terms = addends(e)
        if len(terms) > 1:
            groups: dict[object, list[Expr]] = {}
            for t in terms:
                groups.setdefault(self.kind(t), []).append(t)
            if len(groups) > 1:
                return E.add(*(self.frontier(E.add(*g), dtype) for g in groups.values()))
        return E.rebuild(e, tuple(self.frontier(a, dtype) for a in e.args))

    def fill(self, e: Expr, key: Key) -> Expr:
        """Gives a suffix sum in a sweep the reads that another sweep stored, and keeps the states that it meets."""

        def rule(n: Expr) -> Expr | None:
            if n.op != "suffix":
                return n if n.op == "readout" else None
            reads, writes = n.args
            states = [s for s, _ in closings(n)]
            for s in states:
                self.marks.setdefault(s, (False, key[1]))
            loaded = not self.keys(reads)  # of saved readouts: no sweep need store it, and its pairs are summed already
            # vectors that decay by themselves meet in pair sums alone, not one by one
            rows = loaded or any(self.states[s].decay_on(key[1]) for s in states)
            if not loaded:
                reads = reads if rows else Expr("spans", (reads,), dims=n.dims, head=n.head, token=True)
                reads = reads if self.side(reads, key) == key else self.store(reads, self.side(reads, key), "float32")
            attrs = (("reads", "rows" if rows else "spans"), *n.attrs)
            return Expr("suffix", (reads, writes), dims=n.dims, head=n.head, token=True, attrs=attrs)

        return E.rewrite(e, rule)

    def sums(self, given: tuple[State, ...]) -> list[Kernel]:
        """Makes a launch for each state that is a sum over all tokens and not among ``given``."""
        out = []
        for state in self.states.values():
            if state.causal or state in given:
                continue
            x, tile = (state.dims[0], state.dims[1]) if len(state.dims) == 2 else ("", (*state.dims, "")[0])
            inner = {
                (n.name, n.attr("dim")): carry_of(self.states[n.name], n.attr("dim"), updated=False)
                for w in state.writes
                for side in (w.row, w.col)
                for n in E.reads(side, "readout")
            }

            def lower(e: Expr, inner: dict[tuple[str, str], Carry] = inner) -> Expr:
                return self.lower(e, inner)

            carry = carry_of(state.map(lower), x)
            total = _total(state).name
            holds = (Hold(carry, "", total), *(Hold(c, f"total_{c.state}", "") for c in inner.values()))
            out.append(Kernel(f"{self.name}_{total}".lower(), "sweep", (), f"the sum of {state.name} over all tokens", tile, False, holds))
        return out

    def lower(self, e: Expr, carries: dict[tuple[str, str], Carry], solving: bool = False) -> Expr:
        """Lowers every readout in ``e`` over the given carries, and, where the sweep is ``solving``, what it solves."""

        def rule(n: Expr) -> Expr | None:
            if n.op == "lead":
                return n
            if solving and n in self.solved:
                state = self.solved[n]
                over = next(d for d in state.dims if d not in n.dims)
                if (state.name, over) in carries:
                    return self.lower(lower_solve(n, state, carries[state.name, over]), carries)
            if n.op != "readout":
                return None
            vector = self.lower(n.args[0], carries, solving)
            lowered = lower_readout(E.rebuild(n, (vector,)), self.states[n.name], carries[n.name, n.attr("dim")])
            return self.lower(lowered, carries, solving) if solving else lowered

        return E.rewrite(e, rule)

    def kernels(self, ends: dict[str, tuple[str, str]], given: tuple[State, ...], sunk: set[str]) -> tuple[Kernel, ...]:
        """Makes the launches: sums over all tokens, sweeps in order of need, then the finish; ``ends`` are the buffers of carries.

        A state's end is stored by the first sweep that carries it; ``sunk`` are those that have been. A sweep that solves what it also
        needs of the token after, or by way of another sweep, is split: it solves first.
        """
        sums = self.sums(given)
        matrices = {d for s in self.states.values() if len(s.dims) == 2 for d in s.dims}
        vectors = {s.dims[0] for s in self.states.values() if len(s.dims) == 1} - matrices
        finish = token_kernels(f"{self.name}_finish", self.finish, "what needs several sweeps, or sums over their tiles", vectors)
        sweeps = self.sweep_kernels(ends, frozenset(), set(sunk))
        circular = frozenset(k.tile_key for k in in_circles(sweeps))
        return (*sums, *beside(in_order(self.sweep_kernels(ends, circular, sunk)), self.name), *finish)

    def sweep_kernels(self, ends: dict[str, tuple[str, str]], split: frozenset[Key], sunk: set[str]) -> tuple[Kernel, ...]:
        """Makes the sweeps; those of ``split`` solve in a launch of their own."""
        out: list[Kernel] = []
        keys = sorted({**self.sweeps, **{k: [] for k in self.marks.values()}}, key=lambda k: k[0])
        for key, part in ((k, p) for k in keys for p in (("solve", "rest") if k in split else ("whole",))):
            solving = part != "rest"
            stores = self.sweeps.get(key, [])
            if part != "whole":
                stores = [s for s in stores if (s.value in self.solved) == solving]
            (way, tile), met = key, key[0] == MET
            reads = {r for leaf, s in self.solved.items() if self.home[leaf] == key for u in s.solves for r in u.reads}
            carries: dict[tuple[str, str], Carry] = {}
            for n in dict.fromkeys(n for n, k in self.home.items() if k == key and n.op == "readout" and (part != "solve" or n in reads)):
                state = self.states[n.name]
                updated = n.attr("at") != "all" and not met
                carries[n.name, n.attr("dim")] = carry_of(state, n.attr("dim"), updated)
            marked = [name for name, k in self.marks.items() if k == key and part != "solve"]
            for name in marked:  # a suffix sum meets the carry though nothing reads it
                if all(name != carried for carried, _ in carries):
                    x = next((d for d in self.states[name].dims if d != tile), "")
                    carries[name, x] = carry_of(self.states[name], x)
            if not carries:
                continue

            def lower(e: Expr, carries: dict[tuple[str, str], Carry] = carries, solving: bool = solving) -> Expr:
                return self.lower(e, carries, solving)

            holds = []
            for c in carries.values():
                kept = f"mark_{c.state}" if self.states[c.state].causal else f"total_{c.state}"
                source, sink = ends[c.state] if c.updated else (kept, "")
                holds.append(Hold(c.map(lower), source, "" if c.state in sunk else sink, f"mark_{c.state}" if c.state in marked else ""))
                if c.updated:
                    sunk.add(c.state)
            name = ("fwd", "rev", "met")[way] + ("_solve" if part == "solve" else "")
            made = Kernel(
                f"{self.name}_{name}_{tile or 'all'}".lower(),
                "sweep",
                # numbers before vectors: a sum over a vector is taken while it is there, and what is added to it later goes in place
                tuple(replace(s, value=split_spans(merge(lower(s.value)))) for s in sorted(stores, key=lambda s: len(s.value.dims))),
                f"readouts that keep {tile or 'nothing'}, {('in order', 'reversed', 'chunk by chunk')[way]}",
                tile,
                way == REVERSE,
                tuple(holds),
            )
            out.append(turn(made) if met else made)
        return tuple(out)
