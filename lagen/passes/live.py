"""Orders the statements of a kernel so that few values are alive at once: what is alive sits in registers, and what does not fit spills.

A list schedule by beam search. A statement that leaves no more alive than it found is taken as soon as it can be: no order is the worse
for it. Between the others the search keeps the sets of statements done whose best order so far had the lowest peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 32
"""Sets of statements that the search keeps."""


@dataclass(frozen=True)
class Step:
    """A statement: ``size`` is what it makes, in registers of a thread or any other unit; ``after`` are the steps that must come first.

    ``holds`` are those of them whose value must stay alive until this step; the others handed theirs over (to shared memory) at once.
    """

    size: float
    after: frozenset[int]
    holds: frozenset[int]


@dataclass(frozen=True)
class _Done:
    peak: float
    live: float
    order: tuple[int, ...]


def peak(steps: Sequence[Step], order: Sequence[int]) -> float:
    """Returns the most that is alive at once when ``steps`` run in ``order``."""
    plan, at = _Uses(steps), _Done(0.0, 0.0, ())
    done = 0
    for i in order:
        at = plan.take(at, done, i)
        done |= 1 << i
    return at.peak


def arrange(steps: Sequence[Step], width: int = WIDTH) -> tuple[int, ...]:
    """Returns an order of ``steps`` with a low peak; never a worse one than as they stand."""
    plan = _Uses(steps)
    beam = dict([plan.settle(_Done(0.0, 0.0, ()), 0)])
    whole = (1 << len(steps)) - 1
    while set(beam) != {whole}:
        found = {whole: beam[whole]} if whole in beam else {}
        for done, at in beam.items():
            for i in plan.ready(done):
                mask, new = plan.settle(plan.take(at, done, i), done | 1 << i)
                known = found.get(mask)
                if known is None or (new.peak, new.order) < (known.peak, known.order):
                    found[mask] = new
        best = sorted(found.items(), key=lambda x: (x[1].peak, x[1].live / max(1, x[0].bit_count()), x[1].order))
        beam = dict(best[:width])
    order = beam[whole].order
    return order if peak(steps, order) < peak(steps, range(len(steps))) else tuple(range(len(steps)))


class _Uses:
    """Who needs what, as sets of bits."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.after = [sum(1 << j for j in s.after) for s in steps]
        self.holders = [0] * len(steps)
        for i, s in enumerate(steps):
            for j in s.holds:
                self.holders[j] |= 1 << i

    def ready(self, done: int) -> list[int]:
        """Lists the steps that may come next."""
        return [i for i, after in enumerate(self.after) if not done >> i & 1 and after & ~done == 0]

    def change(self, done: int, i: int) -> float:
        """Returns how much more is alive after step ``i`` than before it."""
        now = done | 1 << i
        freed = sum(self.steps[j].size for j in self.steps[i].holds if self.holders[j] & ~now == 0)
        return (self.steps[i].size if self.holders[i] & ~now else 0.0) - freed

    def take(self, at: _Done, done: int, i: int) -> _Done:
        """Returns the state after step ``i``: its result may take the place of what dies with it."""
        live = at.live + self.change(done, i)
        return _Done(max(at.peak, live), live, (*at.order, i))

    def settle(self, at: _Done, done: int) -> tuple[int, _Done]:
        """Takes every step that leaves no more alive than it found."""
        while True:
            free = next((i for i in self.ready(done) if self.change(done, i) <= 0.0), None)
            if free is None:
                return done, at
            at, done = self.take(at, done, free), done | 1 << free
