"""Every kernel of every shipped spec compiles for every kind of device, without one, and could be launched there."""

from __future__ import annotations

import pytest
import torch

from lagen import data
from lagen.passes.canonicalise import canonicalise
from lagen.runtime.launches import Gathered, Shape, gather
from lagen.spec.read import read
from lagen.targets.compile import compile_launches
from lagen.targets.target import find

SPECS = [p.stem for p in data.specs()]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
FEW = ["simple_gla", "gated_deltanet", "mlstm", "efficient_attention"]
SOLVED = [p.stem for p in data.specs() if any(s.solves for s in canonicalise(read(p)).states)]
SMALL = {"based": 16, "rebased": 16}  # their features grow with the square of K; the papers take 16


def kernels(name: str, target: str, states: bool = False) -> list[Gathered]:
    k = SMALL.get(name, 32)
    return gather(read(data.spec(name)), Shape(b=2, t=256, h=2, k=k, v=32, dtype=torch.bfloat16), find(target), states)


@pytest.mark.parametrize("name", SPECS)
def test_every_pass_has_kernels(name: str) -> None:
    causal = read(data.spec(name)).causal
    assert {g.phase for g in kernels(name, "cuda:90")} == {"forward", "backward"} | ({"step"} if causal else set())


@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
    ("target", "names"), [("cuda:90", FEW), *(pytest.param(t, SPECS, marks=pytest.mark.slow) for t in TARGETS)], ids=("few", *TARGETS)
)
def test_every_kernel_compiles_and_fits(target: str, names: list[str]) -> None:
    found = [g for name in names for g in kernels(name, target)]
    reports = compile_launches([g.launch for g in found], workers=1)  # one a test: the tests run side by side
    wrong = [
        f"{g.variant} {g.phase} {r.kernel}: {r.failure or f'{r.shared_bytes} bytes of shared memory'}"
        for g, r in zip(found, reports, strict=True)
        if not r.fits(find(target))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["gla", "linear_attention"])
def test_carried_states_compile(name: str) -> None:
    plain, carried = (kernels(name, "cuda:90", states) for states in (False, True))
    assert {g.launch for g in plain} != {g.launch for g in carried}
    assert not [r.failure for r in compile_launches([g.launch for g in carried], workers=1) if r.failure]


@pytest.mark.slow
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("name", SOLVED)
def test_delta_rules_do_not_spill(name: str) -> None:
    found = gather(read(data.spec(name)), Shape(b=4, t=4096, h=16, k=128, v=128, dtype=torch.bfloat16), find("cuda:90"))
    reports = compile_launches([g.launch for g in found], workers=1)
    assert {r.kernel: r.spill_bytes for r in reports if r.spill_bytes or r.failure} == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_cut_sequences_compile(target: str) -> None:
    for v in (64, 128):
        few = Shape(b=1, t=8192, h=8, k=128, v=v, dtype=torch.bfloat16)  # too few programs for the device, so segments
        found = [g for g in gather(read(data.spec("linear_attention")), few, find(target), tuned=()) if g.phase != "step"]
        assert any(g.launch.kernel == "cut_s" for g in found)
        assert not [r.failure for r in compile_launches([g.launch for g in found], workers=1) if r.failure]
