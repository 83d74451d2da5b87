"""Explain: what a person reads about a spec, as goldens for one spec a family, and that every shipped spec can be explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from lagen import cli
from lagen.data import spec, specs
from lagen.explain import STAGES, explain, family
from lagen.passes.canonicalise import canonicalise
from lagen.passes.dump import dump
from lagen.runtime.build import generate
from lagen.spec import read

READ = ("recurrence", "chunk", "adjoint")


@pytest.mark.parametrize("name", ["linear_attention", "mamba2", "gla", "rwkv6", "efficient_attention"])
def test_what_is_read(name: str, snapshot: SnapshotAssertion) -> None:
    assert "\n".join(explain(spec(name), stage) for stage in (READ if name == "gla" else READ[:2])) == snapshot


@pytest.mark.parametrize("path", specs(), ids=lambda p: p.stem)
def test_every_shipped_spec_has_every_part(path: Path) -> None:
    variant = read(path)
    text = "\n".join(explain(variant, stage) for stage in READ)
    for state in variant.states:
        assert f"{state.name}[t] = " in text or f"{state.name} = Σ_t" in text
    for t in variant.inputs + variant.params:
        assert f"d{t.name} = " in text
    for proof in canonicalise(variant).proofs:
        assert proof in text


def test_families() -> None:
    words = {name: family(canonicalise(read(spec(name)))) for name in ("gla", "rwkv6", "retnet", "mamba2", "linear_attention")}
    assert words == {
        "gla": "per-key decay",
        "rwkv6": "per-key decay, exclusive read",
        "retnet": "head-constant decay",
        "mamba2": "scalar decay",
        "linear_attention": "no decay, normaliser",
    }


def test_a_stage_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no stage named 'kernels'; there are " + ", ".join(STAGES)):
        explain(spec("gla"), "kernels")


def test_the_command_line_offers_every_stage() -> None:
    assert [*STAGES, "all"] == cli.STAGES


def test_dumps_only_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LAGEN_DUMP", "variant,recurrence")
    variant = read(spec("gla"))
    dump("variant", variant)
    dump("recurrence", canonicalise(variant))
    dump("source", "text of the source")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"---- variant\n{variant.source}\n---- recurrence\n{canonicalise(variant)}\n"


def test_a_build_dumps_its_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LAGEN_DUMP", "plan")
    generate(read(spec("retnet")))
    dumped = capsys.readouterr().err.removeprefix("---- plan\n").rstrip("\n")
    assert dumped.startswith("plan retnet") and explain(spec("retnet"), "plan").startswith(dumped)


def test_a_plan_says_which_form_a_scan_takes_and_why() -> None:
    text = explain(spec("retnet"), "plan")
    assert "segmented: 16 programs are too few for 132 processors" in text and "fused: 128 programs" in text


def test_a_peaks_gradient_is_told() -> None:
    told = explain(read(spec("rwkv4")), "adjoint")
    assert "m: the gradient goes through the maximum, to its larger side" in told
    assert "maximum" not in explain(read(spec("gla")), "adjoint")
