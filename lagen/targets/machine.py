"""This machine's CPU as a Target: asked of Linux, with nothing assumed where it does not tell."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lagen.targets.target import Target, find

_LANES = (("avx512f", 16), ("avx", 8), ("asimd", 4), ("sse2", 4))


def this_cpu() -> Target:
    """Returns the CPU with its cores, vector width and caches."""
    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            told.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = told.get("flags", told.get("Features", "")).split()
    return replace(
        find("cpu"),
        device=told.get("model name", "unknown processor"),
        cores=os.cpu_count() or 1,
        lanes=next((n for flag, n in _LANES if flag in flags), 1),
        caches=_caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        source="/proc/cpuinfo and /sys/devices/system/cpu of this machine",
    )


def _caches(folder: Path) -> tuple[tuple[str, int], ...]:
    """Reads the data caches, the nearest first."""
    found: list[tuple[str, int]] = []
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text(encoding="utf-8").strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in ("K", "M") and size[:-1].isdigit():
            found.append((f"L{level}", int(size[:-1]) << (10 if size[-1] == "K" else 20)))
    return tuple(found)
