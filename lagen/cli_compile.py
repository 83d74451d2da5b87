"""`lagen compile`: gathers the launches of a variant's forward, backward and step, compiles them, and tables what they need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lagen.ir.variant import Variant
from lagen.runtime.launches import DTYPES, Gathered, Shape, gather
from lagen.targets.compile import Report, compile_launches
from lagen.targets.target import Target


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
