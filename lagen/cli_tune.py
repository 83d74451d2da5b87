"""`lagen tune`: searches the jobs of each spec under a live display, tables what was found, and writes it where asked."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lagen.cli_table import table
from lagen.ir.variant import Variant
from lagen.runtime.choice import processor
from lagen.targets.target import find
from lagen.targets.tuned import user_folder
from lagen.tune.job import Job, job
from lagen.tune.outcome import Timed
from lagen.tune.run import Result, run
from lagen.tune.search import Budget, State, describe
from lagen.tune.space import searches, space_of
from lagen.tune.store import StoreError, put
from lagen.tune.studies import BadStorage, Busy


def seconds(text: str) -> float:
    """Reads a time, 90s, 5m or 2h; raises click.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not found:
        raise click.BadParameter(f"{text!r}: write 90s, 5m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def device_of(text: str) -> tuple[str, bool]:
    """Returns a device as entries name it, and whether it is in this machine; raises UnknownTarget."""
    if text == "cpu":
        return processor(), True
    target = find(text)
    return target.name, _is_here(target.name)


def _is_here(name: str) -> bool:
    """Tells whether the GPU of a target is in this machine."""
    import torch

    if not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return name == f"hip:{properties.gcnArchName.partition(':')[0]}"
    return name == f"cuda:{properties.major}{properties.minor}"


def tune_all(
    variants: Sequence[Variant],
    device: str,
    dtypes: Sequence[str],
    sizes: dict[str, int],
    shape: tuple[int, int, int],
    threads: int,
    budget: Budget,
    storage: str,
    timeout: float,
    rounds: int,
    out: Path | None,
    png: Path | None,
    passes: Sequence[str],
    seed: int | None,
) -> bool:
    """Tunes every variant; returns whether every search found something to say. ``out`` is the folder to write to."""
    name, here = device_of(device)
    jobs: list[Job] = []
    for v in variants:
        wanted = [s for s in searches(v, name) if not passes or set(s) & set(passes)]
        if not wanted:
            click.echo(f"{v.name} has nothing to tune on {device}", err=True)
        jobs += [job(v, name, here, s, d, sizes, *shape, threads) for d in dtypes for s in wanted]
    results: list[Result] = []
    for i, j in enumerate(jobs):
        share = Budget(budget.trials, budget.seconds / len(jobs))
        with _display(j, share, f"{i + 1} of {len(jobs)}") as progress:
            try:
                results.append(run(j, share, storage, timeout, rounds, progress, seed))
            except (Busy, BadStorage) as error:
                raise click.ClickException(str(error)) from error
        _print(results[-1])
        if png:
            from lagen.tune.report import draw

            draw(results[-1], png if len(jobs) == 1 else png.with_stem(f"{png.stem}-{j.study}"))
    if out:
        _write(results, out)
    return bool(results) and all(r.entries for r in results)


def _write(results: Sequence[Result], out: Path) -> None:
    try:
        for r in results:
            written, dropped = put(out, r.job.name, r.job.digest, r.entries)
            for path in written:
                click.echo(f"wrote {path}")
            for miss in dropped:
                click.echo(f"replaced {miss}", err=True)
    except StoreError as error:
        raise click.ClickException(str(error)) from error


def folder(out: Path | None, write: bool) -> Path | None:
    """Returns where entries go: a folder that was named, the user's own where they are to be written, else nowhere."""
    return out or (user_folder() if write else None)


@contextmanager
def _display(j: Job, budget: Budget, place: str) -> Iterator[Any]:
    """Shows a search while it runs: best so far, trials, failures by reason, time left. Lines where there is no terminal."""
    console = Console(stderr=True)
    space, begun = space_of(j), time.monotonic()
    title = f"{j.name} {' + '.join(j.passes)} {j.dtype} {' '.join(f'{d}={n}' for d, n in j.dims)} on {j.device} ({place})"
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), console=console)
    task = bar.add_task(title, total=min(budget.trials, space.size), left="")
    first: list[int] = []

    def lines(state: State) -> Text:
        failed = ", ".join(f"{n} {reason.value}" for reason, n in state.failures.most_common()) or "none"
        best = state.best
        told = "none yet"
        if best is not None and isinstance(best.outcome, Timed):
            told = f"{describe(best, space)}: {best.outcome.time:.0f} us, {best.outcome.ratio:.3f} of the defaults' time"
        return Text(f"  best: {told}\n  trials: {len(state.done)} of {state.points} points; failed: {failed}")

    if not console.is_terminal:
        console.print(Text(title))

        def plain(state: State) -> None:
            if state.done:
                last = state.done[-1]
                console.print(Text(f"  {last.number}: {describe(last, space)}: {_worth(last.outcome)}"), width=200)

        yield plain
        return
    with Live(Group(bar, Text()), console=console, transient=True) as live:

        def shown(state: State) -> None:
            if not first:
                first.append(len(state.done))
            left = budget.seconds - (time.monotonic() - begun)
            bar.update(task, completed=len(state.done) - first[0], left=f"{left:.0f} s left" if math.isfinite(left) else "")
            live.update(Group(bar, lines(state)))

        yield shown


def _worth(outcome: object) -> str:
    if isinstance(outcome, Timed):
        return f"{outcome.time:.1f} us, {outcome.ratio:.3f} of the defaults' time, noise {outcome.noise:.3f}"
    return str(outcome)


def _print(result: Result) -> None:
    """Tables a finished search: its best trials, then failures by reason, then the verdict."""
    j, state, space = result.job, result.state, result.space
    how = "measured" if j.here else "modelled"
    title = f"{j.name} {' + '.join(j.passes)} {j.dtype} {' '.join(f'{d}={n}' for d, n in j.dims)}, {how} for {j.device}"
    timed = sorted((d for d in state.done if isinstance(d.outcome, Timed)), key=lambda d: d.outcome.ratio)  # type: ignore[union-attr]
    rows = [
        (d.number, describe(d, space), f"{d.outcome.time:.1f}", f"{d.outcome.ratio:.3f}", f"{d.outcome.noise:.3f}")
        for d in timed[:8]
        if isinstance(d.outcome, Timed)
    ]
    table(("trial", "differs from the defaults in", "us", "of their time", "noise"), rows, title)
    failed = ", ".join(f"{n} {reason.value}" for reason, n in state.failures.most_common())
    click.echo(f"{len(state.done)} of {state.points} points" + (f"; {failed}" if failed else ""))
    proof = result.proof
    if result.chosen.values and isinstance(proof, Timed):
        click.echo(f"chosen: {result.chosen}; {how} again: {proof.ratio:.3f} of the defaults' time (noise {proof.noise:.3f})")
    elif isinstance(proof, Timed):
        click.echo(f"the defaults stay: nothing beat them by more than the noise ({proof.noise:.3f})")
    else:
        click.echo(f"no entry: {proof or 'no trial finished'}")
