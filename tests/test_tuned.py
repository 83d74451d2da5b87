"""Tuned entries: what a call looks up, what a file may be, and what happens to files that are not what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lagen import data
from lagen.ir.tunable import AtMost, Config, Tunable, Tunables
from lagen.passes.canonicalise import canonicalise
from lagen.passes.digest import digest
from lagen.runtime.choice import Choice, Row, processor
from lagen.runtime.load import load
from lagen.spec.read import read
from lagen.targets.tuned import FORMAT, Entry, find
from lagen.targets.tuned import read as read_entries
from lagen.tune.store import StoreError, better, export, merge, put, take

ENTRY = Entry("cuda:90", "forward", "bf16", (("K", 64), ("V", 64)), 2048, 64, Config.of({"V": 32}), "modelled", 90.0, 100.0)
VARIANT = read(data.spec("simple_gla"))
ALGEBRA = digest(canonicalise(VARIANT))


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an empty cache folder."""
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- lookup -----------------------------------------------------------------------------------------------------------------------


def choice() -> Choice:
    def row(dtype: str, k: int, tokens: int, heads: int, tile: int) -> Row:
        return Row("forward", dtype, (("K", k), ("V", 64)), tokens, heads, {"tile": tile})

    return Choice({"cpu:x": (row("fp32", 64, 2048, 8, 1), row("fp32", 64, 8192, 8, 2), row("bf16", 128, 2048, 8, 3))})


@pytest.mark.parametrize(
    ("dtype", "k", "tokens", "heads", "found"),
    [
        ("fp32", 64, 2048, 8, (1, "exact")),
        ("fp32", 64, 1500, 7, (1, "exact")),  # the same buckets
        ("fp32", 64, 100_000, 8, (2, "bucket")),  # the nearest length
        ("fp32", 48, 2048, 8, (1, "bucket")),  # fills a block of 64
        ("fp16", 128, 2048, 8, (3, "bucket")),  # as wide as bf16
        ("fp32", 128, 2048, 8, (None, "default")),
        ("bf16", 256, 2048, 8, (None, "default")),
    ],
)
def test_a_call_finds_the_exact_row_then_its_bucket_then_the_defaults(dtype, k, tokens, heads, found) -> None:
    config, rule = choice().find("cpu:x", "forward", dtype, (("K", k), ("V", 64)), tokens, heads)
    assert (config.get("tile"), rule) == found
    assert choice().find("cpu:y", "forward", dtype, (("K", k), ("V", 64)), tokens, heads)[1] == "default"
    assert choice().find("cpu:x", "backward", dtype, (("K", k), ("V", 64)), tokens, heads)[1] == "default"


def test_a_repeated_lookup_takes_under_two_microseconds() -> None:
    table = choice()
    dims = (("K", 64), ("V", 64))
    least = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            table.find("cpu:x", "forward", "fp32", dims, 2048, 8)
        least.append((time.perf_counter() - start) / 1000)
    assert min(least) < 2e-6


def test_an_operator_uses_the_users_entry(cold: Path) -> None:
    config = Config.of({"tile": 8, "wide": 1})
    entry = replace(ENTRY, device=processor(), dtype="fp32", tokens=128, heads=2, config=config, how="measured")
    put(cold / "tuned", "simple_gla", ALGEBRA, [entry])
    operator = load("simple_gla", ("cpp",))
    backend = operator.backends["cpp"].forward.__self__
    q, v, g = torch.randn(1, 70, 2, 64), torch.randn(1, 70, 2, 64), -torch.rand(1, 70, 2)
    got = operator(q, q, v, g)
    assert list(backend.tuned) == [("-DLG_TILE=8", "-DLG_WIDE=1")] and backend.loaded is None  # nothing else was compiled
    plain = load("simple_gla", ("cpp",), ())
    torch.testing.assert_close(got, plain(q, q, v, g), rtol=1e-5, atol=1e-5)
    assert plain.spec.digest != operator.spec.digest


# ---- files ------------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_sorted_and_others_stay(cold: Path) -> None:
    folder = cold / "tuned"
    other = replace(ENTRY, of="backward", config=Config.of({"K": 16}), notes=(("lagen", "0"),))
    for entries in ([other], [ENTRY], [replace(ENTRY, config=Config.of({"V": 16}))]):
        (path,), dropped = put(folder, "simple_gla", ALGEBRA, entries)
        assert not dropped
    assert path == folder / "cuda-90" / "simple_gla.json"
    assert read_entries(path, ALGEBRA).entries == (replace(ENTRY, config=Config.of({"V": 16})), other)
    before = path.read_bytes()
    put(folder, "simple_gla", ALGEBRA, [other])
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.iterdir()} == {"simple_gla.json"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ('{"format": 1, "entries": [', "cannot be read"),
        ("[1]", "holds no entries"),
        (f'{{"format": {FORMAT + 1}}}', f"format {FORMAT + 1}"),
        (f'{{"format": {FORMAT}, "device": "cuda:90", "digest": "another", "entries": []}}', "another algebra"),
        (f'{{"format": {FORMAT}, "device": 1, "digest": "{ALGEBRA}", "entries": []}}', "names no device"),
        (f'{{"format": {FORMAT}, "device": "cuda:90", "digest": "{ALGEBRA}", "entries": [1]}}', "entry 0"),
        (f'{{"format": {FORMAT}, "device": "cuda:90", "digest": "{ALGEBRA}", "entries": [{{"pass": "sideways"}}]}}', "sideways"),
    ],
)
def test_a_bad_file_is_a_miss_with_its_reason_and_can_be_written_over(cold: Path, text: str, why: str) -> None:
    path = cold / "tuned" / "cuda-90" / "simple_gla.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = find("simple_gla", ALGEBRA)
    assert [m for m in found.misses if m.path == path and why in m.why], found.misses
    assert load("simple_gla", ("cpp",)).spec.name == "simple_gla"
    _, dropped = put(cold / "tuned", "simple_gla", ALGEBRA, [ENTRY])
    assert dropped and read_entries(path, ALGEBRA).entries == (ENTRY,)


def test_every_truncation_of_a_file_is_a_miss(cold: Path) -> None:
    (path,), _ = put(cold / "tuned", "simple_gla", ALGEBRA, [ENTRY])
    text = path.read_text().rstrip()
    for length in range(len(text)):
        path.write_text(text[:length])
        assert not read_entries(path, ALGEBRA).entries


def test_a_folder_that_cannot_be_written_is_told(cold: Path) -> None:
    blocked = cold / "file"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no folder")
    with pytest.raises(StoreError, match="cannot be written"):
        put(blocked, "simple_gla", ALGEBRA, [ENTRY])


def test_two_writers_at_once_lose_nothing(cold: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_tuned import ENTRY, ALGEBRA, put, replace\n"
        "for i in range(20): put(Path(sys.argv[1]), 'simple_gla', ALGEBRA, [replace(ENTRY, tokens=1 << i, of=sys.argv[2])])\n"
    )
    root = Path(__file__).parent.parent
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(cold / "tuned"), of], cwd=root, stderr=subprocess.PIPE)
        for of in ("forward", "backward")
    ]
    assert [w.communicate()[1] for w in writers] == [b"", b""]
    assert len(find("simple_gla", ALGEBRA, "cuda:90").entries) >= 40


def test_a_bundle_carries_entries_to_another_folder_and_the_better_way_wins(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    slower = replace(ENTRY, time=99.0, config=Config.of({"V": 16}))
    measured = replace(ENTRY, of="backward", how="measured", time=99.0, default=100.0)
    put(ours, "simple_gla", ALGEBRA, [ENTRY, replace(measured, how="modelled", time=50.0)])
    put(theirs, "simple_gla", ALGEBRA, [slower, measured])
    written, passed = merge(ours, [theirs])
    assert not passed and read_entries(written[0], ALGEBRA).entries == (ENTRY, measured)
    bundle = export(ours)
    fresh, _ = take(tmp_path / "fresh", bundle)
    assert fresh[0].read_text() == written[0].read_text()
    assert better(measured, ENTRY) == better(ENTRY, measured) == measured
    with pytest.raises(StoreError, match="no bundle"):
        take(ours, "{}")


# ---- spaces -----------------------------------------------------------------------------------------------------------------------


def test_a_space_knows_its_default_its_neighbours_and_its_limits() -> None:
    space = Tunables(
        (Tunable("forward a", (1, 2, 4), 2, "a"), Tunable("chunk", (16, 32), 32, "shared", static=False)),
        (AtMost(("forward a", "chunk"), 64, "too many"),),
    )
    assert space.default == Config.of({"chunk": 32, "forward a": 2})
    assert list(space.neighbours()) == [Config.of({"chunk": 32, "forward a": 1}), Config.of({"chunk": 16, "forward a": 2})]
    assert space.complaint(Config.of({"forward a": 4})) == "too many"
    assert "none of 1, 2, 4" in space.complaint(Config.of({"forward a": 3})) and "'b'" in space.complaint(Config.of({"b": 1}))
    assert len(list(space.all())) == 5 and space.size == 6
    assert [t.values for t in space.only_static().tunables] == [(1, 2, 4), (32,)]
    assert space.default.of_pass("forward") == Config.of({"a": 2, "chunk": 32})
    assert space.default.of_pass("backward") == Config.of({"chunk": 32})


def test_shipped_entries_are_used_and_name_what_they_are() -> None:
    for path in sorted(data.folder("tuned").glob("*/*.json")):
        held = json.loads(path.read_text())
        found = read_entries(path, digest(canonicalise(read(data.spec(held["variant"])))))
        assert found.entries and not found.misses, found.misses
        assert path.parent.name == held["device"].replace(":", "-")
