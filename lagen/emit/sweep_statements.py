"""Statements of a sweep: those of a chunk, and what lives across chunks or meets there."""

from __future__ import annotations

from collections.abc import Iterable

from lagen.emit.peaks import peak_tile
from lagen.emit.statements import Statements, Tile, finite
from lagen.ir.chunk import COL, ROW
from lagen.ir.expr import Expr
from lagen.ir.plan import Kernel


class SweepStatements(Statements):
    """Statements of a sweep: those of a chunk, and what lives across chunks."""

    def __init__(self, kernel: Kernel, names: Iterable[tuple[str, Expr]], roots: Iterable[Expr]) -> None:
        super().__init__(names, roots, chunked=not kernel.parallel)
        self.kernel = kernel
        self.meetings: dict[Expr, str] = {}  # of a suffix sum: the pairs around the chunk

    def make_spans(self, n: Expr) -> Tile:
        """Prints for every token the pairs that it lies between, as far as readers and their chunk give them."""
        self.prelude.add("lg_spans")
        total, carried = self.wide(n.args[0]), self.guarded(n.args[1])
        texts = []
        for weight, pairs, meeting in zip(n.args[2::3], n.args[3::3], n.args[4::3], strict=True):
            weights = self.weights(Expr("mix", (weight, pairs), token=True))
            texts.append(f"{weights.text} * {self.spread(self.wide(meeting), (ROW, COL))}")
        text = " + ".join(texts)
        if not all(map(finite, n.args[2:])):
            text = f"tl.where(m_t[:, None], {text}, 0.0)"
        met = self.let("b_M", text, (ROW, COL))
        return self.let("b_spans", f"lg_spans({total.text}, {carried.text}, {met.text}, BT, DT, PRECISION)", (ROW,))

    def make_contract(self, n: Expr) -> Tile:
        """Prints an inner product; where a program has one chunk, of loaded vectors by a matmul: as products they would not fit."""
        a, b = n.args
        if self.kernel.parallel and a.dims != (self.kernel.tile,) and all(x.op in ("input", "stored", "lead") and x.token for x in n.args):
            return self.diagonal(Expr("gram", (a, b), dims=(COL,), token=True))
        return super().make_contract(n)

    def make_peak(self, n: Expr) -> Tile:
        """Prints a running maximum at every token."""
        return peak_tile(self, n)

    def make_suffix(self, n: Expr) -> Tile:
        """Prints a log-decay's gradient: what readers give, what the chunk's writers gave those after it, what spans the chunk."""
        far, axes = self.meetings[n], (ROW, *n.dims)
        met = self.spread(Tile(far, n.dims), axes)
        if n.dims:
            self.prelude.add("lg_suffix_rows")
            carried, inside = self.guarded(n.args[1]), self.wide(n.args[0])
            return self.let("b_dg", f"lg_suffix_rows({inside.text}, {carried.text}, {met}, BT, DT, PRECISION)", axes)
        self.prelude.add("lg_suffix")
        reads, carried, rest = self.wide(n.args[0]), self.guarded(n.args[1]), self.guarded(n.args[2])
        paired = "DT == tl.float32" if n.attr("reads") == "spans" else "False"
        return self.let("b_dg", f"lg_suffix({reads.text}, {carried.text}, {rest.text}, {met}, BT, {paired})", axes)
