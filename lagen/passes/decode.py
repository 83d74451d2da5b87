"""Plans the decode step: one kernel that holds every state, the dim that nothing sums over on the grid."""

from __future__ import annotations

from collections.abc import Sequence

from lagen.ir import expr as E
from lagen.ir.expr import HEADS, Expr, walk
from lagen.ir.plan import Buffer, Kernel, Store
from lagen.ir.recurrence import Recurrence, State
from lagen.passes.operands import ROWS, is_sized, map_recurrence, operands_of


def plan_step(recurrence: Recurrence, prepared: dict[Expr, Buffer], outputs: dict[str, Buffer], head: str) -> tuple[Kernel, ...]:
    """Plans the launches of a step; ``prepared`` is what sweeps load, ``head`` the programs'.

    A step has every dim whole but the one on the grid, and sums over them itself: of what is prepared it loads only what changes the
    size of a vector, or sums over the grid's dim. A state that several programs read is written by a later launch, once all have.
    """
    core = _loading(recurrence, prepared)
    roots = [e for _, e in core.outputs]
    summed = {n.attr("dim") for n in walk(*roots, *operands_of(core.states, roots)) if n.op in (*ROWS, "readout")}
    tile = next((d for s in core.states for d in s.dims if d not in summed), "")

    def loaded(n: Expr) -> bool:
        return any(is_sized(x) or (x.op in ROWS and x.attr("dim") == tile) for x in walk(n))

    core = _loading(recurrence, {n: b for n, b in prepared.items() if loaded(n)})
    stores = tuple(Store(outputs[name], e) for name, e in core.outputs)
    step = Kernel("step", "step", stores, "one token, states in place", tile, states=core.states)
    shared = tuple(s for s in core.states if (tile and tile not in s.dims) or s.head != head)
    groups = dict.fromkeys((s.head, tile if tile in s.dims else "") for s in shared)
    order = sorted(groups, key=lambda group: (HEADS.index(group[0]), group[1]), reverse=True)  # what is read is written later
    return step, *(_written_after(core.states, [s for s in shared if (s.head, tile if tile in s.dims else "") == g], g[1]) for g in order)


def _written_after(states: Sequence[State], mine: Sequence[State], tile: str) -> Kernel:
    """Makes the launch that advances states of one head, a program for each tile; what they read of others is read once more."""
    held = {s.name for s in mine}
    for s in reversed(states):  # a state reads earlier ones
        held |= {n.name for x in s.operands for n in E.reads(x, "readout")} if s.name in held else set()
    name, why = "_".join(s.name for s in mine).lower(), "what several programs of the step read, once all have"
    return Kernel(f"step_{name}", "step", (), why, tile, states=tuple(s for s in states if s.name in held))


def _loading(recurrence: Recurrence, prepared: dict[Expr, Buffer]) -> Recurrence:
    """Returns a recurrence that loads what is prepared."""
    table = {n: b.leaf for n, b in prepared.items()}
    return map_recurrence(recurrence, lambda e: E.substitute(e, table))
