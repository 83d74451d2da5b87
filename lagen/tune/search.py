"""The search: asks a study for points, has each judged, tells what it was worth, and knows the winner.

The default and its neighbours come first. No point is judged twice, by this tuner or by another on the same study: TPE repeats itself, so a
point that was met before is exchanged for one that was not. The incumbent changes only where a trial beats it by more than the noise.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lagen.ir.tunable import Config, Tunables
from lagen.tune.outcome import STATIC, Failed, Outcome, Reason, Timed
from lagen.tune.space import config_of, distributions, params_of
from lagen.tune.studies import OUTCOME, beating, recover

PATIENCE = 30.0
"""Seconds that a trial which is being set up by another worker may take to say its point."""


class Judge(Protocol):
    """Whoever says what a config is worth: tune/measure on the device, tune/modelled without it."""

    def judge(self, config: Config, incumbent: Config, known: Collection[str]) -> Outcome:
        """Judges a config beside the incumbent; ``known`` are the codes of those before it."""
        ...


@dataclass(frozen=True)
class Done:
    """One finished trial."""

    number: int
    config: Config
    outcome: Outcome


@dataclass(frozen=True)
class State:
    """What a study knows: its finished trials in order, and of how many points."""

    done: tuple[Done, ...]
    points: int

    @property
    def best(self) -> Done | None:
        """Returns the incumbent: the last trial that beat the one before it, and the defaults, by more than the noise; else the first."""
        best: Done | None = None
        for d in self.done:
            if isinstance(d.outcome, Timed) and (best is None or (d.outcome.wins and d.outcome.ratio < 1.0 - d.outcome.noise)):
                best = d
        return best

    @property
    def failures(self) -> Counter[Reason]:
        """Counts failures by reason."""
        return Counter(d.outcome.reason for d in self.done if isinstance(d.outcome, Failed))

    @property
    def codes(self) -> frozenset[str]:
        """Returns the machine codes met so far."""
        return frozenset(d.outcome.code for d in self.done if d.outcome.code)


@dataclass(frozen=True)
class Budget:
    """When a search ends: after so many more trials, so many seconds, or once every point was judged."""

    trials: int = 1 << 30
    seconds: float = math.inf


def search(
    study: Study,
    space: Tunables,
    judge: Judge,
    budget: Budget,
    progress: Callable[[State], None] = lambda state: None,
    seed: int | None = None,
    known: Collection[Config] = (),
) -> State:
    """Searches until the budget is spent or no point is left, and returns what the study knows then.

    ``known`` are configs that were chosen before: they come right after the default.
    """
    _enqueue_first(study, space, known)
    choices = distributions(space)
    started, spent, dice = time.monotonic(), 0, random.Random(seed)
    state = state_of(study, space)
    progress(state)
    while spent < budget.trials and time.monotonic() - started < budget.seconds and len(taken(study)) < state.points:
        recover(study)
        trial = study.ask(choices)
        if not _claims(study, trial):
            trial = _exchange(study, space, trial, dice)
        if trial is None:
            break
        spent += 1
        config = config_of(space, dict(trial.params))
        with beating(study, trial._trial_id):
            before = state.best
            outcome = _judged(space, judge, config, before.config if before else space.default, state.codes)
        tell(study, trial, outcome)
        state = state_of(study, space)
        progress(state)
    return state


def _judged(space: Tunables, judge: Judge, config: Config, incumbent: Config, codes: Collection[str]) -> Outcome:
    """Judges a config, after the limits of its space."""
    complaint = space.complaint(config)
    if complaint:
        return Failed(Reason.LIMIT, complaint, max(float(x.excess(config.table)) for x in space.limits))
    return judge.judge(config, incumbent, codes)


def _enqueue_first(study: Study, space: Tunables, known: Collection[Config]) -> None:
    """Queues the default, what is known and the default's neighbours, those that were not queued before."""
    whole = [Config.of(space.default.table | c.table) for c in known if not space.complaint(c)]
    for config in (space.default, *whole, *space.neighbours()):
        study.enqueue_trial(params_of(space, config), skip_if_exists=True)


def tell(study: Study, trial: Trial, outcome: Outcome) -> None:
    """Writes down what a trial was worth; a point that may not be chosen is pruned where that was known before it ran, else failed."""
    held = {"kind": type(outcome).__name__} | asdict(outcome)
    trial.set_user_attr(OUTCOME, held)
    if isinstance(outcome, Timed):
        trial.set_constraint("feasible", 0.0)
        study.tell(trial, outcome.ratio)
        return
    trial.set_constraint("feasible", max(outcome.excess, 1e-6))
    study.tell(trial, state=TrialState.PRUNED if outcome.reason in STATIC else TrialState.FAIL)


def outcome_of(trial: FrozenTrial) -> Outcome | None:
    """Reads what a finished trial was worth; None where it was lost, or exchanged."""
    held = dict(trial.user_attrs.get(OUTCOME, {}))
    kind = held.pop("kind", "")
    if kind == "Timed":
        return Timed(**held)
    return Failed(**held | {"reason": Reason(held["reason"])}) if kind == "Failed" else None


def state_of(study: Study, space: Tunables) -> State:
    """Reads what the study knows."""
    done = []
    for t in study.get_trials(deepcopy=False):
        outcome = outcome_of(t) if t.state.is_finished() else None
        if outcome is not None:
            done.append(Done(t.number, config_of(space, dict(t.params)), outcome))
    return State(tuple(done), math.prod(len(d.choices) for d in distributions(space).values()))


# ---- no point twice ---------------------------------------------------------------------------------------------------------------


def _point(params: Mapping[str, object]) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(params.items()))


def taken(study: Study) -> set[tuple[tuple[str, object], ...]]:
    """Returns the points that were judged."""
    return {_point(t.params) for t in study.get_trials(deepcopy=False) if t.state.is_finished() and outcome_of(t) is not None}


def _claims(study: Study, trial: Trial) -> bool:
    """Tells whether a trial's point is its own: no finished trial has it, and no running one of a smaller number.

    One of a smaller number that has not said its point yet is waited for; so of two workers that ask at once exactly one goes on.
    """
    mine, width = _point(dict(trial.params)), len(trial.params)
    until = time.monotonic() + PATIENCE
    while True:
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        if any(t.state.is_finished() and outcome_of(t) is not None and _point(t.params) == mine for t in others):
            return False
        before = [t for t in others if t.state == TrialState.RUNNING and t.number < trial.number]
        if any(_point(t.params) == mine for t in before if len(t.params) == width):
            return False
        if all(len(t.params) == width for t in before) or time.monotonic() > until:
            return True
        time.sleep(0.05)


def _exchange(study: Study, space: Tunables, trial: Trial, dice: random.Random) -> Trial | None:
    """Gives up a trial whose point was met before, and asks for one that was not; None where none is left."""
    choices = distributions(space)
    while True:
        study.tell(trial, state=TrialState.FAIL)
        met = {_point(t.params) for t in study.get_trials(deepcopy=False) if t.params and (outcome_of(t) or t.state == TrialState.RUNNING)}
        free = [p for c in space.all() if _point(p := dict(params_of(space, c))) not in met]
        if not free:
            return None
        study.enqueue_trial(dice.choice(free), skip_if_exists=False)
        trial = study.ask(choices)
        if _claims(study, trial):
            return trial


def describe(done: Done, space: Tunables) -> str:
    """Says in what a config differs from the defaults."""
    default = space.default.table
    changed = [(n, v) for n, v in done.config.values if default[n] != v]
    return ", ".join(f"{n} {v}" for n, v in changed) or "the defaults"
