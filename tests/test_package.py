"""The package as a user gets it: the data is found from a wheel and from the source tree, and importing costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

REPORT = """
import sys, lagen, lagen.data as data
print(lagen.__file__)
for kind in ("templates", "specs", "tuned"):
    print(kind, data.folder(kind), sum(1 for p in data.folder(kind).rglob("*") if p.is_file()))
"""


def python(code: str, **env: str) -> str:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | env, cwd="/", check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel and installs it, alone, into a folder."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(out / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return out / "site"


def data_files(kind: str) -> int:
    return sum(1 for p in (ROOT / kind).rglob("*") if p.is_file())


def test_wheel_carries_its_data(site: Path) -> None:
    where, *kinds = python(REPORT, PYTHONPATH=str(site)).splitlines()
    assert Path(where).is_relative_to(site)
    for line in kinds:
        kind, folder, count = line.split()
        assert Path(folder).is_relative_to(site)
        assert int(count) == data_files(kind) > 0


def test_source_tree_finds_its_data() -> None:
    where, *kinds = python(REPORT, PYTHONPATH=str(ROOT)).splitlines()
    assert Path(where) == ROOT / "lagen" / "__init__.py"
    assert [line.split()[1] for line in kinds] == [str(ROOT / k) for k in ("templates", "specs", "tuned")]


def test_wheel_runs_the_command_line(site: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-P", "-m", "lagen", "list", "--json"],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert all(p.stem in listed for p in (ROOT / "specs").glob("*.yaml"))


def test_only_data_folders_stand_at_the_top() -> None:
    allowed = {"pyproject.toml", "README.md", "constraints.txt", "LICENSE", "lagen", "templates", "specs", "tuned", "tests"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    assert {p.split("/")[0] for p in tracked if not p.startswith(".")} <= allowed


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    def bare(requirement: str) -> str:
        return requirement.split("<")[0].split(">")[0].split("=")[0].split("[")[0].strip().lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {bare(r) for r in project["dependencies"] + project["optional-dependencies"]["test"]}
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert {bare(x) for x in lines} == wanted
    assert "torch==2.13.0" in lines
    assert all("==" in x for x in lines if bare(x) != "triton")


def test_import_is_light() -> None:
    loaded = python("import sys, lagen; print(*sorted(m.partition('.')[0] for m in sys.modules))").split()
    assert not {"torch", "triton", "sympy", "optuna", "jinja2", "networkx", "numpy", "rich"} & set(loaded)


def test_unknown_attribute_is_an_attribute_error() -> None:
    import lagen

    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        lagen.lood  # noqa: B018
