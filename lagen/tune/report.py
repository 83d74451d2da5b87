"""Draws a search: what each trial was worth, the best so far, and the trials that failed."""

from __future__ import annotations

from pathlib import Path

from lagen.tune.outcome import Failed, Timed
from lagen.tune.run import Result


def draw(result: Result, path: Path) -> None:
    """Draws a finished search as PNG; raises ModuleNotFoundError where matplotlib is not installed."""
    from matplotlib.figure import Figure

    timed = [(d.number, d.outcome.ratio) for d in result.state.done if isinstance(d.outcome, Timed)]
    failed = [(d.number, d.outcome.reason) for d in result.state.done if isinstance(d.outcome, Failed)]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.axhline(1.0, color="grey", linewidth=0.8, label="defaults")
    if timed:
        axes.plot(*zip(*timed, strict=True), "o", markersize=4, label="trials")
        best = [(n, min(r for m, r in timed if m <= n)) for n, _ in timed]
        axes.step(*zip(*best, strict=True), where="post", label="least so far")
    top = max((r for _, r in timed), default=1.0)
    for reason in dict.fromkeys(r for _, r in failed):
        places = [n for n, r in failed if r == reason]
        axes.plot(places, [top] * len(places), "x", label=reason.value)
    axes.set_xlabel("trial")
    axes.set_ylabel("time over the defaults' time")
    axes.legend(fontsize="small")
    j = result.job
    figure.suptitle(f"{j.name} {' + '.join(j.passes)} {j.dtype}, {'measured' if j.here else 'modelled'} for {j.device}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, format="png")
