"""Variants that no shipped spec resembles: a spec alone gives forward, backward and decode, in every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from respell import random_tensors

import lagen
from lagen.spec import read_text
from lagen.verify.oracle import measure, oracle

SIZES = {"B": 2, "T": 37, "H": 1, "HV": 2, "K": 5, "V": 3}
HEAD = """\
name: {name}
inputs:
  q: [H, K]
  k: [H, K]
  v: [HV, V]
  g: [{g}]
  c: [H]
assume:
  - g <= 0
  - c <= 0
recurrence:
"""
VARIANTS = {
    "value_decay_silu_exclusive": ("HV, V", "S: exp(g) * S[t-1] + outer(silu(k), v); o: scale * (silu(q) @ S[t-1]) + c * v"),
    "scalar_and_key_decay": ("H, K", "S: exp(c) * (exp(g) * S[t-1]) + outer(k, v); o: q @ S[t]"),
    "value_side_read": ("H, K", "S: exp(g) * S[t-1] + outer(k, exp(c) * v); o: exp(g) * (S[t-1] @ v) + q"),
    "key_and_value_decay": ("HV, V", "S: exp(g) * (sigmoid(k) * S[t-1]) + outer(exp(c) * k, v); o: q @ S[t]"),
    "read_before_the_write": ("H, K", "S: exp(g) * S[t-1] + outer(k, v); o: exp(c) * (q @ (exp(g) * S[t-1])) + (q @ k) * tanh(v)"),
    "gated_output": ("H", "S: exp(g) * S[t-1] + outer(k, exp(c) * v); o: silu(q @ S[t]) * (k @ S[t-1])"),
    "bounded_normaliser": (
        "H",
        "S: exp(g) * S[t-1] + outer(k, exp(c) * v); n: exp(g) * n[t-1] + exp(c) * k; o: (q @ S[t]) / max(abs(q @ n[t]), 1)",
    ),
}


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_variant(name: str, backend: str, tmp_path: Path) -> None:
    g, recurrence = VARIANTS[name]
    text = HEAD.format(name=f"new_{name}", g=g) + "".join(f"  {line.strip()}\n" for line in recurrence.split(";"))
    variant = read_text(text)
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    op = lagen.load(path)
    inputs, _ = random_tensors(variant, 3, SIZES)
    sizes = measure(variant, inputs, ())
    rng = torch.Generator().manual_seed(4)
    start = tuple(torch.randn(sizes.shape(s), generator=rng) for s in variant.states)
    single = [x.float().requires_grad_() for x in (*inputs, *start)]
    double = [x.detach().double().requires_grad_() for x in single]
    n = len(inputs)
    scale = {"scale": 0.7} if variant.scaled else {}
    begun = tuple(single[n:]) if len(start) > 1 else single[n]
    o, final = op(*single[:n], **scale, initial_state=begun, output_final_state=True, backend=backend)
    got = (o, *final) if isinstance(final, tuple) else (o, final)
    (wanted,), ends = oracle(variant, tuple(double[:n]), (), 0.7, tuple(double[n:]))
    reference = (wanted, *(ends or ()))
    cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=rng) for x in reference]
    mine = torch.autograd.grad(got, single, [c.float() for c in cotangents])
    theirs = torch.autograd.grad(reference, double, cotangents)
    for a, b in zip((*got, *mine), (*reference, *theirs), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-5

    state = begun if isinstance(begun, tuple) else (begun,)
    state = tuple(s.detach().clone() for s in state)
    for t in range(3):
        token = [x.detach()[:, t] for x in single[:n]]
        o_t, _ = op.step(*token, state if len(state) > 1 else state[0], **scale)
        torch.testing.assert_close(o_t.double(), wanted[:, t].detach(), rtol=1e-4, atol=1e-4)
