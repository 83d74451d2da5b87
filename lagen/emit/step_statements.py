"""Statements of a single token, for the step kernel."""

from __future__ import annotations

from collections.abc import Iterable

from lagen.emit.statements import Statements, Tile
from lagen.ir.expr import ONE, Expr
from lagen.ir.recurrence import State


class StepStatements(Statements):
    """Statements of a single token: states are tiles, readouts are sums."""

    def __init__(self, names: Iterable[tuple[str, Expr]], roots: Iterable[Expr], states: dict[str, State]) -> None:
        super().__init__(names, roots, rows=False)
        self.states = states

    def axes(self, n: Expr) -> tuple[str, ...]:
        """Returns the axes of the tile of ``n``: a matrix lies as the state that it decays."""
        return next((s.dims for s in self.states.values() if len(n.dims) == 2 and set(s.dims) == set(n.dims)), super().axes(n))

    def make_outer(self, n: Expr) -> Tile:
        """Prints the matrix of two vectors' products."""
        axes = self.axes(n)
        return self.let("b_w", " * ".join(self.spread(self.wide(a), axes) for a in n.args), axes)

    def make_readout(self, n: Expr) -> Tile:
        """Prints a readout of the state before, after, or just decayed."""
        state, dim, at = self.states[n.name], n.attr("dim"), n.attr("at")
        held = f"b_{state.name}" + {"previous": "", "decayed": "_d", "now": "_n"}[at]
        axes = state.dims
        vector = self.wide(n.args[0])
        if not dim:
            text = held if n.args[0] == ONE else f"{self.spread(vector, axes)} * {held}"
            return self.let("b_r", text, axes)
        rest = tuple(d for d in axes if d != dim)
        clean = self.guarded(n.args[0])
        return self.let("b_r", f"tl.sum({self.spread(clean, axes)} * {held}, axis={axes.index(dim)})", rest)
