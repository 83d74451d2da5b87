"""Bits: the same on every run, and under torch.use_deterministic_algorithms whatever else is in the batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.runtime.operator import Operator
from lagen.spec import read
from lagen.verify import cases, laws
from lagen.verify.cases import Case, Extent
from lagen.verify.laws import Subject


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a batch of one be cut where a larger one is not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    op = load("gla", "triton")
    module = next(m for n, m in sys.modules.items() if n.startswith("lagen_cache_gla_") and getattr(m, "operator", None) is op)
    monkeypatch.setattr(module, "_processors", lambda index: 4)
    yield
    torch.set_num_threads(threads)


VARIANTS = {path.stem: read(path) for path in data.specs()}
HERE = [(name, "cpp", 24) for name in VARIANTS]
EACH = [*HERE, ("gla", "triton", 16)]


@cache
def load(name: str, backend: str) -> Operator:
    return lagen.load(VARIANTS[name], printed=(backend,))


def setup(name: str, backend: str, sizes: int) -> tuple[Subject, Case]:
    variant, triton = VARIANTS[name], backend == "triton"
    extent = Extent(2 * variant.chunk_default + 5, batch=3 if triton else 4, heads=2 if triton else 1, dims=(("K", sizes), ("V", sizes)))
    return Subject(load(name, backend), variant, backend), cases.make(variant, extent, carried=True)


def row(case: Case, n: int) -> Case:
    def own(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x[n : n + 1] for x in xs)

    states = None if case.initial_states is None else own(case.initial_states)
    return replace(case, inputs=own(case.inputs), initial_states=states, d_outputs=own(case.d_outputs), d_states=own(case.d_states))


def results(subject: Subject, case: Case, lengths: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return laws.tensors(laws.call(subject, None, lengths), subject.variant, case)


def summed(subject: Subject) -> set[str]:
    """Names the gradients that are sums over the batch."""
    return {f"d{p.name}" for p in subject.variant.params}


def changed(subject: Subject, case: Case) -> list[str]:
    """Names the results of the second row that have in company other bits than alone."""
    whole, single = results(subject, case), results(subject, row(case, 1))
    return [name for name, x in single.items() if name not in summed(subject) and not torch.equal(whole[name][1:2], x)]


@pytest.mark.parametrize(("name", "backend", "sizes"), HERE)
def test_a_call_repeats_to_the_bit(name: str, backend: str, sizes: int, four_processors: None) -> None:
    """Forward and backward, whichever form the batch has chosen."""
    subject, case = setup(name, backend, sizes)
    for given in (case, row(case, 1)):
        first, second = (results(subject, given) for _ in range(2))
        assert [key for key, x in first.items() if not torch.equal(x, second[key])] == []


@pytest.mark.parametrize(("name", "backend", "sizes"), EACH)
def test_company_changes_no_bit(name: str, backend: str, sizes: int, deterministic: None, four_processors: None) -> None:
    subject, case = setup(name, backend, sizes)
    assert changed(subject, case) == []
    first, second = (results(subject, case) for _ in range(2))
    assert [key for key, x in first.items() if not torch.equal(x, second[key])] == []


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "gsa"])
def test_the_form_is_chosen_by_the_batch_where_nobody_asks(name: str, four_processors: None) -> None:
    assert changed(*setup(name, "cpp", 64)) != []  # a head is shared by threads where heads are few


@pytest.mark.parametrize(("name", "backend", "sizes"), EACH)
def test_packed_company_changes_no_bit(name: str, backend: str, sizes: int, deterministic: None, four_processors: None) -> None:
    subject, case = setup(name, backend, sizes)
    c = subject.variant.chunk_default
    lengths = (c + 3, c // 2, 2 * c, 0)[: case.inputs[0].shape[0]]
    got = results(subject, laws.pack(case, lengths), lengths)
    single = results(subject, laws.pack(row(case, 1), lengths[1:2]), lengths[1:2])
    for key in single.keys() - summed(subject):
        part = got[key][1:2] if key.endswith("]") else got[key][:, lengths[0] : lengths[0] + lengths[1]]
        assert torch.equal(part, single[key]), key
