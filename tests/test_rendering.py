"""Rendering: a function of its arguments alone; what it prints is plain, short-lined Python that needs torch and triton only."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys

import pytest

from lagen import data
from lagen.runtime.build import generate
from lagen.spec import read

NAMES = tuple(path.stem for path in data.specs())
SIBLINGS = {"_operator", "_choice", "_chunked", "_packed", "_pool", "_vmapped", "_scans", "_cpp", "_dispatch", "_signature"}
LONGEST = 280  # a masked load of a matrix state stays on its line

PROGRAM = """
import hashlib, sys
from lagen import data
from lagen.runtime.build import generate
from lagen.spec import read
for name in sys.argv[1:]:
    print(name, hashlib.sha256(generate(read(data.spec(name))).encode()).hexdigest())
"""


def text_of(name: str) -> str:
    return generate(read(data.spec(name)))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Renders every shipped spec, one after the other."""
    return {name: text_of(name) for name in NAMES}


def test_a_second_rendering_gives_the_same_bytes(texts: dict[str, str]) -> None:
    for name in ("mamba2", "gla", "hedgehog"):
        assert text_of(name) == texts[name]


@pytest.mark.parametrize("seed", ["0", "4321"])
def test_a_fresh_process_gives_the_same_bytes_whatever_came_before(texts: dict[str, str], seed: str) -> None:
    # alone and in another order than here: nothing that was rendered before shows
    for order in (["rwkv6"], ["rwkv6", "mamba2", "hedgehog", "gla", "efficient_attention"]):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *order], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        found = dict(line.split() for line in done.stdout.splitlines())
        assert found == {name: hashlib.sha256(texts[name].encode()).hexdigest() for name in order}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_torch_triton_and_its_siblings_only(name: str, texts: dict[str, str]) -> None:
    tree = ast.parse(texts[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= {"torch", "triton"}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found = {node.module} if node.module else {a.name for a in node.names}
            assert node.level == 1 and found <= SIBLINGS
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.module.split(".")[0] in {"__future__", "torch", "triton"}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__", "open"}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_plain_text(name: str, texts: dict[str, str]) -> None:
    lines = texts[name].splitlines()
    assert [line for line in lines if line != line.rstrip() or "\t" in line] == []
    long = [line for line in lines if len(line) > LONGEST]
    assert long == []
    assert "/work" not in texts[name] and os.path.expanduser("~/") not in texts[name]
    assert texts[name].endswith("\n") and not texts[name].endswith("\n\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_defines_what_it_uses(name: str, texts: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F811,F82,E9", "--quiet", "-"],
        input=texts[name],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
