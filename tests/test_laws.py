"""The laws: kept by the recurrence itself, by every shipped spec and by random ones; broken by operators with one planted mistake."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_specs import Recipe, recipes

import lagen
from lagen import data
from lagen.ir import roles
from lagen.ir.bounds import Bounds, facts_of
from lagen.ir.variant import Variant
from lagen.spec import read, read_text
from lagen.verify import cases, compare, laws
from lagen.verify.cases import Extent
from lagen.verify.oracle import Tensors, evaluate, oracle

PATHS = {path.stem: path for path in data.specs()}


class Faithful:
    """The recurrence in float32 behind the operator's interface; a subclass plants one mistake."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        outputs, final = oracle(self.variant, inputs, params, scale, states, dtype=torch.float32)
        assert final is not None
        return tuple(o.to(inputs[0].dtype) for o in outputs), final

    def __call__(
        self,
        *args: torch.Tensor,
        scale: float | None,
        initial_state: object,
        output_final_state: bool,
        backend: str | None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> object:
        n = len(self.variant.inputs)
        states = (initial_state,) if isinstance(initial_state, torch.Tensor) else initial_state
        run = self.packed(cu_seqlens, scale)
        outputs, final = run(args[:n], args[n:], states)
        return outputs[0], final if len(final) > 1 else final[0]

    def packed(self, cu_seqlens: torch.Tensor | None, scale: float | None) -> laws.Run:
        def one(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors]:
            return self.run(inputs, params, scale, states)

        return one if cu_seqlens is None else laws.apart(one, tuple(cu_seqlens.diff().tolist()))

    def step(self, *args: torch.Tensor, state: object, scale: float | None, backend: str | None) -> object:
        n = len(self.variant.inputs)
        states = state if isinstance(state, tuple) else (state,)
        outputs, final = self.run(tuple(x.unsqueeze(1) for x in args[:n]), args[n:], scale, states)
        return outputs[0].squeeze(1), final if len(final) > 1 else final[0]


class NoGateGradient(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        return super().run((*inputs[:3], inputs[3].detach()), params, scale, states)


class LateGate(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        return super().run((*inputs[:3], inputs[3].roll(1, 1)), params, scale, states)


class ForgetsTheState(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        return super().run(inputs, params, scale, None)


class CutsTheStatesGradient(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        outputs, final = super().run(inputs, params, scale, states)
        return outputs, tuple(s.detach() for s in final)


class IgnoresScale(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        return super().run(inputs, params, None, states)


class PeeksAhead(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        outputs, final = super().run(inputs, params, scale, states)
        return tuple(o + 1e-3 * o.sum(1, keepdim=True) for o in outputs), final


class NeverTheSame(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        outputs, final = super().run(inputs, params, scale, states)
        return tuple(o + 1e-2 * torch.rand_like(o) for o in outputs), final


class SharesTheFirstState(Faithful):
    def packed(self, cu_seqlens: torch.Tensor | None, scale: float | None) -> laws.Run:
        run = super().packed(cu_seqlens, scale)
        if cu_seqlens is None:
            return run
        return lambda inputs, params, states: run(inputs, params, tuple(s[:1].expand_as(s) for s in states or ()))


class StandsStill(Faithful):
    def step(self, *args: torch.Tensor, state: object, scale: float | None, backend: str | None) -> object:
        o, _ = super().step(*args, state=state, scale=scale, backend=backend)  # type: ignore[misc]
        return o, state


class ClampsGates(Faithful):
    def run(self, inputs: Tensors, params: Tensors, scale: float | None, states: Tensors | None) -> tuple[Tensors, Tensors]:
        return super().run((*inputs[:3], inputs[3].clamp(min=-4)), params, scale, states)


def broken(op: Faithful, *named: str) -> set[str]:
    return {r.law for r in laws.check(op, op.variant, laws=named) if not r.ok}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_the_recurrence_keeps_the_laws(name: str) -> None:
    variant = read(PATHS[name])
    if variant.causal:
        assert broken(Faithful(variant)) == set()


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        (NoGateGradient, "lengths"),
        (LateGate, "lengths"),
        (ForgetsTheState, "segments"),
        (CutsTheStatesGradient, "segments"),
        (IgnoresScale, "heads"),
        (PeeksAhead, "future"),
        (NeverTheSame, "repeats"),
        (StandsStill, "steps"),
        (SharesTheFirstState, "packed"),
        (ClampsGates, "gates"),
    ],
)
def test_a_mistake_breaks_its_law(mistake: Callable[[Variant], Faithful], law: str) -> None:
    assert broken(mistake(read(PATHS["gla"])), law) == {law}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_shipped_specs_keep_the_laws(name: str) -> None:
    results = list(laws.check(lagen.load(PATHS[name]), read(PATHS[name]), "torch"))
    assert [r for r in results if not r.ok] == []


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes())
def test_random_specs_keep_the_laws(recipe: Recipe) -> None:
    variant = read_text(recipe.text(), recipe.name)
    results = list(laws.check(lagen.load(variant), variant, "torch"))
    assert [r for r in results if not r.ok] == []


@pytest.mark.parametrize("name", sorted(PATHS))
def test_cases_keep_to_the_assumptions_and_reach_their_gates(name: str) -> None:
    variant = read(PATHS[name])
    for regime in cases.regimes(variant):
        case = cases.make(variant, Extent(23), regime, torch.bfloat16, carried=True)
        assert all(bool((x != 0).all()) for x in evaluate(variant, variant.assumptions, case.inputs, case.params))
        for gate in roles.gates(variant):
            log = evaluate(variant, [gate], case.inputs, case.params)[0].log()
            assert bool((log <= 0).all())
            closed = math.log(Bounds(facts_of(variant)).interval(gate)[0] or 1e-300)  # RWKV-7's decay stops at exp(-0.61)
            if regime in cases.TARGETS and name != "longhorn":  # whose gates cannot all close: they share one unit
                assert abs(log.mean().item() - max(cases.TARGETS[regime], closed)) <= 2e-3
            if regime == "resets" and not variant.params and closed < -100 and name != "longhorn":
                assert log.min() < -100 and log.max() > -0.2
        for declared, x in zip(variant.inputs, case.inputs, strict=True):
            assert x.dtype == (torch.float32 if declared.name in roles.gate_inputs(variant) else torch.bfloat16)
        again = cases.make(variant, Extent(23), regime, torch.bfloat16, carried=True)
        assert all(torch.equal(a, b) for a, b in zip(case.inputs + case.params, again.inputs + again.params, strict=True))


def test_heads_are_grouped_where_the_spec_names_both() -> None:
    assert cases.sizes(read(PATHS["mamba2"]), Extent(3, heads=2))["HV"] == 4
    assert cases.sizes(read(PATHS["gla"]), Extent(3, heads=2))["HV"] == 2


def test_errors_are_relative_and_see_what_is_not_finite() -> None:
    x = torch.tensor([3.0, 4.0])
    assert compare.error(x * 1.01, x) == pytest.approx(0.01, rel=1e-4)
    assert compare.error(torch.tensor([math.nan, 4.0]), x) == math.inf
    assert compare.error(x[:1], x) == math.inf
    assert compare.error(torch.full((4,), 1e-3), torch.zeros(4)) == pytest.approx(1e-3)
    assert compare.error(torch.zeros(2), x * 1e-9) == pytest.approx(1.0), "a small gradient is no zero"
    assert compare.error(torch.zeros(2), x.double() * 1e-80) == 0.0, "what float32 cannot hold is"
    assert compare.error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_a_limit_follows_the_yardstick_only_where_it_is_worse_than_the_base() -> None:
    assert compare.limit(torch.float32) == compare.limit(torch.float32, 1e-6) == 2e-5
    assert compare.limit(torch.bfloat16, 0.01) == 0.04
    assert compare.limit(torch.bfloat16) == 2.0**-7


def test_results_are_plain_and_the_worst_is_found() -> None:
    good = laws.LawResult("lengths", "T 3", "o", 1e-7, 2e-5)
    bad = replace(good, tensor="dq", error=math.inf)
    assert bad.to_json() == {"law": "lengths", "case": "T 3", "tensor": "dq", "error": None, "limit": 2e-5, "ok": False}
    assert laws.worst([good, bad]) == [bad]
