"""Agreement: whether what a config makes may be chosen, judged by the oracle and, where the dtype rounds much, by the defaults.

The limits of the laws are a few times the rounding of the recurrence. At large dims in bfloat16 a chunked gradient may round a little more,
whatever the tiles: a config is not refused for what the defaults do as well, up to MUCH times the limit, beyond which it is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lagen.tune.outcome import Reason
from lagen.verify.cases import Case
from lagen.verify.laws import LawResult, Subject, call, judge, stepped

WORSE, MUCH = 1.25, 3.0
"""How much worse than the defaults a config may be where they too are beyond a limit, and how far beyond it."""

STEPS = 5
"""Tokens that a decode step is checked on."""


class Refused(Exception):
    """Ends a trial with a reason."""

    def __init__(self, reason: Reason, detail: str, code: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.code = reason, detail, code


def agree(subject: Subject, defaults: Callable[[], Subject], case: Case, passes: Sequence[str]) -> None:
    """Runs the passes of a job on a case and compares all that comes of them with the oracle; raises Refused.

    A decode step runs through the whole case, token by token, and wants initial states.
    """

    def results(of: Subject) -> list[LawResult]:
        if tuple(passes) == ("step",):
            with torch.no_grad():
                return list(judge("tuned", of, case, stepped(of), gradients=False))
        return list(judge("tuned", of, case, call(of, None), gradients=tuple(passes) != ("forward",)))

    off = [r for r in results(subject) if not r.ok]
    plain = {r.tensor: r for r in results(defaults())} if off else {}
    for r in off:
        if not r.error <= min(WORSE * plain[r.tensor].error, MUCH * r.limit):
            raise Refused(Reason.WRONG, f"{r.tensor} is off by {r.error:.1e}, limit {r.limit:.1e}, in {r.case}")
