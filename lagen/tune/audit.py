"""Audits a folder of tuned entries: what cannot be read, is of another algebra, or holds what may not be chosen."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from lagen import data
from lagen.ir.tunable import CHUNK, Config, Tunables
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.digest import digest
from lagen.spec.read import read as read_spec
from lagen.targets.tuned import Entry, file_of, files, head, read
from lagen.tune.job import Job, job
from lagen.tune.run import space_digest
from lagen.tune.space import searches, space_of


def audit(folder: Path) -> tuple[int, list[str]]:
    """Returns how many entries a folder holds, and a line for each that is not as it should be."""
    count, complaints = 0, []
    for path in files(folder):
        name = str(head(path).get("variant"))
        if name not in [p.stem for p in data.specs()]:
            found = read(path)
            complaints += [str(m) for m in found.misses]
            count += len(found.entries)
            continue
        variant = _variant(name)
        found = read(path, digest(canonicalise(variant)))
        complaints += [str(m) for m in found.misses]
        count += len(found.entries)
        if found.entries and file_of(folder, found.entries[0].device, name) != path:
            complaints.append(f"{path}: is of {found.entries[0].device} and {name}, and stands elsewhere")
        for e in found.entries:
            why = _complaint(e, name)
            if why:
                complaints.append(f"{path}: {e.of} {e.dtype} {dict(e.dims)}: {why}")
    return count, complaints


def _complaint(e: Entry, name: str) -> str:
    """Returns what is wrong with an entry, "" where nothing is."""
    variant = _variant(name)
    passes = next((s for s in _searches(name, e.device) if e.of in s), ())
    if not passes:
        return "nothing may be chosen there"
    entry_job = job(variant, e.device, e.how == "measured", passes, e.dtype, {"K": 64, **dict(e.dims)}, 1, e.tokens, e.heads)
    if entry_job.dims != e.dims:
        return f"its sizes are not those that the variant has, {', '.join(d for d, _ in entry_job.dims)}"
    space = _space(replace(entry_job, batch=1, tokens=1, heads=1))
    values = {n if n == CHUNK else f"{e.of} {n}": v for n, v in e.config.values}
    why = space.complaint(Config.of(values))
    if why:
        return why
    recorded = dict(e.notes).get("space", "")
    return "" if recorded in ("", space_digest(space)) else "was chosen from another space; tune it again"


# what many entries share: printing a spec's kernels takes longer than reading a file


@functools.cache
def _variant(name: str) -> Variant:
    return read_spec(data.spec(name))


@functools.cache
def _searches(name: str, device: str) -> tuple[tuple[str, ...], ...]:
    return searches(_variant(name), device)


@functools.cache
def _space(of: Job) -> Tunables:
    return space_of(of)
