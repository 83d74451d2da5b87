"""Cross-compilation without a device: what is recorded, what the machine code needs, what is remembered and what is stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lagen import data
from lagen.targets.compile import compile_kernel, compile_launches, digest
from lagen.targets.launch import Launch, NotRecordable, describe, launches_of
from lagen.targets.target import TARGETS, UnknownTarget, find

SOURCE = Path(__file__).parent / "kernels" / "planted.py"
SIGNATURE = {"a": "*fp32", "b": "*fp32", "o": "*fp32", "n": "i32"}
PRODUCT = {"a": "*bf16", "o": "*bf16", "stride": "i32:16"}
GPUS = [t for t in TARGETS.values() if t.backend != "cpu"]


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(f"planted_{abs(hash(str(path)))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an empty cache folder."""
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recorded(target_name: str, n: int = 1000) -> tuple[Launch, ...]:
    planted = imported(SOURCE)
    a = torch.empty(n, device="meta")
    square = torch.empty(64, 64, device="meta", dtype=torch.bfloat16)
    return launches_of(lambda: (planted.add(a, a), planted.product(square)), find(target_name))


def test_recording_writes_down_what_triton_would_specialise() -> None:
    add, product = recorded("cuda:90")
    assert add.kernel == "add_kernel" and Path(add.module) == SOURCE
    assert add.grid == (16, 1, 1) and product.grid == (1, 1, 1)
    assert dict(add.signature) == SIGNATURE | {"BT": "constexpr"}
    assert dict(add.constants) == {"BT": 64} and dict(add.options) == {"num_warps": 2}
    assert {name for name, told in add.attributes if told} == {"a", "b", "o"}  # 1000 is no multiple of 16
    assert {name for name, told in product.attributes if told} == {"a", "o", "stride"}


def test_recording_specialises_ones_and_drops_empty_grids() -> None:
    planted = imported(SOURCE)
    (one,) = launches_of(lambda: planted.add(*[torch.empty(1, device="meta")] * 2), find("cuda:90"))
    assert dict(one.constants) == {"BT": 64, "n": 1}
    assert launches_of(lambda: planted.add(*[torch.empty(0, device="meta")] * 2), find("cuda:90")) == ()


def test_recording_starts_nothing_and_restores_the_launcher() -> None:
    planted = imported(SOURCE)
    a = torch.ones(8)
    poisoned = torch.full((8,), float("nan"))
    launches_of(lambda: planted.add_kernel[(1,)](a, a, poisoned, 8, BT=8), find("cuda:90"))
    assert poisoned.isnan().all()
    assert torch.equal(planted.add(a, a), torch.full((8,), 1.5))


def test_a_tensor_constant_is_refused_by_name() -> None:
    planted = imported(SOURCE)
    a = torch.empty(8, device="meta")
    with pytest.raises(NotRecordable, match="'BT' of add_kernel"):
        launches_of(lambda: planted.add_kernel[(1,)](a, a, a, 8, BT=[8]), find("cuda:90"))


@pytest.mark.parametrize("target", [t.name for t in GPUS])
def test_every_target_compiles_without_its_device(target: str) -> None:
    add, product = compile_launches(recorded(target))
    assert not add.failure and not product.failure
    assert 0 < add.registers < 64 and add.spill_bytes == 0 and add.shared_bytes == 0 and add.tensor_instructions == 0
    assert product.tensor_instructions > 0 and product.shared_bytes > 0 and product.fits(find(target))
    assert min(add.seconds, product.seconds) > 0


def test_a_spill_is_seen() -> None:
    small, large = (compile_kernel(SOURCE, "product_kernel", PRODUCT, {"C": c}, 4, 2, find("cuda:90")) for c in (32, 128))
    assert small.spill_bytes == small.spill_instructions == 0
    assert large.spill_bytes > 0 and large.spill_instructions > 0 and large.registers == 255


def test_too_much_shared_memory_does_not_fit() -> None:
    target = find("cuda:90")
    report = compile_kernel(SOURCE, "product_kernel", PRODUCT, {"C": 64}, 4, 2, target)
    assert report.shared_bytes >= 64 * 64 * 2 and report.fits(target)
    assert report.fits(replace(target, shared_bytes=report.shared_bytes))
    assert not report.fits(replace(target, shared_bytes=report.shared_bytes - 1))


def test_a_kernel_that_does_not_compile_says_why() -> None:
    report = compile_kernel(SOURCE, "add_kernel", SIGNATURE, {"BT": 63}, 4, 2, find("cuda:90"))
    assert "power of 2" in report.failure and report.registers == 0
    assert not report.fits(find("cuda:90"))


def test_a_compile_that_takes_too_long_is_killed_and_the_next_one_runs(tmp_path: Path) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text("import time\ntime.sleep(600)\n" + SOURCE.read_text().replace("from __future__ import annotations\n", ""))
    slow = describe(str(endless), "product_kernel", PRODUCT, {"C": 64}, 4, 2, find("cuda:90"))
    quick = describe(str(SOURCE), "add_kernel", SIGNATURE, {"BT": 64}, 4, 2, find("cuda:90"))
    start = time.monotonic()
    stopped, ran = compile_launches([slow, quick], workers=1, timeout=15.0)
    assert stopped.failure == "took longer than 15 s"
    assert not ran.failure and ran.registers > 0
    assert time.monotonic() - start < 200


def test_reports_are_remembered_by_what_decides_the_code(cold: Path, tmp_path: Path) -> None:
    first = compile_launches(recorded("cuda:90"))
    again = compile_launches(recorded("cuda:90"))
    assert [r.remembered for r in first] == [False, False] and [r.remembered for r in again] == [True, True]
    assert [r.seconds for r in first] == [r.seconds for r in again]

    def key(text: str, kernel: str = "add_kernel") -> str:
        path = tmp_path / "other.py"
        path.write_text(text)
        return digest(describe(str(path), kernel, SIGNATURE, {"BT": 64}, 2, 3, find("cuda:90")))

    text = SOURCE.read_text()
    assert key(text) == key("# a remark\n" + text) == key(text.replace("add_kernel", "sum_kernel"), "sum_kernel")
    assert key(text) != key(text.replace("0.5", "0.25"))  # a constant that a function it calls uses
    assert key(text) != key(text.replace("i_t < n\n    tl.store(o + i_t, halve", "i_t <= n\n    tl.store(o + i_t, halve"))
    assert key(text) == key(text.replace("planted: no mask", "").replace("b_q", "b_z"))  # another kernel's affair


def test_a_damaged_memory_is_made_again(cold: Path) -> None:
    launches = recorded("cuda:90")[:1]
    (first,) = compile_launches(launches)
    (file,) = (data.cache() / "compiled").glob("*.json")
    for text in ("", "{", "[]", '{"kernel": 1}', json.dumps({"registers": 1, "foreign": True})):
        file.write_text(text)
        (again,) = compile_launches(launches)
        assert not again.remembered and again.registers == first.registers


def test_a_filled_cache_leaves_the_first_call_nothing_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    launches = recorded("cuda:90")
    assert not [r.failure for r in compile_launches(launches, workers=1, fill=True) if r.failure]
    script = """
import sys, torch, triton
from unittest import mock
from triton.runtime import driver, jit
from lagen.targets import launch
from lagen.targets.target import find
from tests.kernels import planted
class Driver(launch._Absent):
    def get_current_stream(self, device): return 0
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **told: hits.append(cache_hit)
plain = jit.JITFunction.run
def warm(self, *args, grid, warmup=False, **options): return plain(self, *args, grid=grid, warmup=True, **options)
with mock.patch.object(driver, "_active", Driver(find("cuda:90"))), mock.patch.object(jit.JITFunction, "run", warm):
    a = torch.empty(1000)
    planted.add(a, a)
    planted.product(torch.empty(64, 64, dtype=torch.bfloat16))
print(hits)
"""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=SOURCE.parents[2])
    assert done.stdout.split() == ["[True,", "True]"], done.stdout + done.stderr[-2000:]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownTarget, match="there are cuda:80"):
        find("cuda:70")
    with pytest.raises(NotRecordable, match="i32:16"):
        describe(str(SOURCE), "add_kernel", {"n": "i32:8"}, {}, 4, 2, find("cuda:90"))
    with pytest.raises(KeyError, match="missing_kernel"):
        compile_kernel(SOURCE, "missing_kernel", {}, {}, 4, 2, find("cuda:90"))
