"""The rooms of the compiler: who may import whom, and which library lives where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lagen"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself and from the rooms named here: those before it on the way from a spec's text to a kernel that runs.
# data stands under all (it only knows folders), cli over all; verify judges what the others made, so it may look at all of them.
ABOVE: dict[str, set[str]] = {
    "data": set(),
    "ir": set(),
    "spec": {"ir"},
    "passes": {"ir", "spec"},
    "targets": {"data", "ir"},
    "emit": {"data", "ir", "passes", "targets"},
    "runtime": {"data", "ir", "spec", "passes", "emit", "targets"},
    "tune": {"data", "ir", "spec", "passes", "emit", "runtime", "targets", "verify"},
    "verify": {"data", "ir", "spec", "passes", "emit", "runtime", "targets"},
    "explain": {"data", "ir", "spec", "passes", "emit", "targets", "tune"},
    "demo": {"data", "runtime"},
    "bench": {"ir", "passes", "emit", "runtime", "verify"},
    "cli": {"data", "ir", "spec", "passes", "emit", "runtime", "targets", "tune", "verify", "explain", "bench", "demo"},
    "__main__": {"cli"},
    "nn": {"ir", "parallel", "runtime", "spec"},
    "compat": {"data", "runtime"},
    "parallel": {"ir", "passes", "runtime", "spec"},
    "__init__": {"runtime", "nn", "compat", "parallel"},
}
HOMES = {
    "jinja2": {"emit"},
    "optuna": {"tune"},
    "triton": {"runtime", "targets", "verify"},  # verify looks into the interpreter (sanitize)
    "click": {"cli"},
    "ruamel": {"spec"},
}
ORACLE = {"ir.expr", "ir.scalar", "ir.variant"}


def named(part: str) -> str:
    return next((p for p in ("cli", "bench") if part.startswith(p)), part)


def room(path: Path) -> str:
    return named(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "lagen":
                yield from ((f"lagen.{a.name}", node.lineno) for a in node.names)
            else:
                yield node.module or "", node.lineno


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def test_every_room_is_known() -> None:
    assert {room(f) for f in FILES} <= set(ABOVE)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_room_imports_only_from_rooms_above(path: Path) -> None:
    here = room(path)
    for module, line in imports(path):
        if module.startswith("lagen."):
            other = named(module.split(".")[1])
            allowed = ABOVE[here] | {here} | ({"__version__"} if here != "__init__" else set())
            assert other in allowed, f"{name(path)}:{line}: {here} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    for module, line in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or room(path) in homes, f"{name(path)}:{line}: {module} belongs to {homes}"


def test_the_oracle_shares_no_code_with_the_passes() -> None:
    for path in (PACKAGE / "verify").glob("oracle*.py"):
        for module, line in imports(path):
            if module.startswith("lagen."):
                inner = module.removeprefix("lagen.")
                assert inner in ORACLE or inner.startswith("verify.oracle"), f"{name(path)}:{line}: the oracle may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_text_is_ever_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in {"eval", "exec", "sympify", "parse_expr", "__import__"}, f"{name(path)}:{node.lineno}: {called}"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            assert node.type is not None and caught not in {"Exception", "BaseException"}, f"{name(path)}:{node.lineno}: broad except"
    assert not {"pickle", "marshal", "shelve"} & {m for m, _ in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_about_one_thing(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 600, "two nouns in one room: split by noun"
    assert path.stem not in {"utils", "helpers", "common", "misc", "util", "helper"}
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "the first line says what the file is about"
