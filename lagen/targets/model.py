"""The static model: bounds on the time of a launch from its counted work, its machine code's needs, and the target's numbers.

What it is: a *model*, five bounds and the largest of them, never a measurement. Bytes are counted once for each tensor (a perfect L2) for
the memory bound, and as often as programs ask for the L2 bound. It sees what changes bytes, arithmetic or the length of the serial
chain; it does not see what warps and pipeline stages do, so nothing may choose those by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lagen.targets.compile import Report
from lagen.targets.launch import Launch
from lagen.targets.target import Target
from lagen.targets.work import Work, work

VERSION = "model 3"

REACHED = {"memory": 0.85, "L2": 0.7, "tensor": 0.7, "arithmetic": 0.6}
"""The share of a peak that a good kernel reaches; taken beforehand, not fitted."""

L2_FACTOR = 2.0
"""L2 bandwidth over memory bandwidth: 1.6 to 2.7 on the devices whose makers tell."""

LANES, SPECIAL_LANES, SHARED_LANES = 128, 16, 32
"""Results a clock of one processor: float or integer operations, exp and the like, and words to or from shared memory."""

LINK, TRIP = 150, 700
"""Clocks that a dot depends on the one before it, and that a trip of a loop waits for its loads where nothing overlaps."""

START = 3e-6
"""Seconds of one launch."""


@dataclass(frozen=True)
class Modelled:
    """The modelled time of one launch. ``bounds`` are seconds by name; ``occupancy`` is programs that a processor holds at once."""

    seconds: float
    bounds: tuple[tuple[str, float], ...]
    occupancy: int
    read: float  # bytes from memory, each tensor once
    written: float
    asked: float  # bytes that programs load and store
    flops: float

    @property
    def bound(self) -> str:
        """Names the bound that dominates."""
        return max(self.bounds, key=lambda b: b[1])[0]


def occupancy(report: Report, warps: int, target: Target) -> int:
    """Returns how many programs of a kernel a processor holds: by registers, shared memory and threads; 0 where it cannot be launched."""
    threads = warps * target.warp_size
    each = -(-max(report.registers, 16) // 8) * 8 * threads
    by_registers = target.registers // each
    by_shared = target.shared_of_processor // (report.shared_bytes + target.shared_reserved) if report.shared_bytes else 32
    return min(by_registers, by_shared, target.threads // threads, 32) if report.shared_bytes <= target.shared_bytes else 0


def model(launch: Launch, report: Report, target: Target) -> Modelled:
    """Models the time of one launch."""
    done = work(report.nest, dict(launch.values) | {k: int(v) for k, v in launch.constants if isinstance(v, int)}, launch.programs)
    programs = launch.programs
    sizes = dict(launch.sizes)

    def once(amounts: Iterable[tuple[str, float]]) -> float:
        return sum(min(programs * n, sizes.get(name, math.inf)) for name, n in amounts)

    read, written = once(done.loads.items()), once(done.stores.items())
    asked = programs * (sum(done.loads.values()) + sum(done.stores.values()))
    warps = int(dict(launch.options).get("num_warps", 4) or 4)
    spilt = 2.0 * report.spill_bytes * warps * target.warp_size * programs * max(1.0, done.chain)
    held = max(1, occupancy(report, warps, target))
    busy = min(1.0, programs / target.processors)  # the share of processors that have anything to do
    rates = {"half": target.tensor_flops, "tf32": target.tensor_flops / 2, "float": 2 * LANES * target.processors * target.clock}
    clocks = target.processors * target.clock * busy
    bounds = {
        "memory": (read + written) / (target.bandwidth * REACHED["memory"]),
        "L2": (asked + spilt) / (L2_FACTOR * target.bandwidth * REACHED["L2"] * busy),
        "tensor": programs * sum(n / rates[k] for k, n in done.flops.items()) / (REACHED["tensor"] * busy),
        "arithmetic": programs * _clocks(done) / (clocks * REACHED["arithmetic"]),
        "chain": math.ceil(programs / (target.processors * held)) * (done.chain * TRIP + done.dots * LINK) / target.clock,
    }
    # bounds overlap, but not perfectly
    seconds = sum(t**4 for t in bounds.values()) ** 0.25 + START
    return Modelled(seconds, tuple(bounds.items()), held, read, written, asked, programs * sum(done.flops.values()))


def _clocks(done: Work) -> float:
    return done.elements / LANES + done.special / SPECIAL_LANES + 2 * done.reduced / LANES + 2 * done.gathered / SHARED_LANES


def total(modelled: Sequence[Modelled]) -> float:
    """Returns the modelled seconds of launches that run one after the other."""
    return sum(m.seconds for m in modelled)
