"""The process that checks modelled configs: runs their kernels in Triton's interpreter, watched by the sanitizer, against the oracle.

Started by tune/modelled with TRITON_INTERPRET=1; a line says that it is ready, then each request on standard input has one line of answer.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from lagen.ir.tunable import Config
from lagen.runtime.load import load
from lagen.targets.orphan import die_with_parent
from lagen.tune.agreement import STEPS, Refused, agree
from lagen.tune.job import Job
from lagen.tune.outcome import Reason
from lagen.tune.trial import DTYPES
from lagen.verify.cases import Extent, make, regimes
from lagen.verify.laws import Subject
from lagen.verify.sanitize import sanitize

WIDEST = 256
"""The most that a dim is interpreted at: two of the widest tiles; mamba's channels alone would be hundreds."""


def check(request: dict[str, Any]) -> None:
    """Checks one config at one head and a little more than two chunks, a step at a few tokens; raises Refused."""
    whole, config = Job.from_json(request["job"]), Config.of(request["config"])
    job = replace(whole, dims=tuple((d, min(n, WIDEST)) for d, n in whole.dims))
    torch.set_num_threads(1)
    variant = job.variant

    def subject(of: Config) -> Subject:
        return Subject(load(variant, ("triton",), job.entries(of, "modelled", device="interpreter")), variant, "triton")

    chosen, steps = subject(config), job.passes == ("step",)
    chunk = max(16, config.table.get("chunk", variant.chunk_default))
    for i, regime in enumerate(r for r in regimes(variant) if r in ("mild", "gates at -20")):
        extent = Extent(STEPS if steps else 2 * chunk + 5, 1, 1, 1, job.dims)
        case = make(variant, extent, regime, DTYPES[job.dtype], carried=steps or i == 0)
        with sanitize() as findings:
            agree(chosen, lambda: subject(Config()), case, job.passes)
        for finding in findings:
            raise Refused(Reason.RACE if finding.kind == "race" else Reason.WRONG, str(finding))


def main() -> None:
    """Serves until standard input ends. What else prints goes to standard error."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer: dict[str, str] = {}
        try:
            check(json.loads(line))
        except Refused as refused:
            answer = {"reason": refused.reason.value, "detail": refused.detail}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
