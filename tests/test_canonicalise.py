"""Canonicalise: the canonical recurrence computes what the spec says; equal algebra has one digest; what cannot be is refused in place."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from respell import random_tensors, respelled
from syrupy.assertion import SnapshotAssertion

from lagen.data import specs
from lagen.ir import expr as E
from lagen.ir.recurrence import Recurrence
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.digest import digest, identity
from lagen.passes.refusal import Refused
from lagen.spec import SpecErrors, read, read_text
from lagen.verify.oracle import measure, oracle

SIZES = {"B": 2, "T": 6, "H": 2, "HV": 4, "K": 5, "V": 3, "M": 4, "E": 4, "N": 3, "D": 3}

HEADER = """\
name: {name}
inputs:
  q: [H, K]
  k: [H, K]
  k2: [H, K]
  v: [HV, V]
  v2: [HV, V]
  g: [H]
  gk: [H, K]
  gv: [HV, V]
  beta: [H]
  c: [H]
params:
  u: [H, K]
  d: [HV, V]
assume:
  - g <= 0
  - gk <= 0
  - gv <= 0
define:
  used: (q @ k + k2 @ u) + g + beta + c + sum(gk) + sum(v * d) + sum(v2 + gv)
recurrence:
"""


def spelled(lines: str, define: str = "", causal: bool = True) -> Variant:
    """Reads a spec of many inputs (all of them used) from its lines, output o; indentation is put in."""
    head = HEADER.format(name="spelled")
    if define:
        head = head.replace("recurrence:\n", "".join(f"  {d.strip()}\n" for d in define.split(";")) + "recurrence:\n")
    body = "".join(f"  {line.strip()}\n" for line in lines.strip().splitlines())
    text = head + re.sub(r"( o: )(.*)", r"\1(\2) + 0.01 * used", body)
    return read_text(text + ("" if causal else "causal: false\n"))


SPELLINGS: dict[str, list[tuple[str, str]]] = {
    "delta": [
        ("S: exp(g) * S[t-1] + beta * outer(k, v - k @ (exp(g) * S[t-1]))\no: q @ S[t]", ""),
        ("S: exp(g) * S[t-1] + outer(k, beta * v) - outer(beta * k, exp(g) * (k @ S[t-1]))\no: q @ S[t]", ""),
        ("_R: decay * S[t-1]\n_e: v - k @ _R\nS: _R + outer(kb, _e)\no: q @ S[t]", "kb: beta * k; decay: exp(g)"),
        ("S: exp(g) * (S[t-1] - beta * outer(k, k @ S[t-1])) + beta * outer(k, v)\no: S[t] @ q", ""),
    ],
    "feedback": [
        ("S: exp(g) * S[t-1] + beta * outer(k, v - k2 @ S[t-1])\no: q @ S[t]", ""),
        ("S: exp(g) * S[t-1] - beta * outer(k, k2 @ S[t-1]) + outer(beta * k, v)\no: q @ S[t]", ""),
    ],
    "delta per key": [
        ("S: exp(gk) * S[t-1] + beta * outer(k, v - k @ (exp(gk) * S[t-1]))\no: q @ S[t]", ""),
        ("S: exp(gk) * S[t-1] + beta * outer(k, v) - beta * outer(k, (k * exp(gk)) @ S[t-1])\no: q @ S[t]", ""),
    ],
    "two corrections": [
        ("_R: exp(g) * S[t-1]\n_P: _R + beta * outer(k, v - k @ _R)\nS: _P + c * outer(k2, v2 - k2 @ _P)\no: q @ S[t]", ""),
        (
            "_R: exp(g) * S[t-1]\n_e: beta * (v - k @ _R)\nS: _R + outer(k, _e) + c * outer(k2, v2 - k2 @ _R - (k2 @ k) * _e)\no: q @ S[t]",
            "",
        ),
    ],
    "mirrored delta": [
        ("_R: exp(gv) * S[t-1]\nS: _R + beta * outer(k - _R @ v, v)\no: q @ S[t]", ""),
        ("S: exp(gv) * S[t-1] + outer(k, beta * v) - outer(S[t-1] @ (exp(gv) * v), beta * v)\no: q @ S[t]", ""),
    ],
    "scalar decay": [
        ("S: exp(g) * S[t-1] + beta * outer(k, v)\no: scale * (q @ S[t])", ""),
        ("S: outer(kb, v) + S[t-1] * decay\no: (scale * q) @ S[t]", "kb: k * beta; decay: exp(g)"),
        ("_W: outer(k, beta * v)\nS: exp(g) * S[t-1] + _W\no: q @ (scale * (exp(g) * S[t-1])) + scale * (q @ k) * (beta * v)", ""),
        ("_P: exp(g) * S[t-1] - outer(-beta * k, v)\nS: _P\no: q @ (_P * scale)", ""),
        ("S: 1 / exp(-g) * S[t-1] + beta * (outer(k, v - v2) + outer(k, v2))\no: S[t] @ (scale * q)", ""),
        ("S: where(g < -1, exp(g) * S[t-1], S[t-1] * exp(g)) + outer(k, beta * v)\no: scale * (q @ S[t])", ""),
    ],
    "exclusive": [
        ("S: exp(g) * S[t-1] + beta * outer(k, v)\no: scale * (q @ S[t-1])", ""),
        ("S: exp(g) * S[t-1] + beta * outer(k, v)\no: (scale * (q @ S[t] - beta * (q @ k) * v)) / exp(g)", ""),
    ],
    "decayed read": [
        ("S: exp(g) * S[t-1] + beta * outer(k, v)\no: scale * (q @ (exp(g) * S[t-1]))", ""),
        ("S: exp(g) * S[t-1] + beta * outer(k, v)\no: scale * (q @ S[t]) - (scale * beta * (k @ q)) * v", ""),
    ],
    "bonus": [
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: q @ (S[t-1] + outer(u * k, v))", ""),
        ("S: S[t-1] * exp(gk) + outer(k, v)\no: q @ S[t-1] + sum(q * u * k) * v", ""),
        ("_B: outer(u * k, v)\nS: exp(gk) * S[t-1] + outer(k, v)\no: (S[t-1] + _B) @ q", ""),
    ],
    "key decay": [
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: q @ S[t]", ""),
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: (q * exp(gk)) @ S[t-1] + (q @ k) * v", ""),
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: q @ (exp(gk) * S[t-1] + outer(k, v))", ""),
    ],
    "value decay": [
        ("S: exp(gv) * S[t-1] + outer(k, v)\no: q @ S[t]", ""),
        ("S: exp(gv) * S[t-1] + outer(k, v)\no: exp(gv) * (q @ S[t-1]) + (q @ k) * v", ""),
    ],
    "key and value decay": [
        ("S: exp(gk) * (exp(gv) * S[t-1]) + outer(k, v)\no: q @ S[t]", ""),
        ("S: outer(exp(gk), exp(gv)) * S[t-1] + outer(k, v)\no: q @ (outer(exp(gk), exp(gv)) * S[t-1]) + q @ outer(k, v)", ""),
        ("S: (exp(gv) * S[t-1]) * exp(gk) + outer(k, v)\no: (q * exp(gk)) @ (exp(gv) * S[t-1]) + (q @ k) * v", ""),
    ],
    "scalar and key decay": [
        ("S: (exp(g) * exp(gk)) * S[t-1] + outer(k, v)\no: q @ S[t]", ""),
        ("S: exp(g) * (exp(gk) * S[t-1]) + outer(k, v)\no: q @ S[t]", ""),
        ("S: exp(g + gk) * S[t-1] + outer(k, v)\no: q @ S[t]", ""),
    ],
    "two writes": [
        ("S: exp(g) * S[t-1] + outer(k, v) + outer(k, v2)\no: q @ S[t]", ""),
        ("S: exp(g) * S[t-1] + outer(k, v + v2)\no: q @ S[t]", ""),
        ("S: exp(g) * S[t-1] + outer(0.5 * k, v2 + v) + outer(k, v + v2) / 2\no: q @ S[t]", ""),
    ],
    "two ranks": [
        ("S: exp(g) * S[t-1] + outer(k, v) + outer(k2, v2)\no: q @ S[t]", ""),
        ("S: exp(g) * S[t-1] + outer(k2, v2 - v) + outer(k + k2, v)\no: q @ S[t]", ""),
    ],
    "normaliser": [
        ("S: S[t-1] + outer(phi(k), v)\nz: z[t-1] + phi(k)\no: (phi(q) @ S[t]) / (phi(q) @ z[t])", "phi(x): elu(x) + 1"),
        ("S: S[t-1] + outer(pk, v)\nz: z[t-1] + pk\no: pq @ (S[t] / (z[t] @ pq))", "pk: 1 + elu(k); pq: 1 + elu(q)"),
        ("S: S[t-1] + outer(pk, v)\nz: z[t-1] + pk\no: (S[t] @ pq) / sum(pq * z[t])", "pk: 1 + elu(k); pq: 1 + elu(q)"),
    ],
    "scalar state": [
        ("S: exp(g) * S[t-1] + outer(k, v)\nn: exp(g) * n[t-1] + exp(c)\no: (q @ S[t]) / n[t]", ""),
        ("S: exp(g) * S[t-1] + outer(k, v)\nn: exp(g) * n[t-1] + exp(c)\no: q @ (S[t] / (exp(g) * n[t-1] + exp(c)))", ""),
    ],
    "output from two reads": [
        ("S: exp(g) * S[t-1] + outer(k, v)\no: silu(q @ S[t]) * (k @ S[t-1])", ""),
        ("S: exp(g) * S[t-1] + outer(k, v)\no: (sigmoid(q @ S[t]) * (k @ S[t-1])) * (q @ S[t])", ""),
    ],
    "value-side read": [
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: S[t] @ (d * v)", ""),
        ("S: exp(gk) * S[t-1] + outer(k, v)\no: exp(gk) * (S[t-1] @ (v * d)) + k * sum(v * v * d)", ""),
    ],
    "1 - f": [
        ("S: sigmoid(gk) * S[t-1] + outer(1 - sigmoid(gk), v)\no: q @ S[t]", ""),
        ("S: exp(-softplus(-gk)) * S[t-1] + outer(sigmoid(-gk), v)\no: q @ S[t]", ""),
    ],
}
CASES = [(family, i) for family, spellings in SPELLINGS.items() for i in range(len(spellings))]


def agree(variant: Variant, recurrence: Recurrence, seed: int = 0) -> None:
    """Asserts that recurrence and variant compute the same outputs and final states from a random state, to 1e-12."""
    inputs, params = random_tensors(variant, seed, SIZES)
    sizes = measure(variant, inputs, params)
    rng = torch.Generator().manual_seed(seed)
    start = tuple(torch.rand(sizes.shape(line), dtype=torch.float64, generator=rng) for line in variant.states)
    begin = start if variant.causal else None
    wanted = oracle(variant, inputs, params, 0.7, begin)
    got = oracle(respelled(variant, recurrence), inputs, params, 0.7, begin)
    for a, b in zip(wanted[0] + (wanted[1] or ()), got[0] + (got[1] or ()), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("family", "i"), CASES)
def test_a_spelling_computes_what_it_says(family: str, i: int) -> None:
    variant = spelled(*SPELLINGS[family][i])
    agree(variant, canonicalise(variant), seed=i)


@pytest.mark.parametrize("family", SPELLINGS)
def test_equal_spellings_have_one_digest(family: str) -> None:
    digests = [digest(canonicalise(spelled(*s))) for s in SPELLINGS[family]]
    assert digests == [digests[0]] * len(digests)


def test_different_models_have_different_digests() -> None:
    digests = {family: digest(canonicalise(spelled(*spellings[0]))) for family, spellings in SPELLINGS.items()}
    for a, b in combinations(digests, 2):
        assert digests[a] != digests[b], (a, b)


def test_names_of_define_and_of_the_file_are_no_algebra() -> None:
    a = canonicalise(spelled("S: exp(g) * S[t-1] + outer(k, v)\no: q @ S[t]"))
    text = spelled("S: decay * S[t-1] + outer(k, v)\no: q @ S[t]", "decay: exp(g)").source
    text = text.replace("name: spelled", "name: other\ndoc: other")
    b = canonicalise(read_text(text))
    assert digest(a) == digest(b)
    assert identity(a) != identity(b)


SPECS = sorted(specs())


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_shipped_specs(path: Path, snapshot: SnapshotAssertion) -> None:
    variant = read(path)
    recurrence = canonicalise(variant)
    agree(variant, recurrence)
    assert str(recurrence) == snapshot


def test_a_scalar_rides_on_the_value_side_and_leaves_the_key_as_it_was_loaded() -> None:
    state = canonicalise(spelled("S: exp(g) * S[t-1] + beta * outer(c * k, v)\no: q @ S[t]")).states[0]
    assert [str(w.row) for w in state.writes] == ["k"]
    assert str(state.writes[0].col) == "beta * c * v"


def test_a_state_spelled_out_is_read_as_now() -> None:
    r = canonicalise(spelled("_S: exp(gk) * S[t-1] + outer(k, v)\nS: _S\no: (scale * q) @ (2 * _S)"))
    assert [n.attr("at") for n in E.reads(r.outputs[0][1], "readout")] == ["now"]


def decays(lines: str, define: str = "") -> tuple[list[str], tuple[str, ...]]:
    recurrence = canonicalise(spelled(lines, define))
    return [str(g.args[0]) for g in recurrence.states[0].decay], recurrence.proofs


def test_decays_stand_apart_by_their_dims_and_say_why_they_are_safe() -> None:
    logs, proofs = decays("S: exp(g) * (exp(gk) * (exp(gv) * S[t-1])) + outer(k, v)\no: q @ S[t]")
    assert logs == ["g", "gk", "gv"]
    assert proofs == tuple(f"S: {g} is in (-inf, 0] by {g} <= 0" for g in logs)


def test_one_factor_of_a_decay_may_make_up_for_another() -> None:
    logs, _ = decays("S: exp(softplus(c)) * (exp(gk - softplus(c)) * S[t-1]) + outer(k, v)\no: q @ S[t]")
    assert logs == ["softplus(c) + (gk - softplus(c))"]


def test_a_decay_of_one_is_none() -> None:
    logs, proofs = decays("S: 2 * S[t-1] - S[t-1] + outer(k, v)\no: q @ S[t]")
    assert (logs, proofs) == ([], ())


def test_a_decay_from_two_terms() -> None:
    variant = spelled("S: S[t-1] - sigmoid(gk) * S[t-1] + outer(k, v)\no: q @ S[t]")
    recurrence = canonicalise(variant)
    assert [str(g.args[0]) for g in recurrence.states[0].decay] == ["logsigmoid(-gk)"]
    agree(variant, recurrence)


def test_a_reset_chooses_between_decay_and_nothing() -> None:
    variant = spelled("S: where(c > 0, outer(k, v), exp(gk) * S[t-1] + outer(k2, v2))\no: q @ S[t]")
    inputs, params = random_tensors(variant, 3, SIZES)
    recurrence = canonicalise(variant)
    wanted, got = (oracle(x, inputs, params, 0.7) for x in (variant, respelled(variant, recurrence)))
    torch.testing.assert_close(got[0][0], wanted[0][0], rtol=1e-11, atol=1e-11)


def test_the_sum_of_a_vector_state_is_a_read_by_ones() -> None:
    variant = spelled("z: exp(gk) * z[t-1] + k\no: q * sum(z[t]) + mean(u * z[t-1]) * k")
    agree(variant, canonicalise(variant))


def test_a_matrix_of_params_passes_a_contraction() -> None:
    source = HEADER.format(name="spelled").replace("  d: [HV, V]\n", "  d: [HV, V]\n  W: [HV, K, V]\n")
    variant = read_text(source + "  S: exp(g) * S[t-1] + outer(k, v)\n  o: q @ (S[t] + W * outer(u * k, v)) + used\n")
    agree(variant, canonicalise(variant))


REFUSALS: dict[str, tuple[str, str, str, type[Refused]]] = {
    "square": ("S: S[t-1] * S[t-1] + outer(k, v)\no: q @ S[t]", "nonlinear-state", "S[t-1] * S[t-1]", Refused),
    "exp": ("S: exp(S[t-1]) + outer(k, v)\no: q @ S[t]", "nonlinear-state", "exp(S[t-1])", Refused),
    "two sides": ("S: S[t-1] - outer(k, k @ S[t-1]) - outer(S[t-1] @ v, v)\no: q @ S[t]", "nonlinear-state", "both of its sides", Refused),
    "number of the past": ("S: S[t-1] + outer(k, (k @ S[t-1] @ v) * v)\no: q @ S[t]", "nonlinear-state", "v @ (k @ S[t-1])", Refused),
    "wide factor": ("S: S[t-1] + outer(k, gv * (v - k @ S[t-1]))\no: q @ S[t]", "nonlinear-state", "'gv' has the dim V", Refused),
    "undecayed": ("S: exp(gv) * S[t-1] + outer(k, v - k @ S[t-1])\no: q @ S[t]", "nonlinear-state", "reads the undecayed past", Refused),
    "dense": ("S: exp(outer(gk, gv)) * S[t-1] + outer(k, v)\no: q @ S[t]", "decay-grows", "exp(outer(gk, gv))", Refused),
    "dense delta": ("S: exp(-exp(outer(k, v))) * S[t-1] + outer(k, v - k @ S[t-1])\no: q @ S[t]", "nonlinear-state", "k @ S[t-1]", Refused),
    "dense sum": ("S: exp(gk) * S[t-1] - exp(gv) * S[t-1] + outer(k, v)\no: q @ S[t]", "decay-grows", "S", Refused),
    "not an outer product": ("S: exp(g) * S[t-1] + tanh(outer(k, v))\no: q @ S[t]", "not-an-outer", "tanh(outer(k, v))", Refused),
    "matrix through tanh": ("S: exp(g) * S[t-1] + outer(k, v)\no: q @ tanh(S[t])", "matrix-read", "tanh(S[t])", Refused),
    "too many terms": (
        "S: exp(g) * S[t-1] + " + " * ".join(["(outer(k, v) + outer(k2, v2))"] * 30) + "\no: q @ S[t]",
        "too-long",
        "more than 1024 terms",
        Refused,
    ),
    "growth": ("S: exp(c) * S[t-1] + outer(k, v)\no: q @ S[t]", "decay-grows", "add `- c <= 0` to assume", Refused),
    "no past at the end": ("S: S[t-1] - S[t-1] + outer(k, v)\no: q @ S[t]", "no-past", "S", Refused),
    "negative decay": ("S: outer(k, v) - S[t-1]\no: q @ S[t]", "decay-grows", "S", Refused),
    "unproved complement": ("S: S[t-1] - c * S[t-1] + outer(k, v)\no: q @ S[t]", "decay-grows", "1 - c", Refused),
    "no past": ("S: 0 * S[t-1] + outer(k, v)\no: q @ S[t]", "no-past", "S", Refused),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_term_in_place(name: str) -> None:
    lines, code, term, kind = REFUSALS[name]
    with pytest.raises(SpecErrors) as caught:  # the reader may be first to refuse, with the same code
        canonicalise(spelled(lines))
    error = caught.value
    assert code in str(error)
    assert term in str(error)
    if isinstance(error, Refused):
        assert type(error) is kind
