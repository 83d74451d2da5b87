"""Names that kernels and launchers have for themselves, and the renaming of tensors that are called alike."""

from __future__ import annotations

from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Adjoint, Recurrence
from lagen.ir.variant import Tensor

_RESERVED = {
    "B",
    "T",
    "H",
    "HV",
    "G",
    "BT",
    "DT",
    "NY",
    "NC",
    "NSEG",
    "SEG",
    "LEVELS",
    "PRECISION",
    "pid",
    "i",
    "i_b",
    "i_c",
    "i_h",
    "i_hv",
    "i_s",
    "j",
    "ROWS",
    "i_y",
    "i_n",
    "i_r",
    "i_o",
    "APART",
    "apart",
    "c_0",
    "r_0",
    "first",
    "last",
    "bos",
    "count",
    "cu_seqlens",
    "NSEQ",
    "cut",
    "slots",
    "made",
    "torch",
    "triton",
    "tl",
    "inputs",
    "params",
    "scale",
    "saved",
    "outputs",
    "states",
    "closed",
    "dtype",
    "device",
}


def rename_reserved(r: Recurrence, a: Adjoint) -> tuple[Recurrence, Adjoint]:
    """This function gives another name to tensors that are called like one of the kernels' own; callers pass them by place."""
    table = {t.name: f"{t.name}_" for t in r.inputs + r.params if t.name in _RESERVED or t.name[:2] in ("o_", "b_", "p_", "m_", "e_", "t_")}
    if not table:
        return r, a

    def leaf(e: Expr) -> Expr:
        return E.rewrite(e, lambda n: replace(n, name=table[n.name], _hash=0) if n.op in ("input", "param") and n.name in table else None)

    def tensors(ts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(t, name=table.get(t.name, t.name)) for t in ts)

    r = replace(
        r,
        inputs=tensors(r.inputs),
        params=tensors(r.params),
        states=tuple(s.map(leaf) for s in r.states),
        outputs=tuple((n, leaf(e)) for n, e in r.outputs),
        names=tuple((n, leaf(e)) for n, e in r.names),
    )
    gradients = tuple((table.get(n, n), leaf(e)) for n, e in a.gradients)
    return r, replace(a, recurrence=r, states=tuple(s.map(leaf) for s in a.states), gradients=gradients)
