"""`lagen bench`: what is timed, how growth is fitted, and who is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import lagen
from lagen import data
from lagen.bench import PASSES, Timing, bench, slope
from lagen.cli import main
from lagen.cli_bench import lengths
from lagen.spec.read import read

VARIANT = read(data.spec("simple_gla"))


def test_lengths_are_a_doubling_range_or_a_list() -> None:
    assert lengths("1024:5000") == (1024, 2048, 4096)
    assert lengths("100,300,100") == (100, 300)
    with pytest.raises(click.BadParameter):
        lengths("many")


def test_the_slope_is_the_exponent_of_time_in_length() -> None:
    timings = [Timing("a", "forward", t, 0.0, 3e-4 * t**1.5, 1) for t in (100, 200, 800)]
    assert slope(timings, "a", "forward") == pytest.approx(1.5)
    assert slope(timings[:1], "a", "forward") is None


def test_everyone_is_timed_at_every_length_in_both_passes() -> None:
    report = bench(lagen.load(VARIANT, printed=("cpp",)), VARIANT, (32, 64), heads=2, size=16, repeats=2)
    assert {(t.who, t.of, t.tokens) for t in report.timings} == {
        (w, of, t) for w in ("lagen", "sdpa", "torch") for of in PASSES for t in (32, 64)
    }
    assert all(0 < t.least <= t.median for t in report.timings)
    assert not report.left_out and json.loads(json.dumps(report.to_json()))["variant"] == "simple_gla"


def test_a_peer_whose_numbers_disagree_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.scaled_dot_product_attention

    def off(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return plain(q, k, v, is_causal=is_causal) * 1.01

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", off)
    report = bench(lagen.load(VARIANT, printed=("cpp",)), VARIANT, (32,), heads=1, size=8, repeats=1)
    assert {t.who for t in report.timings} == {"lagen", "torch"}
    assert report.left_out == ("sdpa: its numbers do not agree with float64",)


def test_an_operator_of_another_variant_is_not_timed() -> None:
    other = replace(VARIANT, outputs=tuple(replace(o, expr=lagen.ir.expr.neg(o.expr)) for o in VARIANT.outputs))
    with pytest.raises(ValueError, match="does not agree"):
        bench(lagen.load(VARIANT, printed=("cpp",)), other, (16,), heads=1, size=8, repeats=1)


def test_an_unknown_peer_is_named() -> None:
    result = CliRunner().invoke(main, ["bench", "simple_gla", "--T", "16", "--against", "nobody"])
    assert result.exit_code and "nobody" in result.output


def test_the_command_prints_ratios() -> None:
    result = CliRunner().invoke(main, ["bench", "simple_gla", "--T", "16:32", "--H", "1", "--size", "8", "--repeats", "1"])
    assert result.exit_code == 0 and "times lagen" in result.output and "sdpa" in result.output
