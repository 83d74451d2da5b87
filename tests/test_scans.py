"""Scans: what variants without a matmul form are planned as, and what their kernels need and move at a paper's sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lagen
from lagen import data
from lagen.cli_compile import minimum
from lagen.emit.triton import render_triton
from lagen.ir import expr as E
from lagen.ir.plan import Plan
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.logs import compared
from lagen.passes.plan import plan
from lagen.runtime.launches import Shape, gather
from lagen.spec import read, read_text
from lagen.targets.compile import compile_launches
from lagen.targets.model import model
from lagen.targets.target import find

PAPER = Shape(b=4, t=4096, h=1, k=16, v=16, dtype=torch.bfloat16, dims=(("D", 4096), ("E", 4096), ("N", 16)))
LARGEST = {
    "mamba1": {"forward": 1.5, "backward": 2.5},
    "longhorn": {"forward": 1.75, "backward": 2.5},
    "hgrn": {"forward": 1.1, "backward": 1.1},
    "rwkv4": {"forward": 1.3, "backward": 1.3},
}
"""Bytes over inputs and outputs once, at most."""


def planned(text: str) -> Plan:
    recurrence = canonicalise(read_text(text))
    return plan(recurrence, differentiate(recurrence))


@pytest.mark.parametrize("name", ["mamba1", "longhorn"])
def test_one_scan_a_pass_holds_all_states(name: str) -> None:
    recurrence = canonicalise(read(data.spec(name)))
    made = plan(recurrence, differentiate(recurrence))
    (scan,), (back,) = ([k for k in kernels if k.kind == "scan"] for kernels in (made.forward, made.backward))
    assert [h.carry.state for h in scan.holds] == ["S"]
    assert [(h.carry.state, h.source) for h in back.holds] == [("S", "mark_S"), ("dS", "dfinal_S")]
    assert scan.tile == back.tile == "E" and {h.carry.x for h in back.holds} == {"N"}
    assert {b.name for b in made.saved} >= {"mark_S"}


@pytest.mark.parametrize(("name", "states"), [("hgrn", ["h"]), ("rwkv4", ["m", "a", "b"])])
def test_vector_states_alone_are_one_launch_a_pass(name: str, states: list[str]) -> None:
    recurrence = canonicalise(read(data.spec(name)))
    made = plan(recurrence, differentiate(recurrence))
    (scan,), (back,) = made.forward, made.backward
    assert [h.carry.state for h in scan.holds] == states
    assert [h.carry.state for h in back.holds] == [*states, *(f"d{s}" for s in sorted(states))]
    assert {b.dtype for b in made.saved} == {"float32"}, "a peak that is rounded moves what is kept in its scale"


def test_a_sum_over_all_channels_that_a_state_takes_is_left_to_sweeps() -> None:
    made = planned(
        "name: summed\ninputs:\n  x: [D]\n  f: [D]\nrecurrence:\n"
        "  h: sigmoid(f) * h[t-1] + x\n  n: 0.9 * n[t-1] + dot(x, h[t])\n  o: h[t] / (1 + n[t] * n[t])\n"
    )
    assert not any(k.kind == "scan" for k in (*made.forward, *made.backward))


def test_a_scan_keeps_what_the_outputs_keep_on_the_grid() -> None:
    made = planned(
        "name: other\ninputs:\n  x: [E]\n  B: [N]\n  C: [N]\n  y: [E]\nrecurrence:\n"
        "  S: (1 - outer(sigmoid(B), sigmoid(x))) * S[t-1] + outer(C, x)\n  o: y @ S[t]\n"
    )
    assert {k.tile for k in (*made.forward, *made.backward) if k.kind == "scan"} == {"N"}


def test_a_dense_decay_beside_a_matrix_that_pairs_carry_has_no_kernels() -> None:
    variant = read_text(
        "name: mixed\ninputs:\n  q: [K]\n  k: [K]\n  v: [V]\nrecurrence:\n"
        "  S: (1 - outer(sigmoid(k), sigmoid(v))) * S[t-1] + outer(k, v)\n  R: R[t-1] + outer(k, v)\n  o: q @ S[t] + q @ R[t]\n"
    )
    recurrence = canonicalise(variant)
    with pytest.raises(NotImplementedError, match="no Triton form for the dense decay of S beside R"):
        plan(recurrence, differentiate(recurrence))
    assert "triton" not in lagen.load(variant).backends


def test_no_logarithm_is_taken_of_a_decay_that_is_given_as_a_factor() -> None:
    recurrence = canonicalise(read(data.spec("longhorn")))
    scans = render_triton(recurrence, differentiate(recurrence)).partition("def step(")[0]
    assert "tl.log(" not in scans and "tl.exp(" not in scans


@pytest.mark.parametrize(("log", "of"), [("log", torch.log), ("logsigmoid", torch.nn.functional.logsigmoid)])
def test_a_comparison_of_a_logarithm_is_one_of_its_argument(log: str, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    bare = compared(E.call("lt", E.call(log, E.leaf("input", "x", (), token=True)), E.const(-41.5)))
    assert bare.op == "lt" and bare.args[0].op == "input"
    edge = bare.args[1].value
    x = torch.tensor([edge - 1e-3 * abs(edge), edge + 1e-3 * abs(edge)], dtype=torch.float64)
    assert (of(x) < -41.5).tolist() == (x < edge).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize("name", LARGEST)
def test_nothing_spills_and_little_moves_at_a_papers_sizes(name: str, target: str) -> None:
    variant = read(data.spec(name))
    found = gather(variant, PAPER, find(target))
    reports = compile_launches([g.launch for g in found], workers=1)
    assert not [r for r in reports if r.failure or r.spill_bytes or not r.fits(find(target))]
    least = minimum(variant, PAPER)
    for phase, most in LARGEST[name].items() if target == "cuda:90" else ():
        taken = [(g.launches, model(g.launch, r, find(target))) for g, r in zip(found, reports, strict=True) if g.phase == phase]
        assert sum(n * (m.read + m.written) for n, m in taken) <= most * least[phase]
