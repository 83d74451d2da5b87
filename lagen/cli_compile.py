"""`lagen compile`: gathers the launches of a variant's forward, backward and step, compiles them, and tables what they need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lagen.ir.variant import Tensor, Variant
from lagen.runtime.load import load
from lagen.targets.compile import Report, compile_launches
from lagen.targets.launch import Launch, record
from lagen.targets.target import Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of the call that is compiled for; ``dims`` overrides those of single dims."""

    b: int
    t: int
    h: int
    k: int
    v: int
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...] = ()

    def size(self, dim: str) -> int:
        """Returns the size of a dim by name: V is v, HV is h, any other is k."""
        return {"B": self.b, "T": self.t, "H": self.h, "HV": self.h, "V": self.v, **dict(self.dims)}.get(dim, self.k)

    def tensor(self, declared: Tensor, token: bool) -> torch.Tensor:
        """Makes an input or param without memory; ``token`` keeps the time axis."""
        names = [d for d in declared.shape if token or d != "T"]
        return torch.empty([self.size(d) for d in names], dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Gathered:
    """One kernel of one pass of one variant, and how often the pass launches it."""

    variant: str
    phase: str
    launch: Launch
    launches: int


def gather(variant: Variant, shape: Shape, target: Target, states: bool = False) -> list[Gathered]:
    """Returns the distinct kernels that training and decoding launch on ``target``; none where the variant has no Triton form.

    With ``states`` the forward is given initial states and returns final ones.
    """
    operator = load(variant)
    if "triton" not in operator.backends:
        return []
    tensors = [shape.tensor(t, token=True).requires_grad_() for t in variant.inputs + variant.params]
    sizes = {d: shape.size(d) for t in variant.inputs + variant.params for d in t.shape if d not in ("B", "T")}
    carried = variant.causal and states
    fresh = tuple(_flat(operator.init_state(shape.b, "meta", **sizes))) if variant.causal else ()
    options: dict[str, Any] = {"backend": "triton", "output_final_state": carried}
    if carried:
        options["initial_state"] = _one(tuple(s.clone().requires_grad_() for s in fresh))
    found: dict[str, list[Launch]] = {}
    with record(target) as found["forward"]:
        made = _flat(operator(*tensors, **options))
    with record(target) as found["backward"]:
        torch.autograd.backward(made, [torch.empty_like(x) for x in made])
    if variant.causal:
        with record(target) as found["step"], torch.no_grad():
            operator.step(*[shape.tensor(t, token=False) for t in variant.inputs + variant.params], state=_one(fresh), backend="triton")
    return [
        Gathered(variant.name, phase, launch, launches.count(launch))
        for phase, launches in found.items()
        for launch in dict.fromkeys(launches)
    ]


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in _flat(part)]


def _one(states: tuple[torch.Tensor, ...]) -> Any:
    return states[0] if len(states) == 1 else states


def compile_all(
    variants: Sequence[Variant],
    targets: Sequence[Target],
    as_json: bool,
    *,
    chunk: int | None,
    states: bool,
    timeout: float,
    workers: int | None,
    dtype: str,
    dims: Sequence[tuple[str, int]],
    **sizes: int,
) -> bool:
    """Compiles and prints every kernel; returns whether all of them could be launched."""
    shape = Shape(**sizes, dtype=DTYPES[dtype], dims=tuple(dims))
    if chunk is not None:
        variants = [replace(v, chunk_default=chunk, chunk_sizes=(chunk,)) for v in variants]
    found = [g for t in targets for v in variants for g in gather(v, shape, t, states)]
    reports = _compile(found, timeout, workers)
    rows = [_row(g, r) for g, r in zip(found, reports, strict=True)]
    bare = sorted({v.name for v in variants} - {g.variant for g in found})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, shape, dtype)
    from click import echo

    for name in bare:
        echo(f"{name} has no Triton form at these sizes; it runs on torch", err=True)
    for row in rows:
        if row["failure"]:
            echo(f"{row['variant']} {row['pass']} {row['kernel']} for {row['target']}: {row['failure']}", err=True)
    return not bare and all(row["fits"] for row in rows)


def _row(g: Gathered, report: Report) -> dict[str, Any]:
    target = g.launch.target
    return {
        "variant": g.variant,
        "pass": g.phase,
        "kernel": report.kernel,
        "target": target.name,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "seconds": report.seconds,
        "launches": g.launches,
        "programs": g.launch.programs,
        "config": {**{k: v for k, v in g.launch.constants if isinstance(v, int | str)}, **dict(g.launch.options)},
        "fits": report.fits(target),
        "failure": report.failure,
    }


def _compile(found: Sequence[Gathered], timeout: float, workers: int | None) -> tuple[Report, ...]:
    """Compiles under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=len({g.launch for g in found}))

        def progress(report: Report) -> None:
            bar.update(task, advance=1, description=f"compiling ({report.kernel})")

        return compile_launches([g.launch for g in found], workers=workers, timeout=timeout, progress=progress)


def _print(rows: Sequence[dict[str, Any]], shape: Shape, dtype: str) -> None:
    from lagen.cli_table import table

    header = ("variant", "pass", "kernel", "target", "warps", "registers", "spill", "shared", "seconds", "")
    title = f"B={shape.b} T={shape.t} H={shape.h} K={shape.k} V={shape.v} {dtype}; spill in bytes a thread, shared in bytes a program"
    table(
        header,
        [
            (
                *(r[key] for key in ("variant", "pass", "kernel", "target")),
                r["config"].get("num_warps", 4),
                *(r[key] for key in ("registers", "spill_bytes", "shared_bytes")),
                f"{r['seconds']:.2f}",
                "" if r["fits"] else "cannot be launched",
            )
            for r in rows
        ],
        title,
    )
