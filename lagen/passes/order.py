"""Orders the launches of a pass by what they load of each other, and puts sweeps side by side that need nothing of each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import networkx as nx

from lagen.ir.expr import reads
from lagen.ir.plan import Kernel


def _needs(kernels: tuple[Kernel, ...]) -> nx.DiGraph:
    """Builds the graph of kernels: an edge from each one that stores a value to each one that loads it."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(kernels)))
    makers = {s.buffer.name: i for i, k in enumerate(kernels) for s in k.stores}
    for i, k in enumerate(kernels):
        graph.add_edges_from((makers[n.name], i) for v in k.values for n in reads(v, "stored") if n.name in makers)
    return graph


def in_circles(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Returns the kernels that need, of themselves or by way of others, what they store."""
    graph = _needs(kernels)
    found = {i for part in nx.strongly_connected_components(graph) if len(part) > 1 for i in part}
    found |= {i for i, _ in nx.selfloop_edges(graph)}
    return tuple(k for i, k in enumerate(kernels) if i in found)


def in_order(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Returns the kernels so that each comes after those whose values it loads; raises NotImplementedError in a circle."""
    circles = in_circles(kernels)
    if circles:
        raise NotImplementedError(f"no order of launches: {', '.join(k.name for k in circles)} need each other")
    return tuple(kernels[i] for i in nx.lexicographical_topological_sort(_needs(kernels)))


def apart(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Returns the kernels that need nothing of each other."""
    found = tuple(kernels)
    graph = _needs(found)
    return [k for i, k in enumerate(found) if not nx.ancestors(graph, i) and not nx.descendants(graph, i)]


def beside(kernels: Sequence[Kernel], stem: str) -> list[Kernel]:
    """Makes sweeps of one direction that run from chunk to chunk roles of one launch: what they load then crosses memory once.

    Those that load what another one stores stay launches of their own.
    """
    running = [k for k in kernels if k.stores and any(h.carry.updated for h in k.holds)]
    ways = {way: apart(k for k in running if k.reverse == way) for way in (False, True)}
    launches = {k: f"{stem}_{'rev' if way else 'fwd'}" for way, ks in ways.items() if len(ks) > 1 for k in ks}
    return [replace(k, launch=launches.get(k, "")) for k in kernels]
