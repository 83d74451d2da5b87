"""Packs the inverse that a chunk is solved with above the diagonal of pair scores: both are triangles, and one table holds them.

Scores of later tokens with earlier ones are only looked at below the diagonal and on it, masked as they are used. The inverse of unit
lower triangular weights has ones on its diagonal; the rest of it lies transposed above that of the scores. A table less crosses memory.
"""

from __future__ import annotations

from dataclasses import replace

from lagen.ir.chunk import COL
from lagen.ir.expr import Expr, substitute
from lagen.ir.plan import Kernel, Plan, Store


def pack(plan: Plan) -> Plan:
    """Returns the plan with every inverse in a table of scores that the same launch stores, where there is one."""
    moved: dict[Expr, Expr] = {}
    tables: dict[str, Store] = {}  # by the buffer of the inverse that is gone

    def packed(k: Kernel) -> Kernel:
        inverses = [s for s in k.stores if s.value.op == "inverse"]
        scores = [s for s in k.stores if s.value.op == "gram" and len(s.value.args) == 3]
        stores = {s.buffer.name: s for s in k.stores}
        for inverse, score in zip(inverses, scores, strict=False) if len(scores) == 1 else ():  # beside more, no registers are left
            both = Expr("pack", (score.value, inverse.value), dims=(COL,), token=True)
            stores[score.buffer.name] = replace(score, value=both)
            del stores[inverse.buffer.name]
            tables[inverse.buffer.name] = score
            moved[inverse.buffer.leaf] = Expr("above", (score.buffer.leaf,), dims=(COL,), head=score.buffer.head, token=True)
        return replace(k, stores=tuple(stores.values()))

    forward, backward = (tuple(map(packed, kernels)) for kernels in (plan.forward, plan.backward))
    if not moved:
        return plan

    def load(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        return tuple(k.map(lambda e: substitute(e, moved)) for k in kernels)

    saved = {b.name: b for b in plan.saved}
    for name, table in tables.items():
        if saved.pop(name, None):
            saved[table.buffer.name] = table.buffer
    return replace(plan, forward=load(forward), backward=load(backward), borders=load(plan.borders), saved=tuple(saved.values()))
