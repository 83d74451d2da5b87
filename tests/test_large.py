"""Tensors beyond 2^31 elements: offsets of 64 bits where 32 do not reach, grids of one dim."""

from __future__ import annotations

import pytest
import torch

import lagen
from lagen import data
from lagen.runtime.launches import Gathered, Shape, gather
from lagen.spec import read
from lagen.targets.compile import compile_launches
from lagen.targets.target import find

NAMES = sorted(p.stem for p in data.specs())
TARGET = "cuda:90"


def million(name: str, sequences: int = 0, size: int = 64) -> list[Gathered]:
    """Gathers the launches of a call with a million tokens and 2^32 elements in q, k and v."""
    variant = read(data.spec(name))
    wide = {d for t in variant.inputs for d in t.dims}
    size = 8 if variant.sizes else size  # features that grow with the square
    dims = tuple((d, size) for d in wide if d not in dict(variant.sizes))
    shape = Shape(b=1, t=1 << 20, h=4096 // size, k=size, v=size, dtype=torch.bfloat16, dims=dims, sequences=sequences)
    return gather(variant, shape, find(TARGET), states=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sequences", [0, 5])
def test_launches_of_a_million_tokens_count_in_64_bits_on_one_dim(name: str, sequences: int) -> None:
    found = million(name, sequences)
    assert found
    heads = any(t.head for t in read(data.spec(name)).inputs)
    for g in found:
        assert g.launch.grid[1:] == (1, 1), "65,535 is the most that y and z take"
        assert g.launch.grid[0] < 2**31
        constants = dict(g.launch.constants)
        packed = "HAS_SLOTS" if g.launch.kernel == "step" else "IS_VARLEN"
        assert g.phase == "step" and packed == "IS_VARLEN" or constants[packed] == (sequences > 0)
        if g.launch.kernel.startswith("cut_"):  # a border runs through the whole sequence
            assert constants["IS_WIDE"] == heads


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["gla", "rwkv6", "mamba2", "linear_attention"])
def test_no_pointer_is_moved_by_32_bits(name: str) -> None:
    found = [g for sequences in (0, 5) for g in million(name, sequences, 32)]
    reports = compile_launches([g.launch for g in found], workers=1)
    for r in reports:
        assert not r.failure
        assert r.short_offsets == 0, r.kernel


def test_a_stride_of_2_to_the_31_takes_the_wide_kernel() -> None:
    op = lagen.load("gla")
    q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
    g = -torch.rand(1, 1, 2, 16)
    far = [x.clone().as_strided(x.shape, (1, 2**31, 16, 1)).requires_grad_() for x in (q, k, v, g)]
    near = [x.clone().requires_grad_() for x in (q, k, v, g)]
    got, wanted = (torch.autograd.grad(op(*x, backend="triton").sum(), x) for x in (far, near))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(op(*far, backend="triton"), op(*near, backend="triton"))
