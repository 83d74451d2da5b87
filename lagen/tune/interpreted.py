"""The process that checks a modelled config: runs its kernels in Triton's interpreter, watched by the sanitizer, against the oracle.

Started by tune/modelled with TRITON_INTERPRET=1 and one request on standard input; answers with one line.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from lagen.ir.tunable import Config
from lagen.runtime.load import load
from lagen.targets.orphan import die_with_parent
from lagen.tune.job import Job
from lagen.tune.outcome import Reason
from lagen.tune.trial import DTYPES, Refused
from lagen.verify.cases import Extent, make, regimes
from lagen.verify.laws import Subject, call, judge
from lagen.verify.sanitize import sanitize


def check(request: dict[str, Any]) -> None:
    """Checks one config at one head and a little more than two chunks; raises Refused."""
    job, config = Job.from_json(request["job"]), Config.of(request["config"])
    torch.set_num_threads(1)
    variant = job.variant
    operator = load(variant, ("triton",), job.entries(config, "modelled", device="interpreter"))
    chunk = max(16, config.table.get("chunk", variant.chunk_default))
    for i, regime in enumerate(r for r in regimes(variant) if r in ("mild", "gates at -20")):
        case = make(variant, Extent(2 * chunk + 5, 1, 1, 1, job.dims), regime, DTYPES[job.dtype], carried=i == 0)
        with sanitize() as findings:
            for result in judge("tuned", Subject(operator, variant, "triton"), case, call(Subject(operator, variant, "triton"), None)):
                if not result.ok:
                    raise Refused(Reason.WRONG, f"{result.tensor} is off by {result.error:.1e}, limit {result.limit:.1e}, in {result.case}")
        for finding in findings:
            raise Refused(Reason.RACE if finding.kind == "race" else Reason.WRONG, str(finding))


def main() -> None:
    """Answers one request. What else prints goes to standard error."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer: dict[str, str] = {}
    try:
        check(json.loads(sys.stdin.readline()))
    except Refused as refused:
        answer = {"reason": refused.reason.value, "detail": refused.detail}
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
