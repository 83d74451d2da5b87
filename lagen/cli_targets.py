"""`lagen targets`: the devices that kernels can be compiled for, and this machine's CPU."""

from __future__ import annotations

import json
from dataclasses import asdict

from lagen.cli_table import table
from lagen.runtime.choice import processor
from lagen.targets.machine import this_cpu
from lagen.targets.target import TARGETS


def show(as_json: bool) -> None:
    """Prints every target."""
    cpu = this_cpu()
    gpus = [t for t in TARGETS.values() if t.backend != "cpu"]
    if as_json:
        print(json.dumps([asdict(t) for t in gpus] + [asdict(cpu) | {"kind": processor()}], indent=2))
        return
    table(
        ("target", "device", "processors", "shared KB", "L2 MB", "TB/s", "TFLOP/s", "source"),
        [
            (
                t.name,
                t.device,
                t.processors,
                t.shared_bytes >> 10,
                t.l2_bytes >> 20,
                f"{t.bandwidth / 1e12:.2f}",
                f"{t.tensor_flops / 1e12:.0f}",
                t.source,
            )
            for t in gpus
        ],
        "shared: the most that one program may ask for; TFLOP/s: dense, bfloat16 in, float32 out",
    )
    caches = ", ".join(f"{name} {size >> 10} KB" for name, size in cpu.caches)
    print(f"\ncpu: {cpu.device}, {cpu.cores} cores, vectors of {cpu.lanes} floats; {caches}\nentries of tuned/ for it: {processor()}")
