"""The store of tuned entries, written: whole files, sorted, one writer at a time, nothing lost that another wrote meanwhile.

Reading is targets/tuned's. What stands in a file and cannot be used (damaged, of another format or algebra) is replaced and told.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from lagen import data
from lagen.targets.tuned import FORMAT, HOW, Entry, Miss, file_of, files, head, read


class StoreError(Exception):
    """Says why entries cannot be written or read."""


Choose = Callable[[Entry, Entry], Entry]


def newer(old: Entry, new: Entry) -> Entry:
    """Takes the new entry."""
    return new


def better(old: Entry, new: Entry) -> Entry:
    """Takes what is known by the better way (measured, modelled, static); of the same way, what gained more."""
    if HOW.index(old.how) != HOW.index(new.how):
        return old if HOW.index(old.how) < HOW.index(new.how) else new
    gain_old, gain_new = (e.time / e.default if e.default else 1.0 for e in (old, new))
    return new if gain_new <= gain_old else old


def text_of(variant: str, digest: str, device: str, entries: Iterable[Entry]) -> str:
    """Returns the text of a file: a line an entry, sorted, so that changes read well."""
    lines = [json.dumps(e.to_json()) for e in sorted(entries, key=lambda e: e.key)]
    first = [f'"{k}": {json.dumps(v)}' for k, v in (("format", FORMAT), ("variant", variant), ("device", device), ("digest", digest))]
    body = ",\n  ".join(lines)
    return "{\n " + ",\n ".join(first) + ',\n "entries": [\n  ' + body + "\n ]\n}\n"


def put(folder: Path, variant: str, digest: str, entries: Sequence[Entry], choose: Choose = newer) -> tuple[list[Path], list[Miss]]:
    """Adds entries to a folder's files; returns the files written and what in them was dropped. Raises StoreError."""
    written: list[Path] = []
    dropped: list[Miss] = []
    for device in dict.fromkeys(e.device for e in entries):
        path = file_of(folder, device, variant)
        with _lock(path):
            standing = read(path, digest)
            dropped += [m for m in standing.misses if path.exists()]
            held = {e.key: e for e in standing.entries}
            for e in (e for e in entries if e.device == device):
                held[e.key] = choose(held[e.key], e) if e.key in held else e
            _write(path, text_of(variant, digest, device, held.values()))
            written.append(path)
    return written, dropped


def _lock(path: Path) -> FileLock:
    """Returns the lock of a file: kept in the cache, for the file's folder may be anyone's."""
    locks = data.cache() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.lock")


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error


# ---- bundles: the entries of a machine in one file --------------------------------------------------------------------------------


def export(folder: Path) -> str:
    """Returns every usable file of a folder as one text."""
    held = []
    for path in files(folder):
        told, found = head(path), read(path)
        if found.entries:
            held.append({**told, "entries": [e.to_json() for e in found.entries]})
    return json.dumps({"format": FORMAT, "files": held}, indent=1) + "\n"


def take(folder: Path, bundle: str, choose: Choose = better) -> tuple[list[Path], list[str]]:
    """Adds the entries of a bundle to a folder; returns the files written and what was passed over. Raises StoreError."""
    try:
        held = json.loads(bundle)
    except json.JSONDecodeError as error:
        raise StoreError(f"no bundle: {error}") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("files"), list):
        raise StoreError(f"no bundle of format {FORMAT}; `lagen tuned export` writes one")
    written: list[Path] = []
    passed: list[str] = []
    for raw in held["files"]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "bundle.json"
            path.write_text(json.dumps(raw), encoding="utf-8")
            found, told = read(path), head(path)
        passed += [m.why for m in found.misses]
        if found.entries:
            paths, dropped = put(folder, *_names(told), found.entries, choose)
            written += paths
            passed += map(str, dropped)
    return written, passed


def merge(folder: Path, others: Sequence[Path], choose: Choose = better) -> tuple[list[Path], list[str]]:
    """Adds the entries of other folders to a folder; returns the files written and what was passed over."""
    written: list[Path] = []
    passed: list[str] = []
    for other in others:
        for path in files(other):
            found, told = read(path), head(path)
            passed += map(str, found.misses)
            if found.entries:
                paths, dropped = put(folder, *_names(told), found.entries, choose)
                written += paths
                passed += map(str, dropped)
    return written, passed


def _names(told: Any) -> tuple[str, str]:
    return str(told.get("variant")), str(told.get("digest"))
