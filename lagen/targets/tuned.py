"""Tuned entries: what was chosen for a variant on a device, as files; read from the user's cache and from the shipped tuned/.

What it is: ``<device>/<variant>.json``, one entry per pass, dtype, sizes and buckets of tokens and of batch x heads, sorted, with how it
was found. What it is not: no file here is written at run time (tune/store writes), and nothing is searched. A file or an entry that
cannot be used is a Miss with its reason, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lagen import data
from lagen.ir.tunable import PASSES, Config

FORMAT = 1
"""Of the files; one of another format is a miss."""

How = Literal["measured", "modelled", "static"]
HOW: tuple[How, ...] = ("measured", "modelled", "static")
"""measured: timed on the device. modelled: ranked by the static model. static: only made to compile without spills."""

DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Entry:
    """One choice. ``dims`` are the sizes it was found for; ``tokens`` and ``heads`` (batch x heads) name buckets, powers of two.

    ``time`` and ``default`` are microseconds of the config and of the defaults beside it, ``noise`` the least relative gain that counts;
    ``notes`` say how they were got, and with which versions.
    """

    device: str
    of: str
    dtype: str
    dims: tuple[tuple[str, int], ...]
    tokens: int
    heads: int
    config: Config
    how: How
    time: float = 0.0
    default: float = 0.0
    noise: float = 0.0
    trials: int = 0
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Returns what two entries for the same calls share."""
        return (PASSES.index(self.of), self.dtype, self.dims, self.tokens, self.heads)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as its file holds it."""
        made: dict[str, Any] = {"pass": self.of, "dtype": self.dtype, "dims": dict(self.dims), "tokens": self.tokens, "heads": self.heads}
        made |= {"config": self.config.table, "how": self.how}
        numbers = {"time_us": round(self.time, 2), "default_us": round(self.default, 2), "noise": round(self.noise, 4)}
        numbers["trials"] = self.trials
        return made | {k: v for k, v in numbers.items() if v} | ({"notes": dict(self.notes)} if self.notes else {})


@dataclass(frozen=True)
class Miss:
    """Says which file or entry is not used, and why."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Found:
    """What there is for one variant: the entries in use, and what was passed over."""

    entries: tuple[Entry, ...]
    misses: tuple[Miss, ...] = ()


def user_folder() -> Path:
    """Returns the folder of the user's own entries."""
    return data.cache() / "tuned"


def file_of(folder: Path, device: str, variant: str) -> Path:
    """Returns the file of a variant's entries for a device; a colon is no good name everywhere."""
    return folder / device.replace(":", "-") / f"{variant}.json"


def find(variant: str, digest: str, device: str = "") -> Found:
    """Returns the entries of a variant, the user's before the shipped ones; ``digest`` is that of its recurrence."""
    merged: dict[tuple[object, ...], Entry] = {}
    misses: list[Miss] = []
    for folder in (_shipped(), user_folder()):
        for path in _files(folder, variant):
            found = read(path, digest)
            misses += found.misses
            merged |= {(e.device, *e.key): e for e in found.entries if device in ("", e.device)}
    return Found(tuple(e for _, e in sorted(merged.items())), tuple(misses))


def _shipped() -> Path | None:
    try:
        return data.folder("tuned")
    except FileNotFoundError:
        return None


def _files(folder: Path | None, variant: str) -> list[Path]:
    try:
        return sorted(folder.glob(f"*/{variant}.json")) if folder else []
    except OSError:
        return []


def read(path: Path, digest: str = "") -> Found:
    """Reads one file; with ``digest`` it must be that of the recurrence. What cannot be used is a miss."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Found((), (Miss(path, "no such file"),))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return Found((), (Miss(path, f"cannot be read: {error}"),))
    why = _complaint(held, digest)
    if why:
        return Found((), (Miss(path, why),))
    entries: list[Entry] = []
    misses: list[Miss] = []
    for i, raw in enumerate(held["entries"]):
        made = _entry(raw, held["device"])
        if isinstance(made, Entry):
            entries.append(made)
        else:
            misses.append(Miss(path, f"entry {i}: {made}"))
    return Found(tuple(entries), tuple(misses))


def _complaint(held: Any, digest: str) -> str:
    """Returns what is wrong with a file's head, "" where nothing is."""
    if not isinstance(held, dict):
        return "holds no entries"
    if held.get("format") != FORMAT:
        return f"is of format {held.get('format')!r}; this lagen reads {FORMAT}"
    if not isinstance(held.get("device"), str) or not isinstance(held.get("entries"), list):
        return "names no device, or has no entries"
    if digest and held.get("digest") != digest:
        return "was tuned for another algebra of that name"
    return ""


def _entry(raw: Any, device: str) -> Entry | str:
    """Reads one entry, or says what is wrong with it."""
    if not isinstance(raw, dict):
        return "is no table"
    of, dtype, how = raw.get("pass"), raw.get("dtype"), raw.get("how")
    if of not in PASSES or dtype not in DTYPES or how not in HOW:
        return f"pass {of!r}, dtype {dtype!r}, how {how!r}"
    dims, config = _whole(raw.get("dims"), 1), _whole(raw.get("config"), 0)
    size = _whole({k: raw.get(k) for k in ("tokens", "heads")}, 1)
    if dims is None or config is None or size is None:
        return "sizes and configs are whole numbers by name"
    notes = raw.get("notes", {})
    numbers = [raw.get(k, 0.0) for k in ("time_us", "default_us", "noise")]
    trials = raw.get("trials", 0)
    if not isinstance(notes, dict) or not all(isinstance(n, int | float) for n in (*numbers, trials)):
        return "time_us, default_us, noise and trials are numbers, notes are texts by name"
    said = tuple(sorted((str(k), str(v)) for k, v in notes.items()))
    time, default, noise = map(float, numbers)
    found = (device, of, dtype, tuple(sorted(dims.items())), size["tokens"], size["heads"], Config.of(config))
    return Entry(*found, how, time, default, noise, int(trials), said)


def _whole(table: Any, least: int) -> dict[str, int] | None:
    """Returns a table of whole numbers by name, None where it is none."""
    if not isinstance(table, dict) or not all(type(v) is int and v >= least for v in table.values()):
        return None
    return {str(k): v for k, v in table.items()}


def files(folder: Path) -> Iterator[Path]:
    """Yields every file of entries in a folder, sorted."""
    yield from sorted(folder.glob("*/*.json"))


def head(path: Path) -> Mapping[str, Any]:
    """Returns what a file says of itself: variant, device, digest; empty where it cannot be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return {k: held.get(k) for k in ("format", "variant", "device", "digest")} if isinstance(held, dict) else {}
