"""`lagen bench`: times the operator of one spec against its peers and prints a table, JSON or a plot."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from lagen.bench import PASSES, Report, bench, plot
from lagen.cli_table import table
from lagen.ir.variant import Variant
from lagen.runtime.load import load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lengths(text: str) -> tuple[int, ...]:
    """Reads a list of lengths, ``1024,3000``, or a range by doubling, ``1024:16384``; raises click.BadParameter."""
    first, colon, last = text.partition(":")
    parts = [first, last] if colon else text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise click.BadParameter(f"{text!r}: write 1024:16384 or 1024,4096")
    if not colon:
        return tuple(dict.fromkeys(int(p) for p in parts))
    out = [int(first)]
    while out[-1] * 2 <= int(last):
        out.append(out[-1] * 2)
    return tuple(out)


def run(
    variant: Variant,
    text: str,
    against: str,
    heads: int,
    size: int,
    repeats: int,
    threads: int,
    dtype: str,
    as_json: bool,
    png: Path | None,
) -> None:
    """Benches one variant and prints what was measured; raises click.ClickException where it cannot be."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = bench(
            load(variant, printed=("cpp",)),
            variant,
            lengths(text),
            tuple(p for p in against.split(",") if p and p != "installed"),
            heads,
            size,
            repeats,
            DTYPES[dtype],
        )
        if png:
            plot(report, png)
    except ValueError as wrong:
        raise click.ClickException(str(wrong)) from wrong
    except ModuleNotFoundError as missing:
        raise click.ClickException("a plot wants matplotlib: pip install matplotlib") from missing
    finally:
        torch.set_num_threads(before)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        _print(report)


def _print(report: Report) -> None:
    table(["pass", "T", "who", "median ms", "least ms", "times lagen"], report.rows(), f"{report.variant}: {report.how}\n{report.machine}")
    for who, of, exponent in report.slopes:
        print(f"{who}, {of}: time grows as T^{exponent:.2f}")
    for of, gemm, copy in report.shares:
        print(
            f"{of}: {gemm:.2f} of the GEMM rate ({report.gemm_rate:.0f} GFLOP/s), {copy:.2f} of the copy rate ({report.copy_rate:.0f} GB/s)"
        )
    for of in PASSES:
        told = ", ".join(f"T {t}: {mib:.1f}" for o, t, mib in report.memory if o == of)
        print(f"{of}, peak MiB above what is given and returned: {told}")
    for of in PASSES:
        crossing = report.crossover("sdpa", of)
        if crossing is not None:
            print(f"{of}: faster than sdpa {f'from T = {crossing:.0f}' if crossing else 'at every T'}")
    for line in report.left_out:
        print(f"left out: {line}")
