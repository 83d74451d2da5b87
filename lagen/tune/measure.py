"""Measured trials: starts the process of one trial (tune/trial), waits no longer than it may take, and reads what it was worth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lagen.ir.tunable import Config
from lagen.tune.job import Job
from lagen.tune.outcome import Failed, Outcome, Reason, Timed

COMMAND = (sys.executable, "-m", "lagen.tune.trial")


@dataclass(frozen=True)
class Measure:
    """How trials of a job are measured: each in a process of ``command``, killed after ``timeout`` seconds, ``rounds`` timings of each."""

    job: Job
    timeout: float = 120.0
    rounds: int = 15
    command: Sequence[str] = COMMAND

    @property
    def how(self) -> str:
        """Says what its outcomes are."""
        return "measured"

    def judge(self, config: Config, incumbent: Config, known: Collection[str]) -> Outcome:
        """Runs one trial. ``known`` are the codes of trials before it; one of the same code is not timed again."""
        request = {
            "job": self.job.to_json(),
            "config": config.table,
            "incumbent": incumbent.table,
            "known": sorted(known),
            "rounds": self.rounds,
        }
        env = os.environ | {"OMP_NUM_THREADS": str(self.job.threads), "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.TemporaryFile("w+", errors="replace") as words:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env=env,
                text=True,
                start_new_session=True,  # so that a compiler it started ends with it
            )
            try:
                answer, _ = process.communicate(json.dumps(request) + "\n", self.timeout)
            except subprocess.TimeoutExpired:
                return Failed(Reason.HANG, f"more than {self.timeout:.0f} s")
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with suppress(BrokenPipeError):
                            pipe.close()
            words.seek(0)
            return _read(answer, process.returncode, words.read()[-600:].strip())


def _read(answer: str, status: int, words: str) -> Outcome:
    """Reads a trial's answer; what is none is a crash."""
    try:
        held = json.loads(answer.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return Failed(Reason.CRASH, f"ended with {status}: {words}")
    if "reason" in held:
        return Failed(Reason(held["reason"]), held["detail"], code=held.get("code", ""))
    return Timed(**held)
