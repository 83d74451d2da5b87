"""Spaces: which tunables a job has, and the one place where they become Optuna's distributions."""

from __future__ import annotations

import os

from optuna.distributions import CategoricalDistribution

from lagen.emit.cpp_fit import Fallback
from lagen.emit.cpp_plan import plan_backward, plan_forward
from lagen.emit.cpp_plan import tunables as cpp_tunables
from lagen.emit.render import kernels_of
from lagen.ir.tunable import Config, Tunables
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.plan import plan
from lagen.passes.schedule import tunables
from lagen.runtime.choice import WIDTHS
from lagen.tune.job import Job
from lagen.verify.cases import Extent, sizes


def distributions(space: Tunables) -> dict[str, CategoricalDistribution]:
    """Returns the space as Optuna samples it. What has one value only is no choice."""
    return {t.name: CategoricalDistribution(t.values) for t in space.tunables if len(t.values) > 1}


def config_of(space: Tunables, params: dict[str, object]) -> Config:
    """Returns what a trial's params say, with the defaults for what was no choice."""
    chosen = {name: int(str(value)) for name, value in params.items()}
    return Config.of(space.default.table | chosen)


def params_of(space: Tunables, config: Config) -> dict[str, int]:
    """Returns a config as a trial's params."""
    choices = distributions(space)
    return {name: value for name, value in config.values if name in choices}


def searches(variant: Variant, device: str) -> tuple[tuple[str, ...], ...]:
    """Lists the searches that a variant has on a device, as the passes of each; none where nothing may be chosen there."""
    if device.startswith("cpu"):
        return tuple((of,) for of in ("forward", "backward") if cpu_space(variant, of).tunables)
    if isinstance(render_kernels(variant), Fallback):
        return ()
    return (("forward", "backward"), ("step",)) if variant.causal else (("forward", "backward"),)


def space_of(job: Job) -> Tunables:
    """Returns what a job may choose: with the device at hand everything, else what a model can rank."""
    variant, found = job.variant, Tunables(())
    for of in job.passes:
        cpu = job.device.startswith("cpu")
        found = found + (cpu_space(variant, of, job.threads) if cpu else gpu_space(job, of))
    return found if job.here else found.only_static()


def gpu_space(job: Job, of: str) -> Tunables:
    """Returns the tunables of one pass of the Triton kernels."""
    variant = job.variant
    recurrence = canonicalise(variant)
    planned = plan(recurrence, differentiate(recurrence))
    known = sizes(variant, Extent(1, 1, 1, 1, job.dims))
    chunks, itemsize = recurrence.chunk_sizes, WIDTHS[job.dtype]
    return tunables(planned, of, job.device, chunks, recurrence.chunk_default, itemsize, known)


def render_kernels(variant: Variant) -> str | Fallback:
    """Returns the Triton part of a variant's module, or says why there is none."""
    recurrence = canonicalise(variant)
    return kernels_of(recurrence, differentiate(recurrence))


def cpu_space(variant: Variant, of: str, threads: int | None = None) -> Tunables:
    """Returns the tunables of one pass of the generated C++; none where the pass does not run there."""
    recurrence = canonicalise(variant)
    adjoint = differentiate(recurrence)
    forward, backward = plan_forward(recurrence), plan_backward(adjoint)
    if isinstance(forward, Fallback) or isinstance(backward, Fallback):
        return Tunables(())
    return cpp_tunables(forward if of == "forward" else backward, of, threads or os.cpu_count() or 1)
