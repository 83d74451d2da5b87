"""What a typed line may do with states: rule 1 as far as it needs no algebra, rule 2's linear reads, rule 7's peak lines.

The algebra of rule 1 (corrections on one side, the decayed past) is passes/canonicalise's affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from lagen.ir.expr import Expr, walk
from lagen.ir.variant import Span
from lagen.spec.elaborate import SIGNS
from lagen.spec.mistakes import Report

_LINEAR = ("neg", "add", "sub", "sum", "mean", "concat", "rename")


def mentions(e: Expr, name: str) -> bool:
    """Tells whether a value reads the state called ``name``."""
    return any(n.op in ("past", "now") and n.name == name for n in walk(e))


def terms(e: Expr, sign: int = 1) -> list[tuple[int, Expr]]:
    """Lists the terms of a sum with their signs."""
    if e.op == "add":
        return terms(e.args[0], sign) + terms(e.args[1], sign)
    if e.op == "sub":
        return terms(e.args[0], sign) + terms(e.args[1], -sign)
    return terms(e.args[0], -sign) if e.op == "neg" else [(sign, e)]


def is_peak(e: Expr, name: str) -> bool:
    """Tells whether a line is ``max(m[t-1] + a, b)`` of a scalar or vector state."""
    if e.op != "max" or len(e.dims) > 1:
        return False
    past = [a for a in e.args if mentions(a, name)]
    if len(past) != 1:
        return False
    own = [(sign, x) for sign, x in terms(past[0]) if mentions(x, name)]
    return len(own) == 1 and own[0][0] == 1 and own[0][1].op == "past"


@dataclass
class Rules:
    """The rules over one line: ``places`` finds a term's place in the file, ``line`` is the place of the line's name."""

    report: Report
    places: dict[Expr, Span]
    line: Span

    def place(self, e: Expr, around: Span) -> Span:
        """Returns where a term stands, or what stands around it."""
        return self.places.get(e, around)

    def check_linear(self, e: Expr, name: str) -> None:
        """Reports every place where a state's line is not linear in its own past."""
        memo: dict[Expr, int] = {}

        def degree(x: Expr, around: Span) -> int:
            if x in memo:
                return memo[x]
            here = self.place(x, around)
            if x.op in ("past", "now"):
                memo[x] = int(x.name == name)
                return memo[x]
            below = [degree(a, here) for a in x.args]
            wrong, help = "", ""
            if x.op in ("mul", "outer", "contract"):
                if sum(below) > 1:
                    wrong, help = "multiplies the state's past with itself", "a state is linear in its own past"
            elif x.op == "div":
                if below[1]:
                    wrong, help = "divides by the state's past", "divide in the output line"
            elif x.op == "where":
                if below[0]:
                    wrong, help = "chooses by the state's past", "choose by inputs"
            elif x.op not in _LINEAR and any(below):
                wrong, help = f"'{_shown(x)}' of the state's past is not linear", "apply it to inputs, or in the output line"
                if x.op == "max":
                    help = "a peak line is `m: max(m[t-1] + a, b)`, of a scalar or vector state"
            if wrong:
                code = "peak" if x.op == "max" else "nonlinear-state"
                self.report.add(code, here, f"{name}: {wrong}", help)
            memo[x] = 0 if wrong else max(below, default=0)
            return memo[x]

        degree(e, self.line)

    def check_reads(self, e: Expr, own: str) -> bool:
        """Reports reads of matrix states that are not linear; returns whether an uncontracted one is left. ``own`` is exempt."""
        memo: dict[Expr, bool] = {}

        def carries(x: Expr, around: Span) -> bool:
            if x in memo:
                return memo[x]
            here = self.place(x, around)
            if x.op in ("past", "now"):
                memo[x] = len(x.dims) == 2 and x.name != own
                return memo[x]
            below = [carries(a, here) for a in x.args]
            wrong = ""
            left = any(below)
            if x.op in ("mul", "contract", "outer"):
                if sum(below) > 1:
                    wrong = "multiplies a matrix state with another"
                left = left and x.op != "contract"
            elif x.op == "div":
                wrong = "divides by a matrix state" if below[1] else ""
            elif x.op == "where":
                wrong = "chooses by a matrix state" if below[0] else ""
            elif x.op not in _LINEAR and left:
                wrong = f"'{_shown(x)}' of a matrix state"
            if wrong:
                help = "a matrix state is read by @ with a vector, with element-wise factors around it: q @ S[t], q @ (S[t] / z[t])"
                self.report.add("matrix-read", here, f"{wrong} is not a linear read" if wrong[0] == "'" else wrong, help)
            memo[x] = left and not wrong
            return memo[x]

        return carries(e, self.line)


def _shown(e: Expr) -> str:
    return SIGNS.get(e.op, e.op)
