"""`lagen compile`: gathers the launches of a variant's forward, backward and step, compiles them, and tables what they need and take."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lagen.ir.variant import Variant
from lagen.runtime.launches import DTYPES, Gathered, Shape, gather
from lagen.targets.compile import Report, compile_launches
from lagen.targets.model import Modelled, model
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
    fill: bool,
    dtype: str,
    dims: Sequence[tuple[str, int]],
    **sizes: int,
) -> bool:
    """Compiles and prints every kernel; returns whether all of them could be launched."""
    shape = Shape(**sizes, dtype=DTYPES[dtype], dims=tuple(dims))
    tuned = None
    if chunk is not None:
        variants, tuned = [replace(v, chunk_default=chunk, chunk_sizes=(chunk,)) for v in variants], ()
    found: list[Gathered] = []
    refused: dict[str, str] = {}
    for v in variants:
        try:
            found += [g for t in targets for g in gather(v, shape, t, states, tuned)]
        except ValueError as error:  # sizes that the operator itself refuses
            refused[v.name] = str(error)
    reports = _compile(found, timeout, workers, fill)
    least = {v.name: minimum(v, shape) for v in variants}
    rows = [_row(g, r, shape) for g, r in zip(found, reports, strict=True)]
    bare = sorted({v.name for v in variants} - {g.variant for g in found} - set(refused))
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, shape, dtype, least)
    from click import echo

    for name in bare:
        echo(f"{name} has no Triton form at these sizes; it runs on torch", err=True)
    for name, reason in refused.items():
        echo(f"{name}: {reason}", err=True)
    for row in rows:
        if row["failure"]:
            echo(f"{row['variant']} {row['pass']} {row['kernel']} for {row['target']}: {row['failure']}", err=True)
    return not bare and not refused and all(row["fits"] for row in rows)


def minimum(variant: Variant, shape: Shape) -> dict[str, int]:
    """Returns the bytes that each pass must move, by pass: inputs and outputs once; for the backward those, and a gradient for each input.

    A step reads and writes its states as well, in float32.
    """
    known = {d: shape.size(d) for t in variant.inputs + variant.params for d in t.shape}
    known |= {"B": shape.b, "T": shape.t, "H": known.get("H", shape.h), "HV": known.get("HV", known.get("H", shape.h)), "": 1}

    def numel(names: Sequence[str]) -> int:
        return math.prod(known.get(d, shape.k) for d in names)

    inputs = sum(numel(t.shape) for t in variant.inputs)
    outputs = sum(numel(("B", "T", o.head, *o.dims)) for o in variant.outputs)
    states = sum(numel(("B", s.head, *s.dims)) for s in variant.states)
    size = shape.dtype.itemsize
    return {
        "forward": (inputs + outputs) * size,
        "backward": (2 * inputs + outputs) * size,
        "step": (inputs + outputs) * size // shape.t + 8 * states,
    }


def _row(g: Gathered, report: Report, shape: Shape) -> dict[str, Any]:
    target = g.launch.target
    fits = report.fits(target)
    modelled: Modelled | None = model(g.launch, report, target) if fits else None
    tokens = shape.b * (1 if g.phase == "step" else shape.t)
    taken: dict[str, Any] = {}
    if modelled:
        taken = {
            "occupancy": modelled.occupancy,
            "bytes": int(modelled.read + modelled.written),
            "bytes_per_token": round((modelled.read + modelled.written) / tokens, 1),
            "flops_per_token": round(modelled.flops / tokens, 1),
            "modelled_us": round(modelled.seconds * 1e6, 2),
            "bound": modelled.bound,
            "bounds_us": {name: round(t * 1e6, 2) for name, t in modelled.bounds},
        }
    return {
        "variant": g.variant,
        "pass": g.phase,
        "kernel": report.kernel,
        "target": target.name,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "instructions": dict(report.mix),
        "seconds": report.seconds,
        "launches": g.launches,
        "programs": g.launch.programs,
        **taken,
        "config": {**{k: v for k, v in g.launch.constants if isinstance(v, int | str)}, **dict(g.launch.options)},
        "fits": fits,
        "failure": report.failure,
    }


def _compile(found: Sequence[Gathered], timeout: float, workers: int | None, fill: bool) -> tuple[Report, ...]:
    """Compiles under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=len({g.launch for g in found}))

        def progress(report: Report) -> None:
            bar.update(task, advance=1, description=f"compiling ({report.kernel})")

        return compile_launches([g.launch for g in found], workers=workers, timeout=timeout, progress=progress, fill=fill)


def _print(rows: Sequence[dict[str, Any]], shape: Shape, dtype: str, least: dict[str, dict[str, int]]) -> None:
    """Tables the kernels, then each pass: bytes over the least that must move, and the modelled time."""
    from lagen.cli_table import table

    header = ("variant", "pass", "kernel", "target", "warps", "registers", "spill", "shared", "held", "tensor", "model us", "bound", "")
    title = f"B={shape.b} T={shape.t} H={shape.h} K={shape.k} V={shape.v} {dtype}; spill in bytes a thread, shared in bytes a program, "
    title += "held: programs on a processor at once, tensor: share of instructions"
    table(
        header,
        [
            (
                *(r[key] for key in ("variant", "pass", "kernel", "target")),
                r["config"].get("num_warps", 4),
                *(r[key] for key in ("registers", "spill_bytes", "shared_bytes")),
                r.get("occupancy", ""),
                f"{r['instructions'].get('tensor', 0) / max(1, sum(r['instructions'].values())):.2f}",
                r.get("modelled_us", ""),
                r.get("bound", ""),
                "" if r["fits"] else "cannot be launched",
            )
            for r in rows
        ],
        title,
    )
    passes: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        passes.setdefault((r["variant"], r["pass"], r["target"]), []).append(r)
    table(
        ("variant", "pass", "target", "launches", "bytes a token", "over the least", "flops a token", "modelled us"),
        [
            (
                *key,
                sum(r["launches"] for r in group),
                *(f"{sum(r['launches'] * r.get(k, 0) for r in group):.0f}" for k in ("bytes_per_token",)),
                f"{sum(r['launches'] * r.get('bytes', 0) for r in group) / max(1, least[key[0]][key[1]]):.2f}",
                f"{sum(r['launches'] * r.get('flops_per_token', 0) for r in group):.0f}",
                f"{sum(r['launches'] * r.get('modelled_us', 0) for r in group):.1f}",
            )
            for key, group in passes.items()
        ],
        "each pass: bytes of every launch, each tensor once; the time is modelled, not measured",
    )
