"""The demo, cut short: it learns, it generates, and its two ways of running the model agree."""

from __future__ import annotations

from click.testing import CliRunner

from lagen.cli import main


def test_the_demo_learns_generates_and_agrees_with_itself() -> None:
    result = CliRunner().invoke(main, ["demo", "--steps", "12", "--prompt", "A function "], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "they agree" in result.output and "| A function " in result.output


def test_the_demo_fails_where_chunks_and_steps_disagree(monkeypatch) -> None:
    from lagen import demo

    exact = demo.Mixer.step
    monkeypatch.setattr(demo.Mixer, "step", lambda self, x, state: exact(self, x, state) * 1.01)
    result = CliRunner().invoke(main, ["demo", "--steps", "2"], catch_exceptions=False)
    assert result.exit_code == 1 and "THEY DO NOT AGREE" in result.output
