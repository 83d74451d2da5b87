"""Choice: which tuned config a call takes, looked up in a table that the module carries; nothing is read or searched at run time.

Stands alone (the standard library): it is copied into every built package as ``_choice.py``.

A row says for which pass, dtype and sizes a config was found. A call takes the row that is exact; else, of those in its bucket (a dtype
of the same width, dims that fill the same power of two), the nearest; else the defaults.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
Sizes = tuple[tuple[str, int], ...]
NOTHING: dict[str, int] = {}


@dataclass(frozen=True)
class Row:
    """What was chosen for one pass, dtype and sizes; ``tokens`` and ``heads`` (batch x heads) name buckets."""

    of: str  # forward, backward or step
    dtype: str
    dims: Sizes
    tokens: int
    heads: int
    config: Mapping[str, int]


@cache
def processor() -> str:
    """Names the kind of this machine's CPU: maker, family, model and the widest vectors, as in ``cpu:intel-6-106-avx512``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    flags = told.get("flags", told.get("Features", "")).split()
    makers = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
    maker = told.get("vendor_id") or told.get("CPU implementer") or platform.machine()
    vectors = next((v for v, flag in (("avx512", "avx512f"), ("avx2", "avx2"), ("sve", "sve"), ("neon", "asimd")) if flag in flags), "")
    parts = [makers.get(maker, maker), told.get("cpu family", ""), told.get("model", told.get("CPU part", "")), vectors]
    return "cpu:" + "-".join(p.lower().replace(" ", "-") for p in parts if p)


def bucket(n: int) -> int:
    """Returns the power of two that stands for ``n`` tokens, or batch x heads."""
    return 1 << max(0, n - 1).bit_length()


def block(n: int) -> int:
    """Returns the power of two that a dim fills in a kernel."""
    return max(16, bucket(n))


class Choice:
    """The tuned rows of one variant by device, and what calls asked for before."""

    def __init__(self, rows: Mapping[str, tuple[Row, ...]]) -> None:
        self.rows = rows
        self.known: dict[object, tuple[Mapping[str, int], str]] = {}

    def find(self, device: str, of: str, dtype: str, dims: Sizes, tokens: int, heads: int) -> tuple[Mapping[str, int], str]:
        """Returns the config of a call, and which rule gave it: exact, bucket or default."""
        key = (device, of, dtype, dims, tokens, heads)
        found = self.known.get(key)
        if found is None:
            if len(self.known) > 4096:
                self.known.clear()
            found = self.known[key] = self._search(device, of, dtype, dims, tokens, heads)
        return found

    def _search(self, device: str, of: str, dtype: str, dims: Sizes, tokens: int, heads: int) -> tuple[Mapping[str, int], str]:
        best: tuple[float, Row] | None = None
        given = dict(dims)
        for row in self.rows.get(device, ()):
            if row.of != of or WIDTHS.get(row.dtype) != WIDTHS.get(dtype):
                continue
            if any(d not in given or block(given[d]) != block(n) for d, n in row.dims):
                continue
            # what changes the kernel most weighs most: the dtype, then exact sizes, then how much work there is
            off = 64.0 * (row.dtype != dtype) + 16.0 * sum(given[d] != n for d, n in row.dims)
            off += abs(math.log2(bucket(tokens) / row.tokens)) + abs(math.log2(bucket(heads) / row.heads))
            if best is None or off < best[0]:
                best = (off, row)
        if best is None:
            return NOTHING, "default"
        return best[1].config, "bucket" if best[0] else "exact"
