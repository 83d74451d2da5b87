"""One job from its study to its entries: search, prove the winner anew, and say what was found."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lagen import __version__
from lagen.ir.tunable import CHUNK, Config, Tunables
from lagen.targets.tuned import Entry, find
from lagen.tune.job import Job
from lagen.tune.measure import Measure
from lagen.tune.modelled import Model
from lagen.tune.outcome import Failed, Outcome, Reason, Timed
from lagen.tune.search import Budget, Judge, State, search
from lagen.tune.space import space_of
from lagen.tune.studies import opened

PROOF = 3
"""How many times as many rounds the winner is timed at the end as a trial."""


@dataclass(frozen=True)
class Result:
    """What a job's search found. ``chosen`` is the defaults' config, empty, where nothing beat them by more than the noise."""

    job: Job
    space: Tunables
    state: State
    chosen: Config
    proof: Outcome | None
    entries: tuple[Entry, ...]


def run(
    job: Job,
    budget: Budget,
    storage: str = "",
    timeout: float = 120.0,
    rounds: int = 15,
    progress: Callable[[State], None] = lambda state: None,
    seed: int | None = None,
    judge: Judge | None = None,
) -> Result:
    """Searches a job, continuing its study where there is one, and re-measures the winner in a fresh process.

    Raises studies.Busy and studies.BadStorage.
    """
    space = space_of(job)
    judging = judge or judge_of(job, timeout, rounds)
    with opened(study_of(job, space), storage, seed) as study:
        state = search(study, space, judging, budget, progress, seed, known(job))
    chosen, proof = _choose(judging, space, state)
    return Result(job, space, state, chosen, proof, _entries(job, space, state, chosen, proof))


def study_of(job: Job, space: Tunables) -> str:
    """Names the study of a job over a space: where the space changes a search begins anew."""
    return f"{job.study}-{space_digest(space)}"


def known(job: Job) -> list[Config]:
    """Returns what was chosen before for a job's calls, as one config of all its passes; none where nothing was."""
    wanted = {e.key for e in job.entries(Config())}
    found: dict[str, int] = {}
    for e in find(job.name, job.digest, job.device).entries:
        if e.key in wanted:
            found |= {n if n == CHUNK else f"{e.of} {n}": v for n, v in e.config.values}
    return [Config.of(found)] if found else []


def _choose(judge: Judge, space: Tunables, state: State) -> tuple[Config, Outcome | None]:
    """Returns the winner and its proof: the best config that is proved, the defaults where that is none."""
    best = state.best
    if best is None:
        return _least_spilt(judge, space, state)
    proof: Outcome | None = best.outcome
    default = next((d.outcome for d in state.done if d.config == space.default), None)  # its trial may be lost, and wait behind others
    usable = isinstance(default or judge.judge(space.default, space.default, ()), Timed)
    timed = [(d.outcome.ratio, d) for d in state.done if isinstance(d.outcome, Timed)]
    ranked = [d for _, d in sorted(timed, key=lambda x: x[0])]
    ranked = [best, *(d for d in ranked if d is not best)] if usable else ranked
    for d in ranked if not usable else ranked[: 1 if isinstance(judge, Measure) else None]:
        if d.config == space.default:
            break
        proof = _prove(judge, space, d.config)
        if isinstance(proof, Timed) and (proof.ratio < 1.0 - proof.noise or not usable):
            return different(space, d.config), proof
        if isinstance(proof, Timed):
            break
    return Config(), proof if usable else None


def _least_spilt(judge: Judge, space: Tunables, state: State) -> tuple[Config, Outcome | None]:
    """Returns the config that spills least, where all do, of those whose numbers are right; the defaults answer for themselves."""
    spilt = [(d.outcome.excess, d) for d in state.done if isinstance(d.outcome, Failed) and d.outcome.reason == Reason.SPILLS]
    for _, d in sorted(spilt, key=lambda x: x[0]):
        if d.config == space.default or not isinstance(judge, Model) or judge.confirm(d.config) is None:
            return different(space, d.config), d.outcome
    return Config(), None


def judge_of(job: Job, timeout: float, rounds: int) -> Judge:
    """Returns who judges a job: the device where it is here, else the model."""
    return Measure(job, timeout, rounds) if job.here else Model(job, timeout)


def _prove(judge: Judge, space: Tunables, config: Config) -> Outcome:
    """Judges the winner once more against the defaults, with more rounds where it is timed."""
    if isinstance(judge, Measure):
        judge = replace(judge, rounds=judge.rounds * PROOF, timeout=judge.timeout * PROOF)
    if isinstance(judge, Model):
        failed = judge.confirm(config)
        if failed is not None:
            return failed
    return judge.judge(config, space.default, ())


def different(space: Tunables, config: Config) -> Config:
    """Returns what a config has that is no default."""
    default = space.default.table
    return Config.of({n: v for n, v in config.values if default[n] != v})


def space_digest(space: Tunables) -> str:
    """Returns the digest of a space: an entry of another one may mean something else."""
    return hashlib.sha256(str(space).encode()).hexdigest()[:8]


def _entries(job: Job, space: Tunables, state: State, chosen: Config, proof: Outcome | None) -> tuple[Entry, ...]:
    if proof is None:
        return ()
    timed = proof if isinstance(proof, Timed) else None
    notes = {
        "lagen": __version__,
        "space": space_digest(space),
        "batch": str(job.batch),
        "torch": importlib.metadata.version("torch"),
    }
    if timed and timed.note:
        notes["clock" if job.here else "model"] = timed.note
    if not job.here:
        notes["triton"] = importlib.metadata.version("triton")
    if len(job.passes) > 1:
        notes["times"] = "of " + " and ".join(job.passes) + " together"
    unfit = next((d.outcome for d in state.done if d.config == space.default and isinstance(d.outcome, Failed)), None)
    if unfit is not None:
        notes["defaults"] = str(unfit)
    if isinstance(proof, Failed) and proof.reason == Reason.SPILLS:
        notes["verdict"] = f"spills least: {proof.detail}"
    elif not chosen.values:
        notes["verdict"] = "nothing beat the defaults by more than the noise" if job.here else "nothing modelled better than the defaults"
    numbers = {} if timed is None else {"time": timed.time, "default": timed.default, "noise": timed.noise}
    if timed and not chosen.values:
        numbers["time"] = timed.default
    told: dict[str, Any] = {"trials": len(state.done), "notes": tuple(sorted(notes.items())), **numbers}
    return job.entries(chosen, "measured" if job.here else "modelled", **told)
