"""Kernels whose dims take several tiles: shares of a sum are added up once, and nothing is added once a tile."""

from __future__ import annotations

import pytest

import lagen
from lagen import data
from lagen.ir.tunable import CHUNK, Config
from lagen.spec import read
from lagen.tune.job import job
from lagen.tune.space import gpu_space
from lagen.verify.cases import Extent, make
from lagen.verify.laws import Subject, call, judge

NAMES = sorted(p.stem for p in data.specs())
TILE, SIZE = 16, 20
CHOSEN = ("segment", "warps", "stages")


@pytest.mark.parametrize("name", NAMES)
def test_narrow_tiles_change_no_result(name: str) -> None:
    variant = read(data.spec(name))
    passes = ("forward", "backward")
    small = {"K": 6} if name in ("based", "rebased") else {"K": SIZE}  # of which features are made, 28 and 21 of them
    wanted = job(variant, "interpreter", True, passes, "fp32", {**small, "V": SIZE, "M": SIZE}, 1, 64, 2)
    tunables = [t for of in passes for t in gpu_space(wanted, of).tunables]
    tiles = {t.name: TILE for t in tunables if t.name != CHUNK and t.name.partition(" ")[2] not in CHOSEN}
    assert tiles
    op = lagen.load(variant, ("triton",), wanted.entries(Config.of(tiles)))
    subject = Subject(op, variant, "triton")
    case = make(variant, Extent(variant.chunk_default + 3, batch=1, heads=2, dims=wanted.dims), carried=variant.causal)
    assert [str(r) for r in judge("tiles", subject, case, call(subject, None)) if not r.ok] == []
