"""Modelled trials, where the device is not here: a config is cross-compiled, refused where it does not fit or spills, and ranked.

The model sees bytes, arithmetic and serial length (targets/model): what it may choose is the space's static part. A config that is to be
chosen is first run in Triton's interpreter, watched, and compared with the oracle (tune/interpreted).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from lagen.ir.tunable import Config
from lagen.runtime.launches import DTYPES, Gathered, Shape, gather
from lagen.targets.compile import Report, compile_launches
from lagen.targets.model import VERSION, model
from lagen.targets.server import Stopped, server
from lagen.targets.target import find
from lagen.tune.job import Job
from lagen.tune.outcome import Failed, Outcome, Reason, Timed

COMMAND = (sys.executable, "-m", "lagen.tune.interpreted")

NOISE = 0.02
"""The least modelled gain that means something: bounds are rounder than that."""


@dataclass(frozen=True)
class Model:
    """Judges configs of a job by compiling them: ``timeout`` seconds for one kernel, ``workers`` at a time."""

    job: Job
    timeout: float = 180.0
    workers: int | None = None
    command: Sequence[str] = COMMAND
    met: dict[Config, list[tuple[Gathered, Report]]] = field(default_factory=dict, compare=False, repr=False)

    def launches(self, config: Config) -> list[Gathered]:
        """Returns the kernels that the job's passes launch with a config."""
        j = self.job
        known = dict(j.dims)
        shape = Shape(j.batch, j.tokens, j.heads, known.get("K", 64), known.get("V", 64), DTYPES[j.dtype], j.dims)
        found = gather(j.variant, shape, find(j.device), tuned=j.entries(config, "modelled"))
        return [g for g in found if g.phase in j.passes]

    def compiled(self, config: Config) -> list[tuple[Gathered, Report]]:
        """Compiles a config, or remembers how it was compiled."""
        if config not in self.met:
            found = self.launches(config)
            reports = compile_launches([g.launch for g in found], workers=self.workers, timeout=self.timeout)
            made = list(zip(found, reports, strict=True))
            if any(r.failure for r in reports):  # which may be the machine's
                return made
            self.met[config] = made
        return self.met[config]

    def seconds(self, made: Sequence[tuple[Gathered, Report]]) -> float:
        """Returns the modelled time of what was compiled."""
        return sum(g.launches * model(g.launch, r, g.launch.target).seconds for g, r in made)

    def judge(self, config: Config, incumbent: Config, known: Collection[str]) -> Outcome:
        """Judges a config by its machine code."""
        made = self.compiled(config)
        failed = unfit(made)
        if failed is not None:
            return failed
        code = " ".join(sorted(f"{r.code}x{g.launches}x{g.launch.programs}" for g, r in made))
        if code in known:
            return Failed(Reason.SAME, "another trial's", code=code)
        time, rival, default = (self.seconds(self.compiled(c)) for c in (config, incumbent, Config()))
        return Timed(time / default, time / rival, NOISE, time * 1e6, default * 1e6, code, VERSION)

    def confirm(self, config: Config) -> Failed | None:
        """Runs a config in Triton's interpreter and compares it with the oracle; None where all agrees."""
        # what is run has no device: jobs of other targets ask the same
        job = replace(self.job, device="interpreter", here=False)
        asked = (job, config, tuple(self.command))
        if asked not in _CONFIRMED:
            failed = _interpreted(job, config, self.command, 4 * self.timeout)
            if failed is not None and failed.reason in (Reason.HANG, Reason.CRASH):  # which may be the machine's
                return failed
            _CONFIRMED[asked] = failed
        return _CONFIRMED[asked]


_CONFIRMED: dict[tuple[Job, Config, tuple[str, ...]], Failed | None] = {}
"""What the interpreter said of configs in this process."""


def _interpreted(job: Job, config: Config, command: Sequence[str], timeout: float) -> Failed | None:
    request = json.dumps({"job": job.to_json(), "config": config.table})
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        with server(command, env) as interpreter:
            held = json.loads(interpreter.ask(request, timeout))
    except Stopped as reason:
        return Failed(Reason.HANG if str(reason).startswith("took longer") else Reason.CRASH, f"{reason}, in the interpreter")
    return Failed(Reason(held["reason"]), held["detail"]) if "reason" in held else None


def unfit(made: Sequence[tuple[Gathered, Report]]) -> Failed | None:
    """Says why what was compiled may not be chosen: it does not compile, asks for too much shared memory, or spills."""
    for g, r in made:
        if r.failure:
            reason = Reason.HANG if r.failure.startswith("took longer") else Reason.COMPILE
            return Failed(reason, f"{r.kernel}: {r.failure[:200]}")
        if r.shared_bytes > g.launch.target.shared_bytes:
            over = r.shared_bytes - g.launch.target.shared_bytes
            return Failed(Reason.SHARED, f"{r.kernel} asks for {r.shared_bytes} of {g.launch.target.shared_bytes} bytes", over)
    spilt = [(r.kernel, r.spill_bytes) for _, r in made if r.spill_bytes]
    if spilt:
        return Failed(Reason.SPILLS, ", ".join(f"{k} {n} bytes" for k, n in spilt), float(sum(n for _, n in spilt)))
    return None
