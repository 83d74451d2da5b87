"""Chooses what to store and what to recompute: a minimum cut between what must be computed early and what is wanted late.

A node may be stored (its bytes are paid) or recomputed from what it is made of, unless it is fixed to the early side. The cut of
least bytes is exact (networkx, max-flow); arithmetic of token-wise nodes is counted as free beside global memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import networkx as nx

from lagen.ir.expr import Expr, walk

_FREE = ("const", "size", "scale")


def cut(wanted: Iterable[Expr], early: Callable[[Expr], bool], cost: Callable[[Expr], float]) -> set[Expr]:
    """Returns the nodes to load: every path from an early node or a leaf to a wanted one meets exactly the cheapest of them."""
    graph = nx.DiGraph()
    wanted = list(wanted)
    for n in walk(*wanted):
        if n.op in _FREE:
            continue
        graph.add_edge((n, "in"), (n, "out"), capacity=cost(n))
        if early(n) or not any(a.op not in _FREE for a in n.args):
            graph.add_edge("source", (n, "in"))
        for a in n.args:
            if a.op not in _FREE:
                graph.add_edge((a, "out"), (n, "in"))
    for n in wanted:
        if n.op not in _FREE:
            graph.add_edge((n, "out"), "sink")
    if "sink" not in graph or "source" not in graph:
        return set()
    _, (near, _) = nx.minimum_cut(graph, "source", "sink")
    return {n for n in walk(*wanted) if (n, "in") in near and (n, "out") not in near}
