"""Corrections: delta rules and low-rank transitions, of gains near 0, 1 and 2 and repeated keys, and one that nobody published."""

from __future__ import annotations

import pytest
import torch

import lagen
from lagen.data import spec
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.spec import read, read_text
from lagen.verify import cases, laws
from lagen.verify.compare import error
from lagen.verify.oracle import oracle

UNPUBLISHED = """\
name: unpublished
inputs:
  q: [H, K]
  k: [H, K]
  e: [H, K]
  v: [H, V]
  g: [H, K]
  beta: [H]
assume:
  - g <= 0
  - beta >= 0
  - beta * (e @ e) <= 1
  - k @ k <= 1
define:
  phi(x): softplus(x) + 0.1
recurrence:
  S: exp(g) * S[t-1] + outer(k, v) - beta * outer(l2norm(e), l2norm(e) @ S[t-1])
  z: exp(g) * z[t-1] + phi(k)
  o: (phi(q) @ S[t]) / (phi(q) @ z[t])
"""
"""A decay per key, a correction of the undecayed past, erase and write keys apart, a normalised readout."""


def test_a_transition_that_nobody_published_keeps_every_law() -> None:
    variant = read_text(UNPUBLISHED)
    found = list(laws.check(lagen.load(variant), variant))
    assert found and all(r.ok for r in found), [r for r in found if not r.ok]


def test_the_adjoint_of_a_delta_rule_is_one_that_a_person_would_write() -> None:
    adjoint = differentiate(canonicalise(read(spec("delta_rule"))))
    (back,) = adjoint.states
    (solve,) = back.solves
    assert str(solve) == "dS_u = (q @ k) * (do * scale) + readout[dS](k, dim=K, at=later)"
    assert str(dict(adjoint.gradients)["v"]) == "dS_u * beta"
    assert "inverse" not in str(adjoint), "(I + L)^-1 needs no adjoint of its own"


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 2.0])
@pytest.mark.parametrize("name", ["delta_rule", "gated_deltanet", "kda"])
def test_gains_of_unit_keys(name: str, beta: float) -> None:
    op, variant = lagen.load(name), read(spec(name))
    rng = torch.Generator().manual_seed(3)
    case = cases.make(variant, cases.Extent(70), "mild", carried=True)
    table = dict(zip((t.name for t in variant.inputs), case.inputs, strict=True))
    keys = torch.randn(table["k"].shape, generator=rng)
    keys[:, 20:50] = keys[:, 20:21]  # repeated identical keys
    table["k"] = torch.nn.functional.normalize(keys, dim=-1) * (1.0 - 1e-6)
    table["beta"] = torch.full_like(table["beta"], beta)
    inputs = [x.requires_grad_() for x in table.values()]
    state = tuple(s.clone().requires_grad_() for s in case.initial_states or ())
    out, final = op(*inputs, initial_state=state[0], output_final_state=True)
    d_out, d_state = case.d_outputs[0], case.d_states[0]
    got = torch.autograd.grad((out, final), [*inputs, *state], (d_out, d_state))
    exact = [x.detach().double().requires_grad_() for x in (*inputs, *state)]
    (ref,), finals = oracle(variant, tuple(exact[:-1]), (), initial_states=(exact[-1],))
    assert finals is not None
    want = torch.autograd.grad((ref, finals[0]), exact, (d_out.double(), d_state.double()))
    assert error(out.detach(), ref.detach()) <= 2e-5
    assert error(final.detach(), finals[0].detach()) <= 2e-5
    for name_, a, b in zip([*table, "S"], got, want, strict=True):
        assert error(a, b) <= 2e-5, name_
