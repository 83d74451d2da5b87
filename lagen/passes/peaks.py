"""Peaks: from the line m: max(m[t-1] + a, b) to a state, and what comes back to it to its past and its write.

A peak is there so that exp of what it is subtracted from stays in range. Where a spec uses it for that alone it cancels out of every
output, and its gradient is zero but for rounding; the papers' kernels (mLSTM, RWKV-4) then leave it out. It does not cancel out of
the final states, which are kept in its scale, nor out of a spec that reads it otherwise. So the gradient here goes through the peak:
to the past where m[t-1] + a was the larger, to b where that was, in equal parts at a tie, as torch.maximum hands it on. Where it
cancels it is a difference of equal numbers; where it does not, it is right, and no spec needs to say which.
"""

from __future__ import annotations

from lagen.ir import expr as E
from lagen.ir.bounds import RESET
from lagen.ir.expr import ONE, Expr
from lagen.ir.recurrence import State, Write, readout
from lagen.ir.variant import StateLine
from lagen.passes.linear_form import Lines, product


def peak(lines: Lines, line: StateLine) -> State:
    """This function returns the state of a peak line; raises Refused where a or b is no token-wise value."""
    past, other = sorted(line.expr.args, key=lambda a: all(n.name != line.name for n in E.reads(a, "past")))
    terms = [lines.freed(t) for t in lines.expand(past)]
    shift = E.add(*(product(t.factors, t.over) for t in terms if t.state is None))
    decay = () if shift == E.ZERO else (shift,)
    write = Write(E.expand(lines.value(other), line.dims), ONE)
    return State(line.name, line.head, line.dims, decay, (write,), init=line.init, peak=True)


def shares(state: State) -> tuple[Expr, Expr]:
    """This function returns the part of a peak's cotangent that goes to its past, and its log: 1, a half at a tie, 0."""
    past = E.add(readout(state, ONE, "", "previous"), *state.decay)
    write = state.writes[0].row
    above, equal = E.call("gt", past, write), E.call("eq", past, write)

    def choose(most: float, tie: float, least: float) -> Expr:
        return E.call("where", above, E.const(most), E.call("where", equal, E.const(tie), E.const(least)))

    return choose(1.0, 0.5, 0.0), E.call("logdecay", choose(0.0, -0.6931471805599453, RESET))
