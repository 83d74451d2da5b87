"""The command line: what it prints, where, how fast, and the codes it ends with."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lagen import data
from lagen.cli import main

WRONG = """\
name: wrong
doc: two mistakes
inputs:
  q: [H, K]
  k: [H, K]
  v: [H, V]
  g: [H]
assume:
  - g <= 0
recurrence:
  S: exp(g) * S[t-1] + outer(k, w)
  o: scale * (q @ Z[t])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        """Returns the processor's seconds: those of the wall are the neighbours' affair too."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([sys.executable, "-m", "lagen", "--help"], check=True, capture_output=True, text=True).stdout
        assert "compile" in shown and "demo" in shown
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and len(result.output.splitlines()) > 3


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, lagen.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "triton", "sympy", "numpy", "rich", "jinja2", "networkx", "ruamel"} & set(loaded)


def test_list_names_every_shipped_spec() -> None:
    rows = json.loads(run("list", "--json").stdout)
    assert [r["name"] for r in rows] == [p.stem for p in data.specs()]
    assert all(r["family"] and "arXiv" in r["doc"] for r in rows)
    table = run("list").stdout
    assert all(r["name"] in table and r["doc"] in table for r in rows)


def test_a_new_spec_reads_and_is_not_replaced(here: Path) -> None:
    from lagen.spec.read import read

    assert run("new", "mine").exit_code == 0
    assert read("mine.yaml", strict=True).name == "mine"
    again = run("new", "mine")
    assert again.exit_code == 2 and "--force" in again.stderr
    assert run("new", "mine", "--force").exit_code == 0
    for name in ("Mine", "a-b", "../up", "1st"):
        assert run("new", name).exit_code == 2
    assert sorted(p.name for p in here.iterdir()) == ["mine.yaml"]


@pytest.mark.parametrize("command", [("check",), ("explain",), ("compile",), ("build", "--out", "ops")])
def test_a_wrong_spec_ends_with_two_and_shows_every_mistake(here: Path, command: tuple[str, ...]) -> None:
    Path("wrong.yaml").write_text(WRONG)
    result = run(*command, "wrong.yaml")
    assert result.exit_code == 2 and result.stdout == ""
    assert "wrong.yaml:11:" in result.stderr and "wrong.yaml:12:" in result.stderr and "^" in result.stderr
    assert not Path("ops").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explain", "nothing"), "gla"),
        (("explain", "nothing.yaml"), "no file nothing.yaml"),
        (("compile", "gla", "--target", "cuda:70"), "cuda:80"),
        (("compile", "gla", "--dim", "M"), "NAME=SIZE"),
        (("build", "gla"), "--out"),
        (("nonsense",), "No such command"),
    ],
)
def test_a_wrong_call_ends_with_two_and_says_what_there_is(here: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr


def test_schema_is_a_json_schema() -> None:
    schema = json.loads(run("schema").stdout)
    assert {"name", "inputs", "recurrence"} <= set(schema["properties"])


def test_explain_shows_the_recurrence() -> None:
    result = run("explain", "gla")
    assert result.exit_code == 0 and result.stdout.startswith("gla: per-key decay") and "S[t]" in result.stdout


def test_check_passes_on_a_good_spec_and_reports_by_law() -> None:
    result = run("check", "simple_gla", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert {"variant", "law", "case", "tensor", "error", "limit", "ok"} <= set(rows[0])
    assert len({r["law"] for r in rows}) > 5 and all(r["ok"] for r in rows)


def test_check_ends_with_one_where_a_law_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from lagen import cli_check
    from lagen.verify.laws import LawResult

    monkeypatch.setattr(cli_check, "check", lambda *args: iter([LawResult("steps", "T=3", "o", 1.0, 1e-5)]))
    result = run("check", "gla")
    assert result.exit_code == 1 and "BROKEN" in result.stdout


def test_build_writes_a_package_that_imports_and_refuses_a_foreign_folder(here: Path) -> None:
    assert run("build", "gla", "retnet", "--out", "my_ops").exit_code == 0
    code = "from my_ops import gla, retnet; print(gla.spec.name, retnet.spec.name)"
    environment = os.environ | {"PYTHONPATH": str(here)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
    assert shown == "gla retnet\n"
    Path("theirs").mkdir()
    Path("theirs/notes.txt").write_text("mine")
    refused = run("build", "gla", "--out", "theirs")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert [p.name for p in Path("theirs").iterdir()] == ["notes.txt"]


KEYS = {"variant", "pass", "kernel", "registers", "spill_bytes", "shared_bytes", "seconds"}


def test_compile_reports_every_kernel_of_every_pass() -> None:
    result = run("compile", "simple_gla", "--K", "64", "--V", "64", "--H", "2", "--T", "128", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0 and all(set(row) >= KEYS for row in rows)
    assert {row["pass"] for row in rows} == {"forward", "backward", "step"}
    assert all(row["variant"] == "simple_gla" and row["registers"] > 0 and row["seconds"] > 0 for row in rows)
    shown = run("compile", "simple_gla", "--K", "64", "--V", "64", "--H", "2", "--T", "128").stdout
    assert all(row["kernel"] in shown for row in rows)


def test_compile_ends_with_one_where_a_kernel_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from lagen.targets import target

    small = replace(target.find("cuda:90"), shared_bytes=16)
    monkeypatch.setitem(target.TARGETS, "cuda:90", small)
    result = run("compile", "simple_gla", "--K", "64", "--V", "64", "--H", "2", "--T", "128")
    assert result.exit_code == 1 and "cannot be launched" in result.stdout
