"""The process of one trial on the device at hand: builds a config's operator, checks its numbers, then times it beside its rivals.

Started by tune/measure with one request on standard input; answers with one line. A process of its own, because a config may crash, hang or
write where it should not: that costs one trial. It dies with the tuner that started it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagen.ir.tunable import Config
from lagen.ir.variant import Variant
from lagen.runtime.cpp import CppBackend, Missing, build, defines
from lagen.runtime.dispatch import as_tuple
from lagen.runtime.load import load
from lagen.runtime.operator import Operator
from lagen.targets.orphan import die_with_parent
from lagen.tune.agreement import STEPS, Refused, agree
from lagen.tune.job import Job
from lagen.tune.outcome import Reason
from lagen.verify.cases import Case, Extent, make, regimes
from lagen.verify.laws import Subject, check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLD = 64 << 20
"""Bytes that are written between two calls, so that no call finds its tensors in a cache."""

FLOOR = 0.01
"""The least relative gain that is ever believed."""


# ---- what is built ----------------------------------------------------------------------------------------------------------------


def code_of(path: Path) -> str:
    """Returns the digest of a shared object's instructions and constants: names, build ids and paths do not enter."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return hashlib.sha256(data).hexdigest()[:16]
    at, size, count, names = (
        *struct.unpack_from("<Q", data, 40),
        *struct.unpack_from("<3H", data, 58),
    )
    heads = [struct.unpack_from("<IIQQQQ", data, at + i * size) for i in range(count)]
    told = hashlib.sha256()
    for name, _, _, _, offset, length in heads:
        start = heads[names][4] + name
        if data[start : data.index(b"\0", start)] in (b".text", b".rodata"):
            told.update(data[offset : offset + length])
    return told.hexdigest()[:16]


def compiled(operator: Operator, config: Config, passes: Sequence[str]) -> str:
    """Compiles what a config needs on the CPU, and returns the digest of its code; raises Refused."""
    backend = cpp_of(operator)
    told = [defines(config.of_pass(of).table) for of in passes]
    codes = []
    for flags in dict.fromkeys(told):
        built = build(backend.source, backend.spec.name, flags)
        if isinstance(built, Missing):
            raise Refused(Reason.COMPILE, built.reason)
        codes.append(code_of(built))
    threads = [config.of_pass(of).table.get("threads", 0) for of in passes]
    return " ".join(map(str, [*codes, *threads]))


def cpp_of(operator: Operator) -> CppBackend:
    """Returns the backend whose method serves the operator's forward on the CPU."""
    served = getattr(operator.backends["cpp"].forward, "__self__", None)
    assert served is not None
    backend: CppBackend = served
    return backend


# ---- what is checked --------------------------------------------------------------------------------------------------------------


def checked(operator: Operator, defaults: Operator, variant: Variant, job: Job, device: str) -> None:
    """Compares what the job's passes make with the oracle, at an odd length, and repeats it bit for bit; raises Refused."""
    backend = "cpp" if device == "cpu" else "triton"
    subject = Subject(operator, variant, backend, device)
    dtype, steps = DTYPES[job.dtype], job.passes == ("step",)
    extent = Extent(STEPS if steps else 2 * max(variant.chunk_default, 64) + 5, batch=1, heads=2, group=1, dims=job.dims)
    for i, regime in enumerate(r for r in regimes(variant) if r in ("mild", "gates at -20", "resets")):
        case = make(variant, extent, regime, dtype, carried=steps or i != 1)
        agree(subject, lambda: replace(subject, op=defaults), case, job.passes)
    if steps:  # the timed call is repeated itself
        return
    for result in check(operator, variant, backend, device, laws=("repeats",)):
        if not result.ok:
            raise Refused(Reason.RACE, f"{result.tensor} differs when the same call is made again")


def repeated(run: Callable[[], tuple[Tensor, ...]], reset: Callable[[], object] = lambda: None) -> None:
    """Makes the timed call three times, each after ``reset``, and compares the bits; raises Refused."""
    reset()
    first = [x.clone() for x in run()]
    for _ in range(2):
        reset()
        if not all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)):
            raise Refused(Reason.RACE, "the timed call gives other bits each time")


# ---- what is timed ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Times one call on a cold device: processor time of one thread, wall time of several, events of a GPU. Microseconds."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.name = "events" if device != "cpu" else "cpu time" if threads == 1 else "wall time"
        self.cold = torch.empty(COLD // 4, device=device)

    def time(self, run: Callable[[], object]) -> float:
        """Returns how long one call takes, its tensors in no cache."""
        self.cold.add_(1.0)
        if self.device != "cpu":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) * 1e3
        read = time.process_time if self.name == "cpu time" else time.perf_counter
        begun = read()
        run()
        return (read() - begun) * 1e6


def runner(operator: Operator, case: Case, passes: Sequence[str], backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """Returns the call that is timed: exactly the passes of the job but the decode step, past autograd."""
    served = operator.backends[backend]
    inputs, params, scale = case.inputs, case.params, 1.0

    def forward() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs, _, saved = served.forward(inputs, params, scale, None, False, None)
        return outputs, saved

    outputs, saved = forward()

    def backward(outputs: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        d_inputs, d_params, _ = served.backward(inputs, params, scale, None, saved, outputs, None, case.d_outputs, None, None)
        return (*d_inputs, *d_params)

    if passes == ("forward",):
        return lambda: forward()[0]
    if passes == ("backward",):
        return lambda: backward(outputs, saved)

    def both() -> tuple[Tensor, ...]:
        made, kept = forward()
        return (*made, *backward(made, kept))

    return both


Call = Callable[[], object]


def decoder(operator: Operator, case: Case, backend: str) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    """Returns the decode step that is timed, which allocates nothing, and what takes its state back to the first token."""
    step = operator.backends[backend].step
    assert step is not None
    one = tuple(x[:, 0].contiguous() for x in case.inputs)
    outputs, states = (as_tuple(x) for x in operator.step(*one, *case.params, backend=backend))
    first = [s.clone() for s in states]

    def decode() -> tuple[Tensor, ...]:
        step(one, case.params, 1.0, states, None, outputs)
        return (*outputs, *states)

    def reset() -> None:
        for s, x in zip(states, first, strict=True):
            s.copy_(x)

    return decode, reset


def race(clock: Clock, candidate: Call, default: Call, rival: Call, rounds: int) -> dict[str, float]:
    """Times candidate, defaults (twice) and incumbent in turn, and returns medians of pairs, and the noise of the defaults' own pairs."""
    runs = {"default": default, "candidate": candidate, "again": default, "rival": rival}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        clock.time(runs[name])
    for i in range(rounds):
        order = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for name in order:
            times[name].append(clock.time(runs[name]))
    base = [math.sqrt(a * b) for a, b in zip(times["default"], times["again"], strict=True)]
    own = [math.log(a / b) for a, b in zip(times["default"], times["again"], strict=True)]
    middle = statistics.median(own)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in own)
    # three standard errors of a median of as many pairs, and whatever bias the defaults show against themselves
    noise = max(FLOOR, abs(middle) + 3 * 1.2533 * spread / math.sqrt(rounds))
    return {
        "ratio": statistics.median(c / b for c, b in zip(times["candidate"], base, strict=True)),
        "rival": statistics.median(c / r for c, r in zip(times["candidate"], times["rival"], strict=True)),
        "noise": noise,
        "time": statistics.median(times["candidate"]),
        "default": statistics.median(base),
    }


def trial(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one trial and returns what it was worth; raises Refused."""
    job = Job.from_json(request["job"])
    config, incumbent = (Config.of(request[k]) for k in ("config", "incumbent"))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    device = "cpu" if job.device.startswith("cpu") else "cuda"
    backend = "cpp" if device == "cpu" else "triton"
    variant = job.variant
    operators = {c: load(variant, (backend,), job.entries(c) if c.values else ()) for c in (config, incumbent, Config())}
    code = ""
    if device == "cpu":
        code = compiled(operators[config], config, job.passes)
        if code in request["known"]:
            raise Refused(Reason.SAME, "another trial's", code)
        for other in (incumbent, Config()):
            compiled(operators[other], other, job.passes)
    print("compiled", file=sys.stderr, flush=True)
    checked(operators[config], operators[Config()], variant, job, device)
    case = make(variant, Extent(job.tokens, job.batch, job.heads, 1, job.dims), dtype=DTYPES[job.dtype])
    if job.passes == ("step",):
        steps = {c: decoder(o, case, backend) for c, o in operators.items()}
        runs = {c: run for c, (run, _) in steps.items()}
        repeated(*steps[config])
    else:
        runs = {c: runner(o, case, job.passes, backend) for c, o in operators.items()}
        repeated(runs[config])
    clock = Clock(device, job.threads)
    return race(clock, runs[config], runs[Config()], runs[incumbent], request["rounds"]) | {"code": code, "note": clock.name}


def main() -> None:
    """Answers one request. What else prints goes to standard error."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    try:
        answer = trial(request)
    except Refused as refused:
        answer = {"reason": refused.reason.value, "detail": refused.detail, "code": refused.code}
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
