"""`lagen bench`: what is timed, how growth is fitted, and who is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import lagen
from lagen import data
from lagen.bench import PASSES, Report, Timing, bench, plot, slope
from lagen.bench_peers import PEERS, Peer
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


def _report(ratios: dict[int, float]) -> Report:
    """Makes a report where sdpa takes ``ratios`` of lagen's time, 1 ms."""
    timings = [t for n, r in ratios.items() for t in (Timing("lagen", "forward", n, 1, 1, 1), Timing("sdpa", "forward", n, r, r, 1))]
    return Report("simple_gla", "", "", tuple(timings), (), (), 1.0, 1.0, (), ())


def test_the_crossover_lies_between_the_lengths_measured() -> None:
    assert _report({64: 0.5, 256: 2.0, 1024: 8.0}).crossover("sdpa", "forward") == pytest.approx(128)
    assert _report({64: 2.0, 256: 0.5, 1024: 2.0}).crossover("sdpa", "forward") == pytest.approx(512)
    assert _report({64: 1.5, 256: 2.0}).crossover("sdpa", "forward") == 0
    assert _report({64: 0.2, 256: 0.9}).crossover("sdpa", "forward") is None
    assert _report({64: 0.2, 256: 0.9}).crossover("fla", "forward") is None


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(_report({64: 0.5, 256: 2.0}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_a_library_is_timed_where_it_is_installed_and_agrees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "planted_peer").mkdir()
    (tmp_path / "planted_peer" / "__init__.py").write_text(
        "def right(q, k, v, g):\n    from lagen.spec.read import read\n    from lagen import data\n"
        "    from lagen.verify.oracle import oracle\n"
        "    return oracle(read(data.spec('simple_gla')), (q, k, v, g), ())[0][0].float(), None\n"
        "def wrong(*x):\n    o, s = right(*x)\n    return o * 1.001, s\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = []
    for function in ("right", "wrong", "none"):
        peer = Peer("planted_peer", "simple_gla", "planted_peer", function, lambda f, x: f(x["q"], x["k"], x["v"], x["g"])[0], multiple=32)
        monkeypatch.setattr(lagen.bench_peers, "PEERS", (peer,))
        monkeypatch.setattr(lagen.bench, "LIBRARIES", ("planted_peer",))
        report = bench(lagen.load(VARIANT, printed=("cpp",)), VARIANT, (31, 32), ("planted_peer",), heads=1, size=8, repeats=1)
        told.append((sorted({t.tokens for t in report.timings if t.who == "planted_peer"}), report.left_out))
    assert told[0] == ([32], ())
    assert told[1][0] == [] and "do not agree" in told[1][1][0]
    assert told[2] == ([], ("planted_peer: has no none in planted_peer",))


def test_a_library_that_is_not_installed_is_a_reason() -> None:
    assert Peer("no_such_library", "gla", "no_such_library.x", "f", lambda f, x: x["q"]).find() == "is not installed"
    assert all(data.spec(p.variant).is_file() for p in PEERS)


def test_everyone_is_timed_at_every_length_in_both_passes() -> None:
    report = bench(lagen.load(VARIANT, printed=("cpp",)), VARIANT, (32, 64), against=("sdpa", "torch"), heads=2, size=16, repeats=2)
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
    report = bench(lagen.load(VARIANT, printed=("cpp",)), VARIANT, (32,), ("sdpa", "torch"), heads=1, size=8, repeats=1)
    assert {t.who for t in report.timings} == {"lagen", "torch"}
    assert report.left_out == ("sdpa: its numbers do not agree with float64",)


def test_an_operator_of_another_variant_is_not_timed() -> None:
    other = replace(VARIANT, outputs=tuple(replace(o, expr=lagen.ir.expr.neg(o.expr)) for o in VARIANT.outputs))
    with pytest.raises(ValueError, match="do not agree"):
        bench(lagen.load(VARIANT, printed=("cpp",)), other, (16,), heads=1, size=8, repeats=1)


def test_an_unknown_peer_is_named() -> None:
    result = CliRunner().invoke(main, ["bench", "simple_gla", "--T", "16", "--against", "nobody"])
    assert result.exit_code and "nobody" in result.output


def test_the_command_prints_ratios() -> None:
    result = CliRunner().invoke(main, ["bench", "simple_gla", "--T", "16:32", "--H", "1", "--size", "8", "--repeats", "1"])
    assert result.exit_code == 0 and "times lagen" in result.output and "sdpa" in result.output
