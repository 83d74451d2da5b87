"""Bits: the same on every run, and under torch.use_deterministic_algorithms whatever else is in the batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

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
    """Lets a batch of one be cut where a batch of three is not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    op = lagen.load("gla")
    module = next(m for n, m in sys.modules.items() if n.startswith("lagen_cache_gla_") and getattr(m, "operator", None) is op)
    monkeypatch.setattr(module, "_processors", lambda index: 4)
    yield
    torch.set_num_threads(threads)


def setup(backend: str, sizes: int) -> tuple[Operator, Subject, Case]:
    variant = read(data.spec("gla"))
    op = lagen.load("gla")
    time = 3 * variant.chunk_default + 5 if backend == "cpp" else 2 * variant.chunk_default + 5
    case = cases.make(
        variant, Extent(time, batch=3, heads=2 if backend == "triton" else 1, dims=(("K", sizes), ("V", sizes))), carried=True
    )
    return op, Subject(op, variant, backend), case


def row(case: Case, n: int) -> Case:
    def own(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x[n : n + 1] for x in xs)

    assert case.initial_states is not None
    states, d_states = own(case.initial_states), own(case.d_states)
    return replace(case, inputs=own(case.inputs), initial_states=states, d_outputs=own(case.d_outputs), d_states=d_states)


def alone(subject: Subject, case: Case) -> dict[str, bool]:
    """Tells of each result whether the second row has in company the bits that it has alone."""
    whole = laws.tensors(laws.call(subject, None), subject.variant, case)
    single = laws.tensors(laws.call(subject, None), subject.variant, row(case, 1))
    return {name: torch.equal(whole[name][1:2], x) for name, x in single.items()}


@pytest.mark.parametrize(("backend", "sizes"), [("cpp", 64), ("triton", 16)])
def test_company_changes_no_bit(backend: str, sizes: int, deterministic: None, four_processors: None) -> None:
    _, subject, case = setup(backend, sizes)
    assert all(alone(subject, case).values())
    again = [laws.tensors(laws.call(subject, None), subject.variant, case) for _ in range(2)]
    assert all(torch.equal(again[0][name], x) for name, x in again[1].items())


def test_the_form_is_chosen_by_the_batch_where_nobody_asks(four_processors: None) -> None:
    _, subject, case = setup("cpp", 64)  # a head is shared by threads where heads are few
    assert not all(alone(subject, case).values())


@pytest.mark.parametrize(("backend", "sizes"), [("cpp", 64), ("triton", 16)])
def test_packed_company_changes_no_bit(backend: str, sizes: int, deterministic: None, four_processors: None) -> None:
    _, subject, case = setup(backend, sizes)
    c = subject.variant.chunk_default
    lengths = (c + 3, c // 2, 2 * c)
    got = laws.tensors(laws.call(subject, None, lengths), subject.variant, laws.pack(case, lengths))
    own = laws.pack(row(case, 1), lengths[1:2])
    single = laws.tensors(laws.call(subject, None, lengths[1:2]), subject.variant, own)
    for name, x in single.items():
        part = got[name][1:2] if name.endswith("]") else got[name][:, lengths[0] : lengths[0] + lengths[1]]
        assert torch.equal(part, x), name
