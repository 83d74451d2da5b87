"""`lagen check`: tests every law on the operators of some specs, watches interpreted kernels, and tables the worst errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lagen.cli_table import table
from lagen.ir.variant import Variant
from lagen.runtime.load import load
from lagen.verify.laws import LawResult, check, strain, worst

if TYPE_CHECKING:
    from lagen.verify.sanitize import Finding


def check_all(variants: Sequence[Variant], as_json: bool, backend: str | None, device: str, thorough: bool, every: bool) -> bool:
    """Checks and prints every variant; returns whether every law held and no kernel was caught at a fault.

    ``every`` prints each case's worst tensor, else each law's.
    """
    found: dict[str, list[LawResult]] = {}
    faults: dict[str, list[Finding]] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        for variant in variants:
            results = found[variant.name] = []
            with _watched(backend, device) as faults[variant.name]:
                for result in check(load(variant), variant, backend, device, thorough):
                    results.append(result)
                    bar.update(task, description=f"{variant.name} ({len(found)} of {len(variants)}): {result.law}")
    if as_json:
        print(json.dumps([_row(name, r) for name, results in found.items() for r in results], indent=2))
    else:
        _print(found, every)
    for name, findings in faults.items():
        for finding in findings:
            print(f"{name}: {finding}", file=sys.stderr)
    return all(r.ok for results in found.values() for r in results) and not any(faults.values())


@contextmanager
def _watched(backend: str | None, device: str) -> Iterator[list[Finding]]:
    """Runs the sanitizer where kernels are interpreted."""
    if backend != "triton" or device != "cpu":
        yield []
        return
    from lagen.verify.sanitize import sanitize

    with sanitize() as findings:
        yield findings


def _row(name: str, result: LawResult) -> dict[str, Any]:
    return {"variant": name, **result.to_json()}


def _print(found: dict[str, list[LawResult]], every: bool) -> None:
    rows = []
    for name, results in found.items():
        groups: dict[str, list[LawResult]] = {}
        for r in worst(results):
            groups.setdefault(f"{r.law}\0{r.case}" if every else r.law, []).append(r)
        for group in groups.values():
            shown = max(group, key=strain)
            broken = sum(not r.ok for r in group)
            mark = "ok" if not broken else f"BROKEN in {broken} of {len(group)}"
            rows.append((name, shown.law, len(group), shown.tensor, f"{shown.error:.1e}", f"{shown.limit:.1e}", mark, shown.case))
    table(("spec", "law", "cases", "worst", "error", "limit", "", "in"), rows)
