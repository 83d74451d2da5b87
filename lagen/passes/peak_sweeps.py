"""Peaks as launches: each is scanned first, in the max-plus sense, and stored; to all other launches it is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from lagen.ir import expr as E
from lagen.ir.chunk import Carry
from lagen.ir.expr import Expr, walk
from lagen.ir.plan import Buffer, Hold, Kernel, Store
from lagen.ir.recurrence import State


def peak_sweeps(states: tuple[State, ...], roots: Iterable[Expr], taken: set[str]) -> tuple[tuple[Kernel, ...], dict[Expr, Buffer]]:
    """This function makes a sweep for each peak of ``states``, and the buffers of what ``roots`` and other states read of them.

    Raises NotImplementedError for a peak that takes what a state of another kind gives.
    """
    reads = [n for n in walk(*roots, *(x for s in states for x in s.operands)) if n.op == "readout"]
    kernels: list[Kernel] = []
    made: dict[Expr, Buffer] = {}
    for s in (s for s in states if s.peak):
        s = s.map(lambda e: E.substitute(e, {n: b.leaf for n, b in made.items()}))
        if any(E.reads(x, "readout") for x in s.operands):
            raise NotImplementedError(f"no Triton form for the peak {s.name}, which reads other states")
        y = (*s.dims, "")[0]
        value = Expr("carry", name=s.name, dims=s.dims)
        shift = E.add(*s.decay) if s.decay else E.ZERO

        def tile(at: str, s: State = s, shift: Expr = shift, value: Expr = value) -> Expr:
            return Expr("peak", (shift, s.writes[0].row, value), dims=s.dims, token=True, attrs=(("at", at),))

        stores: list[Store] = []
        for n in dict.fromkeys(n for n in reads if n.name == s.name):
            name = next(x for i in range(99) if (x := f"{s.name}_{n.attr('at')}" + (str(i) if i else "")) not in taken)
            taken.add(name)
            made[n] = Buffer(name, s.head, s.dims, True, "float32")
            stores.append(Store(made[n], tile(n.attr("at"))))
        carry = Carry(s.name, "", y, False, (), (), peak=tile("now"))
        hold = Hold(carry, f"initial_{s.name}", f"final_{s.name}")
        kernels.append(Kernel(f"peak_{s.name}".lower(), "sweep", tuple(stores), f"the running maximum {s.name}", y, False, (hold,)))
    return tuple(kernels), made
