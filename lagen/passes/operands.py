"""Chooses what crosses memory around the kernels that hold states: operands made before, values that the backward loads.

Also the kernels of such token-wise work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.expr import LEAVES, Expr, walk
from lagen.ir.plan import Buffer, Kernel, Store
from lagen.ir.recurrence import Adjoint, Recurrence, State
from lagen.passes.cut import cut

ROWS = ("contract", "sum", "mean", "rowmax")
SIZED = ("concat", "taylor2", "quad", "rename", "part", "untaylor2", "unquad", "outer")


def map_recurrence(r: Recurrence, f: Callable[[Expr], Expr]) -> Recurrence:
    """Returns a recurrence with ``f`` applied to what states take and to outputs."""
    return replace(r, states=tuple(s.map(f) for s in r.states), outputs=tuple((n, f(e)) for n, e in r.outputs))


def map_adjoint(a: Adjoint, f: Callable[[Expr], Expr]) -> Adjoint:
    """Returns a backward with ``f`` applied to what reverse states take and to gradients."""
    return replace(a, states=tuple(s.map(f) for s in a.states), gradients=tuple((n, f(e)) for n, e in a.gradients))


def operands_of(states: Iterable[State], roots: Iterable[Expr]) -> list[Expr]:
    """Lists what the sweeps take: decays, both sides of writes, vectors of readouts, what solved values start from.

    The sweep that solves has every dim whole but the one that the solved values have: what sums over another one needs no kernel.
    """
    out: list[Expr] = []
    for s in states:
        here = {u.base for u in s.solves if not any(n.op in SIZED or (n.op in ROWS and n.attr("dim") in u.leaf.dims) for n in walk(u.base))}
        out += [x for x in s.operands if x not in here]
    return out + [n.args[0] for r in roots for n in E.reads(r, "readout")]


def _bytes(n: Expr) -> float:
    """Estimates the bytes of a value per token and head, at 128 numbers of two bytes a dim."""
    return (4.0, 256.0, 65536.0)[len(n.dims)] if n.token else 1.0


def _named(nodes: Iterable[Expr], names: tuple[tuple[str, Expr], ...], stem: str, taken: set[str]) -> dict[Expr, str]:
    known = {e: n for n, e in names}
    out: dict[Expr, str] = {}
    for n in nodes:
        name = known.get(n, "")
        if not name or name in taken:
            name = next(f"{stem}{i}" for i in range(len(taken) + 1) if f"{stem}{i}" not in taken)
        taken.add(name)
        out[n] = name
    return out


def choose_prepared(
    wanted: list[Expr], names: tuple[tuple[str, Expr], ...], stem: str, taken: set[str], head: str = ""
) -> dict[Expr, Buffer]:
    """Chooses what is computed before the sweeps and stored, of the operands ``wanted``; on ``head`` where one is given."""
    chosen = cut(
        wanted,
        early=lambda n: n.op in ROWS + SIZED and len(n.dims) < 2 and not E.reads(n, "readout"),
        cost=lambda n: _bytes(n) if n.op in LEAVES else 2.2 * _bytes(n) + 4,
    )
    nodes = [n for n in walk(*wanted) if n in chosen and n.args and n.token and not E.reads(n, "readout")]
    named = _named(nodes, names, stem, taken)
    return {n: Buffer(named[n], head or n.head, n.dims, n.token, "input" if n.dims else "float32") for n in nodes}


def choose_saved(
    recurrence: Recurrence, adjoint: Adjoint, head: str, kept: Callable[[Expr], bool] = lambda readout: True
) -> dict[Expr, Buffer]:
    """Chooses which values that depend on forward readouts the backward loads; those that are not ``kept`` it makes again."""
    roots = [*(e for _, e in recurrence.outputs), *(x for s in recurrence.states for x in s.operands)]
    after = {n for n in walk(*roots) if any(map(kept, E.reads(n, "readout")))}
    wanted: list[Expr] = []

    def visit(n: Expr) -> Expr | None:
        if n not in after:
            return None
        wanted.append(n)
        return n

    crossing = {x for s in recurrence.states for x in s.operands if x in after}  # the stage after loads them
    for root in (*crossing, *(x for s in adjoint.states for x in s.operands), *(e for _, e in adjoint.gradients)):
        E.rewrite(root, visit)
    # a strict readout that the forward happens to have too is not "after": the backward's sweep computes it in passing
    outputs = {e: name for name, e in recurrence.outputs}
    chosen = cut(
        wanted,
        early=lambda n: n.op == "readout",
        cost=lambda n: _bytes(n) if n in outputs or n in crossing else 1.0 if n not in after else 2 * _bytes(n),
    )
    nodes = [n for n in walk(*wanted) if n in chosen and n in after]
    taken = {t.name for t in recurrence.inputs + recurrence.params} | set(outputs.values())
    names = _named([n for n in nodes if n not in outputs], recurrence.names, "y", taken)
    dims = {name: d for (name, _), d in zip(recurrence.outputs, recurrence.output_dims, strict=True)}
    return {
        n: Buffer(outputs[n], n.head, dims[outputs[n]], True, "input")
        if n in outputs
        else Buffer(names[n], head, n.dims, True, "input" if n.dims else "float32")
        for n in nodes
    }


def is_sized(n: Expr) -> bool:
    """Tells whether kernels that hold whole vectors leave an operation to torch: a vector changes its size in it."""
    return n.op in SIZED or (n.op == "contract" and bool(n.dims))


def serving(before: Iterable[Kernel], launched: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Returns those of the launches ``before`` that store what ``launched`` load."""
    loaded = {n.name for k in launched for v in k.values for n in E.reads(v, "stored")}
    return tuple(k for k in before if any(s.buffer.name in loaded for s in k.stores))


def token_kernels(name: str, stores: list[Store], why: str, wide: Iterable[str] = ()) -> tuple[Kernel, ...]:
    """Makes the kernel of token-wise stores, as torch operations where a vector changes its size; none where there is nothing.

    A dim of ``wide`` may have any size: stores that are all on it and sum over nothing have it on the grid.
    """
    if not stores:
        return ()
    nodes = list(walk(*(s.value for s in stores)))
    for d in wide:
        mine = [s for s in stores if s.buffer.dims == (d,)]
        if mine and {x for n in nodes for x in n.dims} == {d} and not any(n.op in ROWS + SIZED for n in nodes):
            rest = [s for s in stores if s not in mine]
            return (Kernel(name, "tokens", tuple(mine), why, d), *token_kernels(f"{name}_numbers", rest, why))
    sized = any(is_sized(n) for s in stores for n in walk(s.value))
    return (Kernel(name, "torch" if sized else "tokens", tuple(stores), why + ("; sizes change: torch operations" if sized else "")),)
