"""What the C++ carries, and why a variant runs through the torch evaluation on the CPU where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from lagen.emit.cpp_scan import unprinted
from lagen.ir.expr import HEADS, Expr, addends, neg, walk
from lagen.ir.recurrence import Recurrence, State
from lagen.ir.scalar import FUNCTIONS

REDUCTIONS = ("sum", "mean", "rowmax", "contract")
RESIZES = ("concat", "part", "rename", "taylor2", "quad", "untaylor2", "unquad", "product")
LEAVES = ("input", "param", "const", "size", "scale", "follows")


@dataclass(frozen=True)
class Fallback:
    """Says why a variant runs through the torch evaluation on the CPU and not through generated C++."""

    reason: str


def outers(e: Expr) -> list[tuple[Expr, Expr]]:
    """Returns the pairs of vectors whose outer products add up to ``e``, a value with two dims; none where it is no such sum."""
    found: list[tuple[Expr, Expr]] = []
    for term in addends(e):
        x = term.args[0] if term.op == "neg" else term
        if x.op != "outer":
            return []
        found.append((neg(x.args[0]) if term.op == "neg" else x.args[0], x.args[1]))
    return found


def products(both: list[tuple[State, State]]) -> list[tuple[Expr, Expr, Expr, Expr]]:
    """Lists what two tokens multiply for the gradient of the one decay of states, each with its reverse; none where there is more to it.

    A four is the row and the column that the earlier token writes to a state, and those that the later one writes to its reverse.
    """
    states = [s for two in both for s in two]
    plain = all(len(s.dims) == 2 and s.dims == states[0].dims and not s.solves and len(s.decay) == 1 for s in states)
    if not plain or not all(w.decayed for s in states for w in s.writes):
        return []
    found = [(w.row, w.col, r.row, r.col) for a, b in both for w in a.writes for r in b.writes]
    return found if all(x.dims and x.token for four in found for x in four) else []


def _unwalked(dense: list[State], roots: list[Expr]) -> str:
    """Returns what one reverse walk of a dense state's gradient cannot give, or nothing."""
    if len(dense) > 1:
        return "several states have a decay for every element"
    back = dense[0]

    def made(n: Expr) -> bool:
        return n.op == "readout" and n.name in (back.of, back.name) and bool(n.attr("dim")) or any(len(a.dims) > 1 for a in n.args)

    bodies = [x for w in back.writes for x in (w.row, w.col)]
    if any(n.op == "readout" and n.name == back.of for n in walk(*bodies)):
        return f"what {back.of} is comes back to it through what reads it"
    for n in walk(*roots):
        if len(n.dims) < 2 and any(len(a.dims) > 1 for a in n.args):
            if n.op not in ("sum", "contract") or not n.token:
                return f"{n} reduces two dims a token"
            if any(len(m.dims) < 2 and made(m) for a in n.args for m in walk(a)):
                return f"{n} takes what the same walk makes"
    return ""


def unfit(recurrence: Recurrence, states: tuple[State, ...], roots: list[Expr]) -> str:
    """Returns what the fast form cannot carry of ``roots`` and of what they read, or nothing."""
    by_name = {s.name: s for s in states}
    dense = [s for s in states if s.dense and s.reverse]
    for e in (e for e in roots if len(e.dims) > 1):
        reason = unprinted(e) if dense else f"{e} has two dims a token"
        if not outers(e) and reason:
            return reason
    roots = [x for e in roots for x in (x for pair in outers(e) for x in pair) if outers(e)] + [e for e in roots if not outers(e)]
    if dense and (reason := _unwalked(dense, roots)):
        return reason
    known = {
        *FUNCTIONS,
        *LEAVES,
        *REDUCTIONS,
        *RESIZES,
        "pow",
        "expand",
        "softmax",
        "l2norm",
        "rmsnorm",
        "lead",
        "readout",
        "suffix",
        "solved",
    }
    bodies = [x for s in states for x in (*s.operands, *(x for w in s.writes for x in (w.row, w.col))) if len(x.dims) < 2]
    for g in (g for s in states for g in s.decay if s.dense):
        if reason := unprinted(g):
            return reason
        bodies += [n for n in walk(g) if len(n.dims) < 2]
    matrices = {a for n in walk(*roots, *bodies) if n.op == "contract" for a in n.args if a.op == "param" and len(a.dims) > 1}
    for n in walk(*roots, *bodies):
        if n in matrices:
            continue
        if dense and len(n.dims) > 1 and not unprinted(n):
            continue
        if n.op == "readout" and len(by_name[n.name].dims) > 1 and n.attr("dim") == "":
            return f"{n.name} is read element by element"
        if n.op not in known:
            return f"'{n.op}' has no form in C++ yet"
        if len(n.dims) > 1:
            return f"{n} has two dims a token"
    for s in states:
        inclusive = any(n.op == "readout" and n.name == s.name and n.attr("at") == "since" for n in walk(*roots))
        if inclusive and any(not w.decayed for w in s.writes):
            return f"{s.name} is read inclusively beside an undecayed write"
    for s in states:
        if any(g.dims == u.leaf.dims for u in s.solves for g in s.decay):
            return f"{s.name} is corrected under a decay on the dim that the correction keeps"
    peaks = [s.name for s in recurrence.states if s.peak]
    if peaks and any(n.op == "suffix" for n in walk(*roots)):
        return f"what comes back to the peak {peaks[0]} through sums over tokens cancels, and float32 would leave its rounding"
    heads = {e.head for _, e in recurrence.outputs}
    if len(heads) > 1:
        return "outputs stand on different heads"
    if max((t.head for t in recurrence.inputs + recurrence.params), key=HEADS.index) not in heads:
        return "an input stands on a wider head than the outputs"
    return ""
