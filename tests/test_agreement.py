"""What the tuner asks of a modelled config in Triton's interpreter, and the processes that answer it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from lagen import data
from lagen.ir.tunable import Config
from lagen.runtime import load as loading
from lagen.runtime.operator import Operator
from lagen.spec.read import read
from lagen.targets.server import Stopped, server
from lagen.tune import agreement, interpreted
from lagen.tune.agreement import Refused, agree
from lagen.tune.job import Job, job
from lagen.tune.modelled import Model
from lagen.tune.outcome import Reason
from lagen.verify.cases import Case, Extent, make
from lagen.verify.laws import LawResult, Subject
from lagen.verify.sanitize import sanitize

VARIANT = read(data.spec("simple_gla"))
TRAINING, STEP = ("forward", "backward"), ("step",)


def small(passes: tuple[str, ...]) -> Job:
    """Returns a job that is interpreted in a second."""
    return job(VARIANT, "cuda:90", False, passes, "fp32", {"K": 16, "V": 64}, 1, 64, 1)


def asked(passes: tuple[str, ...], width: int) -> dict[str, object]:
    """Returns a request to check tiles of ``width``."""
    config = {"step V": width} if passes == STEP else {"chunk": 16, "forward V": width, "backward V": width}
    return {"job": small(passes).to_json(), "config": config}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints kernels whose programs lie 32 apart whatever their tile: right for tiles of 32 alone."""
    plain = loading.generate

    def generate(*args: object) -> str:
        text = plain(*args)  # type: ignore[arg-type]
        assert text.count("i_y * BV") > 1
        return text.replace("i_y * BV", "i_y * 32")

    monkeypatch.setattr(loading, "generate", generate)


@pytest.mark.parametrize("passes", [TRAINING, STEP], ids="+".join)
def test_a_wrong_tile_is_refused_and_the_right_one_beside_it_is_not(planted: None, passes: tuple[str, ...]) -> None:
    interpreted.check(asked(passes, 32))
    with pytest.raises(Refused) as refused:
        interpreted.check(asked(passes, 16))
    assert refused.value.reason == Reason.WRONG


def test_tuned_configs_run_under_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: dict[int, list[object]] = {}
    plain = GridExecutor.__call__
    for width in (16, 32):

        def watched(self: GridExecutor, *args: object, width: int = width, **named: object) -> None:
            grids.setdefault(width, []).append(self.grid)
            plain(self, *args, **named)

        monkeypatch.setattr(GridExecutor, "__call__", watched)
        op = loading.load(VARIANT, ("triton",), small(STEP).entries(Config.of({"step V": width}), device="interpreter"))
        case = make(VARIANT, Extent(1, 1, 1, 1, small(STEP).dims))
        with sanitize() as findings, torch.no_grad():
            op.step(*(x[:, 0] for x in case.inputs), backend="triton")
        assert findings == []
    assert grids[16] != grids[32] and len(grids[16]) == len(grids[32])


def test_a_config_is_not_refused_for_what_the_defaults_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"tuned": 1.2, "defaults": 1.0}
    subjects = {name: Subject(Operator.__new__(Operator), replace(VARIANT, name=name)) for name in errors}

    def judge(law: str, of: Subject, case: Case, run: object, **options: object) -> list[LawResult]:
        return [LawResult(law, str(case), "dq", errors[of.variant.name], 0.5)]

    monkeypatch.setattr(agreement, "judge", judge)
    case = make(VARIANT, Extent(3))

    def ask() -> None:
        agree(subjects["tuned"], lambda: subjects["defaults"], case, TRAINING)

    ask()
    for worse in ({"tuned": 1.3}, {"tuned": 0.6, "defaults": 0.4}, {"tuned": 1.6, "defaults": 1.6}, {"tuned": float("nan")}):
        errors |= {"tuned": 1.2, "defaults": 1.0} | worse
        with pytest.raises(Refused, match="dq is off"):
            ask()


def test_a_model_confirms_by_its_interpreter_and_asks_once(tmp_path: Path) -> None:
    script = tmp_path / "answers.py"
    script.write_text(
        "import json, sys\nprint('ready', flush=True)\n"
        "for n, line in enumerate(sys.stdin):\n"
        "    print(json.dumps({'reason': 'wrong numbers', 'detail': f'asked {n + 1}'}), flush=True)\n"
    )
    one = Model(small(TRAINING), command=(sys.executable, str(script)))
    other = replace(one, job=replace(one.job, device="hip:gfx942"))
    config = Config.of({"chunk": 16})
    found = [m.confirm(config) for m in (one, other)]  # what is interpreted has no target
    assert all(f is not None and f.reason == Reason.WRONG and f.detail == "asked 1" for f in found)
    again = one.confirm(Config.of({"chunk": 32}))
    assert again is not None and again.detail == "asked 2"  # by the same process


def test_a_crash_of_the_interpreter_is_told_and_asked_again(tmp_path: Path) -> None:
    script, count = tmp_path / "crashes.py", tmp_path / "count"
    script.write_text(f"print('ready', flush=True)\ninput()\nopen({str(count)!r}, 'a').write('x')\n")
    model = Model(small(TRAINING), command=(sys.executable, str(script)))
    for asked in ("x", "xx"):
        found = model.confirm(Config.of({"chunk": 16}))
        assert found is not None and found.reason == Reason.CRASH and count.read_text() == asked


# ---- servers ----------------------------------------------------------------------------------------------------------------------

ECHO = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    {}
    print(os.getpid(), line.strip(), flush=True)
"""


def echo(does: str = "pass") -> tuple[str, ...]:
    """Returns the command of a process that answers what it is told."""
    return (sys.executable, "-c", ECHO.format(does))


def test_a_server_is_kept_for_the_next_question_of_its_kind() -> None:
    env = dict(os.environ)
    with server(echo(), env) as first, server(echo(), env) as second:
        assert first.process.pid != second.process.pid
        assert first.ask("a b", 60).endswith(" a b")
    with server(echo(), env) as third:
        assert third is first and third.ask("c", 60) == f"{third.process.pid} c"
    with server(echo(), env | {"OTHER": "1"}) as fourth:
        assert fourth not in (first, second)


@pytest.mark.parametrize(("does", "words"), [("time.sleep(60)", "took longer than 1 s"), ("sys.exit('no more')", "no more")])
def test_a_server_that_hangs_or_ends_costs_one_question(does: str, words: str) -> None:
    with pytest.raises(Stopped, match=words), server(echo(does), dict(os.environ)) as lost:
        lost.ask("", 1)
    assert lost.process.poll() is not None and not Path(lost.scratch.name).exists()
    with server(echo(does), dict(os.environ)) as other:
        assert other is not lost


def test_a_forked_child_has_servers_of_its_own() -> None:
    env = dict(os.environ)
    with server(echo(), env) as mine:
        mine.ask("", 60)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with server(echo(), env) as own:
            os.write(write, own.ask("", 60).encode())
            own.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode().strip() != str(mine.process.pid)
    with server(echo(), env) as again:
        assert again is mine
