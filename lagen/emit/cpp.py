"""Prints a Recurrence and its Adjoint as one C++ file with a C interface: lagen_forward, lagen_backward and lagen_step.

The algebra comes from emit/cpp_plan, in loops and sweeps over a tile of tokens, and emit/cpp_direction prints it; the templates in
templates/cpp own the vectors, the sweeps and the walk over tokens. Sizes are read at run time, so one file serves every K and V.
"""

from __future__ import annotations

import jinja2

from lagen import data
from lagen.emit.cpp_direction import PrintedDirection, PrintedPass, print_direction
from lagen.emit.cpp_fit import Fallback
from lagen.emit.cpp_plan import EVERY, Program, Sweep, plan_backward, plan_forward, split_dim, tile
from lagen.ir.expr import Expr, number
from lagen.ir.recurrence import Adjoint, Recurrence


def render_cpp(recurrence: Recurrence, adjoint: Adjoint, header: str = "") -> str | Fallback:
    """Prints the C++ of a variant, or says why it runs through the torch evaluation. ``header`` is comment text."""
    forward, backward = plan_forward(recurrence), plan_backward(adjoint)
    if isinstance(forward, Fallback):
        return forward
    present = set[str]() if isinstance(backward, Fallback) else backward.given
    directions = [print_direction(recurrence, forward, "forward")]
    if not isinstance(backward, Fallback):
        directions.append(print_direction(recurrence, backward, "backward"))
    step = print_direction(recurrence, forward, "step") if in_place(forward) else None
    split = split_dim(recurrence, forward)
    return _fill(
        "operator.cpp.j2",
        name=recurrence.name,
        header=[line.rstrip() for line in header.splitlines()],
        formula=str(recurrence).splitlines(),
        sizes=_sizes(recurrence),
        inputs=[t.name for t in recurrence.inputs],
        params=[t.name for t in recurrence.params],
        states=[s.name for s in recurrence.states],
        outputs=[n for n, _ in recurrence.outputs],
        causal=all(s.causal for s in recurrence.states),
        split=split,
        split_index=_dims(recurrence).index(split) if split else -1,
        tile=tile(forward),
        every=EVERY if isinstance(backward, Fallback) else backward.every,
        absent=sum(1 << i for i, t in enumerate(recurrence.inputs + recurrence.params) if t.name not in present),
        directions=directions,
        shared=_shared([*directions[:1], *([step] if step else [])], directions[1:]),
        step=step,
    )


def _shared(forward: list[PrintedDirection], backward: list[PrintedDirection]) -> int:
    """Returns how many passes of the backward are compiled beside forward and step, so that two compilers have as much to do."""

    def lines(p: PrintedPass) -> int:
        return len(p.before) + len(p.body) + len(p.after)

    here = sum(lines(p) for d in forward for p in d.passes)
    passes = [lines(p) for d in backward for p in d.passes]
    return min(range(max(1, len(passes))), key=lambda n: max(here + sum(passes[:n]), sum(passes[n:])))


def in_place(forward: Program) -> bool:
    """Tells whether a token's step can write the states where they stand: each is swept once, by the heads that own it."""
    sweeps = [s for p in forward.passes for s in p.steps if isinstance(s, Sweep)]
    swept = [s.state.name for s in sweeps]
    return (
        len(forward.passes) == 1 and len(set(swept)) == len(swept) and all(s.state.causal and s.state.head == forward.head for s in sweeps)
    )


def render_sweeps() -> str:
    """Prints what the C++ of every variant includes as ``_sweeps.h``."""
    return _fill("sweeps.h.j2")


def whole(text: str) -> str:
    """Puts what a printed file includes into it."""
    return text.replace('#include "_sweeps.h"\n', render_sweeps())


def _fill(template: str, **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data.templates() / "cpp"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values).rstrip() + "\n"


def fallback(recurrence: Recurrence, adjoint: Adjoint) -> tuple[str, str]:
    """Returns why forward and backward of a variant run through the torch evaluation on the CPU; "" where generated C++ carries them."""
    forward, backward = plan_forward(recurrence), plan_backward(adjoint)
    reason = forward.reason if isinstance(forward, Fallback) else ""
    return reason, reason or (backward.reason if isinstance(backward, Fallback) else "")


def _dims(recurrence: Recurrence) -> list[str]:
    """Lists the dims whose sizes the caller hands over, in the order of the call."""
    derived = {n for n, _ in recurrence.sizes}
    tensors = recurrence.inputs + recurrence.params
    return list(dict.fromkeys(d for t in tensors for d in t.dims if d not in derived))


def _sizes(recurrence: Recurrence) -> list[tuple[str, str]]:
    """Lists every dim with the C++ that gives its size; "" where the caller does."""
    return [(d, "") for d in _dims(recurrence)] + [(d, _integer(e)) for d, e in recurrence.sizes]


def _integer(e: Expr) -> str:
    if e.op == "const":
        return number(e.value)
    if e.op == "size":
        return f"z.size_{e.name}"
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    if e.op == "pow" and e.value == 2.0:
        return f"({_integer(e.args[0])} * {_integer(e.args[0])})"
    assert e.op in signs, f"no integer form of {e}"
    return f"({_integer(e.args[0])} {signs[e.op]} {_integer(e.args[1])})"
