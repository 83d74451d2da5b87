"""Stages: states that read other states stand in stages, one after the other, and what crosses between them is stored.

A readout's *depth* is 0 where its vector and its state take nothing but what is loaded, and one more than the deepest readout that
they take otherwise. Stage by stage, in order of depth, the sweeps store what deeper ones take; the last stage gives the targets. A
target of several depths is taken apart where depths meet, so that no sweep runs twice for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lagen.ir import expr as E
from lagen.ir.expr import Expr, addends, walk
from lagen.ir.plan import Buffer
from lagen.ir.recurrence import State

Target = tuple[Buffer, Expr]


@dataclass(frozen=True)
class Stage:
    """States whose operands are loaded by now, and what is stored of their readouts."""

    states: tuple[State, ...]
    targets: tuple[Target, ...]


class _Depths:
    """The depth of every value; -1 where it takes no readout.

    What a state solves is stored by the stage of its readouts, and other sweeps of that stage may load it: launches find their order.
    """

    def __init__(self, states: Iterable[State]) -> None:
        self.states = {s.name: s for s in states}
        self.solving = {u.leaf: s for s in self.states.values() for u in s.solves}
        self.known: dict[Expr, int] = {}

    def given(self, s: State) -> list[Expr]:
        """Lists what a state takes and does not solve itself."""
        return [x for x in s.operands if self.solving.get(x) is not s]

    def of(self, e: Expr) -> int:
        if e not in self.known:
            below = max((self.of(a) for a in e.args), default=-1)
            if e.op == "readout" and e.attr("at") == "all":  # sums over all tokens are made before any sweep
                below = max(below, 0)
            elif e.op == "readout":
                below = max(below, *(self.of(x) for x in self.given(self.states[e.name])), -1) + 1
            elif e in self.solving:
                below = max([self.of(x) for x in self.given(self.solving[e])])
            self.known[e] = below
        return self.known[e]

    def solved(self, e: Expr) -> list[Expr]:
        """Lists what ``e`` takes of what states solve."""
        return [n for n in walk(e) if n in self.solving] if self.solving else []

    def stage(self, e: Expr) -> int:
        """Returns the first stage whose launches can store ``e``."""
        return max(self.of(e), *(self.of(u) + 1 for u in self.solved(e)), 0)


def stages(states: tuple[State, ...], targets: list[Target], head: str, taken: set[str]) -> tuple[Stage, ...]:
    """This function deals ``targets`` out to stages; buffers of what crosses get names that are not ``taken``."""
    depths = _Depths(states)
    top = max([depths.stage(e) for _, e in targets] + [0])
    if top == 0:
        return (Stage(states, tuple(targets)),)
    crossing: dict[Expr, Buffer] = {}
    given = {e: b for b, e in targets}

    def cross(e: Expr, exact: bool) -> None:
        if e in crossing or depths.of(e) < 0:
            return
        if depths.stage(e) > depths.of(e):  # it takes what a deeper stage solves, and stores
            for a in e.args:
                cross(a, exact)
        else:
            name = next(f"s{i}" for i in range(len(taken) + 1) if f"s{i}" not in taken)
            taken.add(name)
            dtype = "float32" if exact or not e.dims or E.reads(e, "suffix") else "input"
            crossing[e] = given.get(e) or Buffer(name, head, e.dims, True, dtype)

    def divide(e: Expr, depth: int) -> None:
        """Lets what of a target is made before ``depth`` cross."""
        mine = depths.of(e)
        if 0 <= mine < depth:
            cross(e, False)
            return
        terms = addends(e)
        if len(terms) > 1 and mine == depth:
            for t in terms:
                divide(t, depth)
        elif mine == depth and e.op == "suffix":
            if depths.of(e.args[0]) < depth:  # its reads cross whole: a sweep takes all their pairs, or none
                divide(e.args[0], depth)
        elif mine == depth and e.op != "readout":
            for a in e.args:
                divide(a, depth)

    for s in states:
        for x in depths.given(s) if s.causal else ():
            cross(x, x in s.decay)
    for n in walk(*(e for _, e in targets), *crossing):
        if n.op == "readout" and n.attr("at") != "all":
            cross(n.args[0], False)
    for _, e in (*targets, *((b, e) for e, b in list(crossing.items()))):
        divide(e, depths.of(e))
    out: list[Stage] = []
    table: dict[Expr, Expr] = {}
    for level in range(top + 1):
        made = {e: b for e, b in crossing.items() if depths.of(e) == level}
        wanted = [(b, e) for e, b in made.items()]
        wanted += [(b, e) for b, e in targets if e not in made and depths.stage(e) == level]

        def loaded(e: Expr, table: dict[Expr, Expr] = table) -> Expr:
            return E.substitute(e, table)

        ready = (s.map(loaded) for s in states if not s.causal or all(depths.of(x) < level for x in depths.given(s)))
        fresh = [s if all(depths.stage(u.leaf) == level for u in s.solves) else replace(s, solves=()) for s in ready]  # solved once
        out.append(Stage(tuple(fresh), tuple((b, loaded(e)) for b, e in wanted)))
        table = table | {e: b.leaf for e, b in made.items()}
    return _used(out, {b for b, _ in targets})


def _used(found: list[Stage], targets: set[Buffer]) -> tuple[Stage, ...]:
    """Leaves out what crosses and no later stage loads: where a sum crosses, its addends need not."""
    out: list[Stage] = []
    loaded: set[Expr] = set()
    for stage in reversed(found):
        kept = tuple((b, e) for b, e in stage.targets if b in targets or b.leaf in loaded)
        out.append(replace(stage, targets=kept))
        loaded.update(walk(*(e for _, e in kept), *(x for s in stage.states for x in s.operands)))
    return tuple(reversed(out))
