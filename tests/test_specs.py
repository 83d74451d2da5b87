"""Every shipped spec against its paper's equations, written by hand (paper_equations): float64, odd sizes, to 1e-12."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from paper_equations import EQUATIONS

from lagen import data
from lagen.ir.variant import Tensor, Variant
from lagen.spec import read
from lagen.verify.oracle import oracle

SIZES = {"B": 2, "T": 13, "H": 3, "HV": 6, "K": 5, "V": 7, "M": 9, "D": 4, "E": 8, "N": 3}
PATHS = {path.stem: path for path in data.specs()}


def values(declared: Tensor, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn([SIZES[d] for d in declared.shape], dtype=torch.float64, generator=generator) / (2.0 if declared.name in "abk" else 1.0)
    if declared.name == "w" and not declared.token:
        return x.abs()
    if declared.name in ("g", "w", "g_gamma", "g_a"):
        return -x.abs()
    if declared.name in ("pos", "lower_bound"):
        return x.sigmoid()
    return x.abs() if declared.name in ("s", "beta_a") else x


def test_every_spec_has_its_equation_and_the_other_way_round() -> None:
    assert set(PATHS) == set(EQUATIONS)


@pytest.mark.parametrize("name", sorted(EQUATIONS))
def test_spec_is_its_paper(name: str) -> None:
    variant: Variant = read(PATHS[name])
    assert variant.name == name
    assert re.search(r"arXiv:\d{4}\.\d{5}\b", variant.doc), "the paper is cited"
    declared = variant.inputs + variant.params
    assert [t.name for t in declared] == list(inspect.signature(EQUATIONS[name]).parameters)
    generator = torch.Generator().manual_seed(7)
    tensors = [values(t, generator) for t in declared]
    (ours,), _ = oracle(variant, tuple(tensors[: len(variant.inputs)]), tuple(tensors[len(variant.inputs) :]))
    theirs = EQUATIONS[name](*tensors)
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all() and (ours - theirs).norm() <= 1e-12 * theirs.norm(), (ours - theirs).norm() / theirs.norm()


@pytest.mark.parametrize("name", sorted(EQUATIONS))
def test_spec_is_about_a_dozen_lines(name: str) -> None:
    assert len(PATHS[name].read_text().splitlines()) <= 24
