"""A tuner over quick trials, as a process that can be killed: tuner.py STORAGE TRIALS."""

from __future__ import annotations

import sys
from pathlib import Path

from lagen import data
from lagen.spec.read import read
from lagen.tune.job import Job, job
from lagen.tune.measure import Measure
from lagen.tune.run import run
from lagen.tune.search import Budget

QUICK = (sys.executable, str(Path(__file__).parent / "quick_trial.py"))


def quick_job() -> Job:
    """Returns the job of the quick trials."""
    return job(read(data.spec("simple_gla")), "cpu:quick", True, ("forward",), "fp32", {"K": 16, "V": 16}, 1, 64, 1)


if __name__ == "__main__":
    found = run(quick_job(), Budget(int(sys.argv[2])), sys.argv[1], judge=Measure(quick_job(), 20.0, 3, QUICK))
    print(len(found.state.done), found.chosen)
