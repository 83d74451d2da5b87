"""Stages: states that read other states stand in stages, one after the other, and what crosses between them is stored.

A readout's *depth* is 0 where its vector and its state take nothing but what is loaded, and one more than the deepest readout that
they take otherwise. Stage by stage, in order of depth, the sweeps store what deeper ones take; the last stage gives the targets. A
target of several depths is taken apart where depths meet, so that no sweep runs twice for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lagen.ir import expr as E
from lagen.ir.expr import Expr, addends, walk
from lagen.ir.plan import Buffer
from lagen.ir.recurrence import Recurrence, State

Target = tuple[Buffer, Expr]


@dataclass(frozen=True)
class Stage:
    """States whose operands are loaded by now, and what is stored of their readouts."""

    states: tuple[State, ...]
    targets: tuple[Target, ...]


def unswept(recurrence: Recurrence) -> str:
    """This function says what in a variant has no form as sweeps over chunks; "" where all has."""
    for s in recurrence.states:
        if s.dense:
            return f"no Triton form for the dense decay of {s.name}"
    return ""


class _Depths:
    """The depth of every value; -1 where it takes no readout."""

    def __init__(self, states: Iterable[State]) -> None:
        self.states = {s.name: s for s in states}
        self.known: dict[Expr, int] = {}

    def of(self, e: Expr) -> int:
        if e not in self.known:
            below = max((self.of(a) for a in e.args), default=-1)
            if e.op == "readout" and e.attr("at") != "all":  # sums over all tokens are made before any sweep
                below = max(below, *(self.of(x) for x in self.states[e.name].operands), -1) + 1
            elif e.op == "readout":
                below = max(below, 0)
            self.known[e] = below
        return self.known[e]


def stages(states: tuple[State, ...], targets: list[Target], head: str, taken: set[str]) -> tuple[Stage, ...]:
    """This function deals ``targets`` out to stages; buffers of what crosses get names that are not ``taken``."""
    depths = _Depths(states)
    top = max([depths.of(e) for _, e in targets] + [0])
    if top == 0:
        return (Stage(states, tuple(targets)),)
    crossing: dict[Expr, Buffer] = {}
    given = {e: b for b, e in targets}

    def cross(e: Expr, exact: bool) -> None:
        if e not in crossing and depths.of(e) >= 0:
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
        elif mine == depth and e.op != "readout":
            for a in e.args[:1] if e.op == "suffix" else e.args:  # a suffix sum runs in the reverse sweep of its writes
                divide(a, depth)

    for s in states:
        for x in s.operands if s.causal else ():
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
        wanted += [(b, e) for b, e in targets if e not in made and max(depths.of(e), 0) == level]

        def loaded(e: Expr, table: dict[Expr, Expr] = table) -> Expr:
            return E.substitute(e, table)

        ready = tuple(s.map(loaded) for s in states if not s.causal or all(depths.of(x) < level for x in s.operands))
        out.append(Stage(ready, tuple((b, loaded(e)) for b, e in wanted)))
        table = table | {e: b.leaf for e, b in made.items()}
    return tuple(out)
