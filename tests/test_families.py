"""States in stages, read freely, with dense decay, and peaks: small specs of each against the oracle, and inputs of any size."""

from __future__ import annotations

import pytest
import torch

import lagen
from lagen.explain import explain
from lagen.ir.expr import reads
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.spec import read_text
from lagen.verify import cases, laws
from lagen.verify.cases import Extent
from lagen.verify.laws import Subject
from lagen.verify.sanitize import poisoned

KV = "q: [H, K]; k: [H, K]; v: [HV, V]"
SPECS = {  # inputs, init, recurrence
    "stages_of_two_heads": (
        f"{KV}; g: [H]",
        "",
        "A: sigmoid(g) * A[t-1] + outer(k, v); B: B[t-1] + outer(k, tanh(q @ A[t])); o: q @ B[t]",
    ),
    "written_by_the_past": (KV, "", "A: A[t-1] + outer(k, v); B: 0.5 * B[t-1] + outer(k, q @ A[t-1]); o: (q @ B[t]) + (k @ A[t])"),
    "decayed_by_a_read": (
        KV,
        "",
        "z: 0.9 * z[t-1] + k; S: sigmoid(dot(q, z[t])) * S[t-1] + outer(k, v); o: q @ S[t]",
    ),
    "normalised_by_a_vector": (
        KV,
        "",
        "z: z[t-1] + k * k; S: 0.9 * S[t-1] + outer(k * rsqrt(z[t] + 1e-3), v); o: q @ S[t-1]",
    ),
    "delta_rule_with_a_preconditioner": (
        f"{KV}; beta: [H]; g: [H]",
        "",
        "_k: l2norm(k); z: sigmoid(g) * z[t-1] + _k * _k; _w: _k / (1 + z[t]); _R: sigmoid(g) * S[t-1]; "
        "S: _R + sigmoid(beta) * outer(_w, v - _k @ _R); o: q @ S[t]",
    ),
    "three_stages": (
        f"{KV}; x: [H]",
        "",
        "h: 0.8 * h[t-1] + x; A: A[t-1] + outer(k, h[t] * v); n: n[t-1] + dot(k, k) + h[t-1]; o: (q @ A[t]) / max(abs(n[t]), 1)",
    ),
    "vector_through_a_matrix": ("x: [D]; f: [D]; W: [D, E]", "", "h: sigmoid(f) * h[t-1] + x; o: silu(h[t]) @ W"),
    "dense_of_two_kinds": (
        "x: [E]; B: [N]; C: [N]; r: [E]; dt: [E]; a: [N]",
        "",
        "S: exp(-outer(softplus(dt), softplus(a))) * S[t-1] * sigmoid(x) + outer(x, B); o: S[t] @ C; p: r @ S[t-1]",
    ),
    "dense_on_the_other_side": (
        "x: [E]; B: [N]; C: [N]; dt: [N]",
        "",
        "S: (1 - outer(sigmoid(dt), sigmoid(x))) * S[t-1] + outer(B, x); o: C @ S[t]",
    ),
    "dense_of_heads_and_a_matrix_a_token": (
        "x: [HV, V]; k: [H, K]; q: [H, K]; g: [H, K, V]",
        "",
        "S: sigmoid(g) * S[t-1] + outer(k, x); o: silu(q @ S[t]); p: x @ S[t-1]",
    ),
    "dense_that_a_vector_reads": (
        "x: [E]; B: [N]; f: [E]; a: [N]",
        "",
        "S: exp(-outer(softplus(x), softplus(a))) * S[t-1] + outer(x, B); h: sigmoid(f) * h[t-1] + tanh(S[t] @ B); o: h[t]",
    ),
    "vectors_in_stages": (
        "x: [HV, D]; f: [H, D]; a: [H]",
        "",
        "z: z[t-1] + x * x; h: sigmoid(f) * h[t-1] + x * rsqrt(1 + z[t]); n: sigmoid(a) * n[t-1] + 1; o: h[t-1] / n[t]; p: dot(x, h[t])",
    ),
    "vectors_and_a_sum": (
        "x: [HV, D]; f: [H, D]; a: [H]",
        "",
        "h: sigmoid(f) * h[t-1] + l2norm(x); n: sigmoid(a) * n[t-1] + 1; o: h[t] * h[t-1] / n[t]; p: h[t] * dot(x, f)",
    ),
    "peak_that_is_read": ("x: [D]; a: [D]", "m: -3.0", "m: max(m[t-1] - softplus(a), x); o: tanh(m[t]) + m[t-1]"),
    "peak_of_a_head": (
        f"{KV}; i: [H]; f: [H]",
        "m: -1.0e30",
        "m: max(m[t-1] + logsigmoid(f), i); S: exp(m[t-1] + logsigmoid(f) - m[t]) * S[t-1] + exp(i - m[t]) * outer(k, v); o: q @ S[t]",
    ),
}


def spec(name: str) -> str:
    """Writes a spec of SPECS."""
    inputs, init, recurrence = SPECS[name]

    def lines(text: str) -> str:
        return "".join(f"  {line.strip()}\n" for line in text.split(";"))

    begin = f"init:\n{lines(init)}" if init else ""
    return f"name: {name}\ninputs:\n{lines(inputs)}{begin}recurrence:\n{lines(recurrence)}chunk: {{default: 16, sizes: [16]}}\n"


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", SPECS)
def test_the_recurrence_and_every_gradient(name: str, backend: str | None) -> None:
    variant = read_text(spec(name))
    op = lagen.load(variant)
    subject = Subject(op, variant, backend)
    for time, carried in ((35, True), (1, False)):
        case = cases.make(variant, Extent(time, heads=2), carried=carried)
        results = list(laws.judge("families", subject, case, laws.call(subject, None)))
        assert [r for r in results if not r.ok] == []
    assert all(r.ok for r in laws.check(op, variant, backend, laws=("steps", "segments")))


IN_SWEEPS = ("stages_of_two_heads", "written_by_the_past", "normalised_by_a_vector", "three_stages")
IN_SCANS = ("peak_that_is_read", "vectors_in_stages", "vectors_and_a_sum", *(n for n in SPECS if n.startswith("dense")))


@pytest.mark.parametrize("name", [*IN_SWEEPS, *IN_SCANS])
def test_stages_and_dense_decays_in_kernels(name: str) -> None:
    variant = read_text(spec(name))
    op = lagen.load(variant)
    case = cases.make(variant, Extent(35, batch=1, heads=1), carried=True)
    with poisoned():
        results = list(laws.judge("families", Subject(op, variant, "triton"), case, laws.call(Subject(op, variant, "triton"), None)))
    assert [r for r in results if not r.ok] == []


def test_channels_of_vector_states_may_be_many() -> None:
    variant = lagen.spec.read(lagen.data.spec("rwkv4"))
    subject = Subject(lagen.load(variant), variant, "triton")
    case = cases.make(variant, Extent(5, batch=1, dims=(("D", 300),)), carried=True)
    with poisoned():
        results = list(laws.judge("families", subject, case, laws.call(subject, None)))
    assert [r for r in results if not r.ok] == []


@pytest.mark.parametrize(("name", "backend"), [("mlstm", None), ("rwkv4", None), ("abc", None), ("rwkv4", "triton")])
@pytest.mark.parametrize("size", [-800.0, 800.0])
def test_peaks_keep_exp_in_range(name: str, backend: str | None, size: float) -> None:
    op = lagen.load(name)
    variant = lagen.spec.read(lagen.data.spec(name))
    case = cases.make(variant, Extent(37), carried=False)
    moved = {"mlstm": "i", "rwkv4": "k", "abc": "s"}[name]
    given = [x + size * (t.name == moved) for t, x in zip(variant.inputs, case.inputs, strict=True)]
    given = [x.requires_grad_() for x in given]
    params = [p.requires_grad_() for p in case.params]
    o = op(*given, *params, backend=backend)
    grads = torch.autograd.grad(o.sum(), [*given, *params])
    assert all(bool(torch.isfinite(x).all()) for x in (o, *grads))
    if size > 0 or name != "mlstm":  # which writes next to nothing where the gate is closed
        assert o.abs().max() > 0.1


def test_a_dense_decays_gradient_is_a_product_and_no_sum() -> None:
    adjoint = differentiate(canonicalise(read_text(spec("dense_of_two_kinds"))))
    assert not any(reads(e, "suffix") for _, e in adjoint.gradients)


def test_explain_says_what_is_scanned_and_who_serves() -> None:
    text = explain(read_text(spec("peak_of_a_head")))
    assert "m[t] = max(m[t−1] + logsigmoid(f), i)" in text
    assert "m: a running maximum: scanned token by token" in text
    assert "S: m[t-1] + logsigmoid(f) - m[t] is in (-inf, 0] by m[t-1] + logsigmoid(f) <= m[t]" in text
