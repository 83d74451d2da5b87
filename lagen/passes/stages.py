"""Stages: states that read other states stand in stages, one after the other; and what no sweep over chunks can carry."""

from __future__ import annotations

from lagen.ir import expr as E
from lagen.ir.expr import walk
from lagen.ir.recurrence import Recurrence


def staged(recurrence: Recurrence) -> bool:
    """This function tells whether a state is written, or read by a vector, that another state's readout makes."""
    inside = [x for s in recurrence.states for x in s.operands]
    vectors = [n.args[0] for _, e in recurrence.outputs for n in E.reads(e, "readout")]
    return any(E.reads(x, "readout") for x in (*inside, *vectors))


def unswept(recurrence: Recurrence) -> str:
    """This function says what in a variant has no form as sweeps over chunks; "" where all has."""
    for s in recurrence.states:
        for u in s.solves:
            return f"no Triton form for a correction yet: {u}"
        if s.peak:
            return f"no Triton form for the peak {s.name}"
        if s.dense:
            return f"no Triton form for the dense decay of {s.name}"
        if s.causal and any(n.op == "readout" for x in s.operands for n in walk(x)):
            return f"no Triton form for {s.name}, which reads other states"
    for n in walk(*(e for _, e in recurrence.outputs)):
        if n.op == "readout" and any(x.op == "readout" for a in n.args for x in walk(a)) and n.attr("at") != "all":
            return f"no Triton form for {n.name} read by what another state gives"
    return ""
