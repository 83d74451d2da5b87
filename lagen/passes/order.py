"""Orders the launches of a pass by what they load of each other, and puts sweeps side by side that need nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import networkx as nx

from lagen.ir.expr import reads
from lagen.ir.plan import Kernel
from lagen.ir.recurrence import closings


def _needs(kernels: Sequence[Kernel]) -> nx.DiGraph:
    """Builds the graph of launches, each named by its first kernel: an edge from each one that stores a value to each that loads it."""
    first: dict[str, int] = {}
    unit = {i: first.setdefault(k.launch, i) if k.launch else i for i, k in enumerate(kernels)}
    graph = nx.DiGraph()
    graph.add_nodes_from(unit.values())
    makers = {s.buffer.name: unit[i] for i, k in enumerate(kernels) for s in k.stores}
    makers |= {h.mark: unit[i] for i, k in enumerate(kernels) for h in k.holds if h.mark}
    for i, k in enumerate(kernels):
        needed = [n.name for v in k.values for n in reads(v, "stored")] + [h.source for h in k.holds]
        needed += [f"mark_{s}" for v in k.values for n in reads(v, "suffix") for s, _ in closings(n)]
        graph.add_edges_from((makers[name], unit[i]) for name in needed if name in makers)
    return graph


def in_circles(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Returns the launches that need, of themselves or by way of others, what they store; of roles the first."""
    graph = _needs(kernels)
    found = {i for part in nx.strongly_connected_components(graph) if len(part) > 1 for i in part}
    found |= {i for i, _ in nx.selfloop_edges(graph)}
    return tuple(k for i, k in enumerate(kernels) if i in found)


def in_order(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Returns the kernels so that each comes after those whose values it loads; raises NotImplementedError in a circle."""
    circles = in_circles(kernels)
    if circles:
        raise NotImplementedError(f"no order of launches: {', '.join(k.name for k in circles)} need each other")
    units = nx.lexicographical_topological_sort(_needs(kernels))
    return tuple(k for i in units for j, k in enumerate(kernels) if j == i or (k.launch and k.launch == kernels[i].launch))


def beside(kernels: Sequence[Kernel], stem: str) -> tuple[Kernel, ...]:
    """Makes sweeps of one direction that run from chunk to chunk roles of one launch: what they load then crosses memory once.

    Where one of them loads what another one stores, if only by way of a third, they stay launches of their own.
    """
    out = tuple(kernels)
    for way in (False, True):
        running = [k for k in kernels if k.reverse == way and k.stores and any(h.carry.updated for h in k.holds)]
        name = f"{stem}_{'rev' if way else 'fwd'}"
        joined = tuple(replace(k, launch=name) if k in running else k for k in out)
        if len(running) > 1 and not in_circles(joined):
            out = joined
    return out
