"""ChunkGraph: what one chunk of C tokens computes, as expressions over tiles.

The rows of a tile are the chunk's tokens (``token``); the dim COL means the same tokens as columns. Besides the token-wise ops of
ir/expr.py there are:

    carry        S as the chunk begins (forward) or as its end meets what later chunks wrote (reverse)          [X, Y]
    start(g)     exp(b), b = cumsum(g) in the chunk, inclusive; prev: exp(b - g)                                 [C, ..]
    end(g)       exp(b_C - b)                                                                                    [C, ..]
    whole(g)     exp(b_C)                                                                                        [..]
    col(x)       a token's number as a column                                                                   [D]
    pairs(g)     exp(b_i - b_j) where j <= i, else 0 (strict: j < i; reverse: rows are the earlier tokens)        [C, C]
    gram(r, n)   r n^T over X; with a gate on X each term carries exp(b_i - b_j) (dyadic anchors)                 [C, C]
    flip(A)                  pair scores with rows and columns exchanged                                          [C, C]
    diag(A)                  what each token scores with itself                                                   [C]
    mix(W, P, f) (W * P) f over D; with a gate on Y each term carries exp(b_i - b_j) (dyadic anchors)             [C, Y]
    twins(a, b, r, w, n, g)  the table n a b^T of readers and earlier writers: readers(..) is what readers sum of w,
                             writers(..) what writers sum of r, both under exp(b_i - b_j), in the same matmuls;
                             of several twins what they sum together                                              [C, Y]
    between(t, ..)           r * readers(t) - w * writers(t) of twins, each pair rounded alike: the chunk's sum is 0 [C, Y]
    lag(x)                   x of the token before; 0 for a chunk's first token                                   [C, Y]
    inter(r, S)              r S over X                                                                          [C, Y]
    peak(a, b, m)            max(m + a, b) token after token, from the carry m                                    [C, ..]
    weigh(W, P)              W * P: what each token reads of another's write                                     [C, C]
    inverse(A)               (I - A)^-1 of strictly lower weights                                                [C, C]
    pack(A, T)               A on the diagonal and below it, a unit lower T transposed above                      [C, C]
    above(A)                 the unit lower table that was packed above the diagonal of A                         [C, C]
    compose(P, Q)            P Q over the tokens                                                                 [C, C]
    tail(x)                  the sum of x over the chunk's tokens from each one on                                [C, ..]
    spans(x)                 sum over the chunk's pairs (reader i, earlier writer) in x with i >= t > writer     [C, ..]
    suffix(x, y)             as in ir/recurrence.py; a forward sweep made x: as it is (reads=rows), or spans(x)  [C, ..]

What spans and suffix take is split by passes/spans: spans(x, c, w, P, m, ...) into all of it, what the carry gives every reader, and for
each pair sum its weights, pairs, and what reader and writer make when they meet; suffix(x, c, r) into what the carry gives every writer,
and all of it; of a vector: suffix(x, c), x what the pairs with readers in the chunk give. Pairs around the whole chunk are the inner
product of the state as it begins, which a forward sweep kept (``mark``), with the reverse state at its end.

Every exponent is <= 0. What it is not: no memory and no kernels. Who makes it: passes/chunk. Who reads it: passes/plan, emit/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import networkx as nx

from lagen.ir.expr import Expr, show, walk

ROW, COL = "@", "#"
"""The axes of a chunk's tokens, as rows and as columns; no dim of a spec can have these names."""

SIDES = ("readers", "writers", "between")
"""What is taken of twins."""

TILE_OPS = (
    *("carry", "start", "end", "whole", "pairs", "gram", "flip", "mix", "inter", "col", "peak", "spans", "tail", "diag"),
    *("weigh", "inverse", "compose", "twins", *SIDES, "lag", "pack", "above"),
)


SQUARES = ("inverse", "compose", "add")
"""Ops that the blocks of an inverse have on top."""


def is_square(e: Expr) -> bool:
    """Tells whether a value is pair scores, or a block of an inverse."""
    return e.op in ("gram", "pack", *SQUARES) and COL in e.dims


def is_leveled(e: Expr) -> bool:
    """Tells whether a value goes through the levels of the dyadic anchors: pair scores and sums under a decay, its last operand."""
    return (e.op == "gram" and len(e.args) == 3) or (e.op == "mix" and len(e.args) == 4) or e.op == "twins"


@dataclass(frozen=True)
class Term:
    """One product n^T f that is added to a carry: ``near`` [C, X] or [C], ``far`` [C, Y] or [C]; numbers stand in either."""

    near: Expr
    far: Expr


@dataclass(frozen=True)
class Carry:
    """A state as a sweep holds it: [X, Y] with X contracted by the sweep's readouts and Y left; either may be "".

    ``factors`` are the whole(g) by which it shrinks over a chunk. ``updated`` is false where the sweep only reads it (all tokens' sum).
    """

    state: str
    x: str
    y: str
    reverse: bool
    factors: tuple[Expr, ...]
    terms: tuple[Term, ...]
    updated: bool = True
    peak: Expr | None = None  # of a running maximum: what it is after each token of the chunk

    @property
    def value(self) -> Expr:
        """Returns the carry as an operand."""
        return Expr("carry", name=self.state, dims=tuple(sorted(d for d in (self.x, self.y) if d)))

    def map(self, f: Callable[[Expr], Expr]) -> Carry:
        """Returns the carry with ``f`` applied to what it shrinks by and what is added to it."""
        return replace(self, factors=tuple(map(f, self.factors)), terms=tuple(Term(f(t.near), f(t.far)) for t in self.terms))

    def __str__(self) -> str:
        if not self.updated:
            return f"{self.state} [{self.x}, {self.y}] given"
        if self.peak is not None:
            return f"{self.state} [{self.y}] <- {show(self.peak)} after the last token"
        factor = "".join(f"{f} * " for f in self.factors)
        return f"{self.state} [{self.x}, {self.y}] <- {factor}{self.state}" + "".join(f" + ({t.near})^T ({t.far})" for t in self.terms)


def chunk_graph(roots: dict[str, Expr]) -> nx.DiGraph:
    """Builds the DAG of a chunk: a node per value with its printed form, an edge from operand to user."""
    graph = nx.DiGraph()
    for name, root in roots.items():
        for node in walk(root):
            graph.add_node(node, text=show(node))
            for a in node.args:
                graph.add_edge(a, node)
        graph.nodes[root]["output"] = name
    return graph
