"""Built packages and the cache: what is written where, what is refused, and that nothing foreign is ever imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lagen
from lagen import data
from lagen.ir.variant import Variant
from lagen.runtime.build import MANIFEST, BuildRefused, digest_of, generate
from lagen.runtime.build import build as build_whole
from lagen.runtime.load import ForeignFile
from lagen.spec.read import read, read_text

ROOT = Path(__file__).resolve().parent.parent


def tiny(name: str = "tiny", factor: float = 1.0) -> Variant:
    text = "name: {}\ninputs: {{k: [H, K], v: [H, V]}}\nrecurrence:\n  S: S[t-1] + outer(k, v)\n  o: {} * (k @ S[t])\n"
    return read_text(text.format(name, factor))


def build(variants: list[Variant], out: Path, force: bool = False) -> None:
    """Builds without kernels: what is tested is where files go."""
    build_whole(variants, out, force, printed=())


def run(code: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, in the folder ``where``."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=where, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path))
    return tmp_path


# ---- packages -------------------------------------------------------------------------------------------------------------------


def test_a_built_package_stands_alone(tmp_path: Path) -> None:
    written = build_whole([read(data.spec("gla")), tiny()], tmp_path / "ops")
    assert {p.name for p in (tmp_path / "ops").iterdir()} == {p.name for p in written}
    code = """
import sys
sys.modules["lagen"] = None  # not installed
import torch
from ops import gla, tiny
x = torch.randn(1, 20, 2, 4, requires_grad=True)
o, state = gla(x, x, x, -x.abs(), output_final_state=True, backend="torch")
o.sum().backward()
assert x.grad is not None and state.shape == (1, 2, 4, 4)
assert tiny(x, x).shape == o.shape
try:
    gla(x, x, x, -x.abs(), backend="oracle")
except ValueError as error:
    print(error)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "gla: backend 'oracle' wants the package lagen, which is not installed\n"


def test_rendering_is_a_function_of_the_spec_alone() -> None:
    once = generate(read(data.spec("gla")))
    generate(read(data.spec("rwkv6")))
    assert generate(read(data.spec("gla"))) == once
    code = "from lagen.runtime.build import digest_of, generate\nfrom lagen.spec.read import read\nfrom lagen import data\n"
    code += "generate(read(data.spec('mamba2')))\nprint(digest_of(generate(read(data.spec('gla'))).encode()))"
    done = run(code, ROOT, PYTHONHASHSEED="1")
    assert done.stdout.strip() == digest_of(once.encode()), done.stderr


def test_a_second_build_keeps_what_stands(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    build([tiny("one")], out)
    build([tiny("two")], out)
    done = run("from ops import one, two; print(one, two)", tmp_path)
    assert done.returncode == 0, done.stderr
    build([tiny("one", 2.0)], out)
    done = run("import torch; from ops import one, two; x = torch.ones(1, 1, 1, 1); print(float(one(x, x)), float(two(x, x)))", tmp_path)
    assert done.stdout == "2.0 1.0\n", done.stderr


def test_a_folder_that_lagen_did_not_write_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    out.mkdir()
    (out / "notes.py").write_text("raise SystemExit\n")
    with pytest.raises(BuildRefused, match="ops is not a folder that lagen wrote .*--force"):
        build([tiny()], out)
    assert [p.name for p in out.iterdir()] == ["notes.py"]
    build([tiny()], out, force=True)
    assert (out / "notes.py").read_text() == "raise SystemExit\n"
    assert run("import ops; print(ops.__all__)", tmp_path).stdout == "['tiny']\n"


def test_a_corrupt_manifest_is_no_manifest(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    build([tiny()], out)
    for text in ("{", "[]", json.dumps({"files": {"tiny.py": 1}}), "\x00\xff"):
        (out / MANIFEST).write_text(text)
        with pytest.raises(BuildRefused, match="is not a folder that lagen wrote"):
            build([tiny()], out)


def test_a_changed_file_is_reported_and_never_imported(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    build([tiny(), tiny("other")], out)
    with (out / "tiny.py").open("a") as file:
        file.write("print('imported')\n")
    done = run("import ops", tmp_path)
    assert done.returncode == 1
    assert "imported" not in done.stdout
    assert "tiny.py is not the file that lagen wrote; build the package again" in done.stderr
    with pytest.raises(BuildRefused, match=r"tiny.py changed since lagen wrote it; --force"):
        build([tiny("third")], out)
    build([tiny("third")], out, force=True)
    assert run("import ops; print(ops.__all__)", tmp_path).stdout == "['other', 'third']\n"


def test_a_foreign_file_of_an_operator_s_name_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    build([tiny()], out)
    (out / "other.py").write_text("mine = 1\n")
    with pytest.raises(BuildRefused, match="other.py is not lagen's; --force replaces it"):
        build([tiny("other")], out)
    assert (out / "other.py").read_text() == "mine = 1\n"


def test_a_build_that_was_cut_off_is_not_imported(tmp_path: Path) -> None:
    out = tmp_path / "ops"
    build([tiny()], out)
    before = (out / "__init__.py").read_bytes()
    build([tiny(factor=3.0)], out)
    (out / "__init__.py").write_bytes(before)
    assert "is not the file that lagen wrote" in run("import ops", tmp_path).stderr


def test_names_that_cannot_be_imported_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="'my-ops' is not a Python name"):
        build([tiny()], tmp_path / "my-ops")
    with pytest.raises(BuildRefused, match="two specs have one name"):
        build([tiny(), tiny(factor=2.0)], tmp_path / "ops")
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildRefused, match="is a file, not a folder"):
        build([tiny()], tmp_path / "file")


@pytest.mark.parametrize("doc", ['a """ b', "a \\ b", 'ends in "', "\U0001f600 \u2028 \x7f", '""" + print("run") + """'])
def test_a_doc_is_text_whatever_stands_in_it(doc: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = dataclasses.replace(tiny("told"), doc=doc, path=f"{doc}.yaml", source=f"# {doc}\n{tiny('told').source}")
    op = lagen.load(variant, printed=())
    assert op.spec.doc == doc
    assert op.spec.source == variant.source
    assert capsys.readouterr().out == ""


# ---- the cache ------------------------------------------------------------------------------------------------------------------


def forget(name: str) -> None:
    for module in [m for m in sys.modules if m.startswith(f"lagen_cache_{name}")]:
        del sys.modules[module]


def test_load_takes_a_path_a_name_and_a_variant(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(tiny("mine").source)
    assert lagen.load(path) is lagen.load(str(path))
    assert lagen.load(tiny("mine"))(*torch.ones(2, 1, 2, 1, 1)).flatten().tolist() == [1.0, 2.0]
    assert lagen.load("gla").spec.name == "gla"
    with pytest.raises(KeyError, match="no shipped spec is called 'glah'"):
        lagen.load("glah")
    with pytest.raises(FileNotFoundError):
        lagen.load("there/is/none.yaml")


def test_a_corrupt_or_foreign_file_of_the_cache_is_replaced(cache: Path) -> None:
    lagen.load(tiny("cached"), printed=())
    (folder,) = (p for p in (cache / "operators").iterdir() if p.is_dir())
    whole = (folder / "cached.py").read_bytes()
    for spoiled in (b"raise SystemExit('foreign')\n", whole[:100], b""):
        forget("cached")
        (folder / "cached.py").write_bytes(spoiled)
        assert lagen.load(tiny("cached"), printed=()).spec.name == "cached"
        assert (folder / "cached.py").read_bytes() == whole


def test_a_file_spoiled_after_it_was_verified_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lagen.runtime import load

    store = load._store

    def spoil(folder: Path, files: dict[str, str]) -> None:
        store(folder, files)
        (folder / "late.py").write_text("raise SystemExit('foreign')\n")

    monkeypatch.setattr(load, "_store", spoil)
    with pytest.raises(ForeignFile, match="late.py is not the file that lagen wrote"):
        lagen.load(tiny("late"), printed=())
    assert not [m for m in sys.modules if m.startswith("lagen_cache_late")]
    monkeypatch.undo()
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(cache))
    assert lagen.load(tiny("late"), printed=()).spec.name == "late"


def test_foreign_bytecode_is_not_run(cache: Path) -> None:
    lagen.load(tiny("compiled"), printed=())
    (folder,) = (p for p in (cache / "operators").iterdir() if p.is_dir())
    assert not (folder / "__pycache__").exists()


def test_processes_that_start_at_once_share_one_cache(tmp_path: Path) -> None:
    code = "import lagen, torch; x = torch.ones(1, 3, 1, 2); print(lagen.load('simple_gla', printed=())(x, x, x, -x[..., 0]).shape)"
    env = {**os.environ, "LAGEN_CACHE_DIR": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {p.communicate()[0] for p in started} == {"torch.Size([1, 3, 1, 2])\n"}
    assert [p.returncode for p in started] == [0, 0]
