"""Packed sequences: the same bits as separate calls, on every backend, and what a wrong cu_seqlens is told."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.runtime.operator import ArgumentError, Operator
from lagen.spec import read
from lagen.verify import cases, laws
from lagen.verify.cases import Case, Extent
from lagen.verify.laws import Subject
from lagen.verify.sanitize import sanitize

NAMES = sorted(path.stem for path in data.specs())


def ragged(name: str, lengths: tuple[int, ...], dims: tuple[tuple[str, int], ...] = ()) -> tuple[Operator, Subject, Case]:
    variant = read(data.spec(name))
    op = lagen.load(variant)
    case = cases.make(variant, Extent(max(lengths), batch=len(lengths), heads=2, dims=dims), carried=True)
    return op, Subject(op, variant), laws.pack(case, lengths)


def both(subject: Subject, case: Case, lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what a packed call gives, and what separate calls give."""
    packed = laws.tensors(laws.call(subject, None, lengths), subject.variant, case)
    return packed, laws.tensors(laws.apart(laws.call(subject, None), lengths), subject.variant, case)


def same(subject: Subject, case: Case, lengths: tuple[int, ...]) -> None:
    """Asserts equal bits; a param's gradient is a sum over the sequences, whose order is another."""
    got, wanted = both(subject, case, lengths)
    summed = {f"d{p.name}" for p in subject.variant.params}
    for name in got:
        if name in summed:
            torch.testing.assert_close(got[name], wanted[name], rtol=2e-5, atol=2e-5)
        else:
            assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_apart_on_the_cpu(name: str) -> None:
    variant = read(data.spec(name))
    c = variant.chunk_default
    lengths = (0, 3, 0, 0, c, c + 1, 1, 2 * c + 5, 0)
    op, subject, case = ragged(name, lengths)
    for backend in ("cpp", "torch"):
        if backend in op.backends:
            same(replace(subject, backend=backend), case, lengths)


@pytest.mark.parametrize(("name", "form"), [("gla", None), ("simple_gla", 1), ("rwkv6", 1), ("hedgehog", 1), ("efficient_attention", None)])
def test_packed_is_apart_in_kernels_and_no_access_is_stray(name: str, form: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    c = read(data.spec(name)).chunk_default
    lengths = (0, 3, 0, c, c + 5, 0)
    op, subject, case = ragged(name, lengths, (("K", 9), ("V", 7)))
    module = next(m for n, m in sys.modules.items() if n.startswith(f"lagen_cache_{name}_") and getattr(m, "operator", None) is op)
    monkeypatch.setattr(module, "FORM", form)
    with sanitize() as findings:
        same(replace(subject, backend="triton"), case, lengths)
    assert [str(f) for f in findings] == []


def test_ten_thousand_ragged_batches_are_separate_calls() -> None:
    variant = read(data.spec("gla"))
    op = lagen.load(variant)
    generator = torch.Generator().manual_seed(0)
    for batch in range(10_000):
        count = int(torch.randint(1, 5, (), generator=generator))
        lengths = torch.randint(0, 20, (count,), generator=generator)
        bounds = [0, *lengths.cumsum(0).tolist()]
        q, k, v, g = (torch.randn(1, bounds[-1], 1, 4, generator=generator) for _ in range(4))
        state = torch.randn(count, 1, 4, 4, generator=generator)
        o, final = op(q, k, v, -g.abs(), initial_state=state, output_final_state=True, cu_seqlens=torch.tensor(bounds))
        for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            own = (x[:, start:end] for x in (q, k, v, -g.abs()))
            wanted, last = op(*own, initial_state=state[n : n + 1], output_final_state=True)
            assert torch.equal(o[:, start:end], wanted), batch
            assert torch.equal(final[n : n + 1], last), batch


def test_no_sequences_give_no_states() -> None:
    op = lagen.load("gla")
    x = torch.randn(1, 0, 1, 4)
    for backend in ("cpp", "torch", "triton", "oracle"):
        o, final = op(x, x, x, x, output_final_state=True, cu_seqlens=torch.tensor([0]), backend=backend)
        assert o.shape == x.shape
        assert final.shape == (0, 1, 4, 4)


WRONG = [
    ([1, 5], "gla: cu_seqlens starts at 1; it wants to start at 0"),
    ([0, 4, 3, 5], "gla: cu_seqlens decreases from 4 to 3 after sequence 1"),
    ([0, 4], "gla: cu_seqlens ends at 4; it wants to end at T = 5"),
]


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton", "oracle"])
@pytest.mark.parametrize(("bounds", "message"), WRONG, ids=["start", "decrease", "end"])
def test_wrong_bounds_are_named(bounds: list[int], message: str, backend: str) -> None:
    op = lagen.load("gla")
    x = torch.randn(1, 5, 1, 4)
    with pytest.raises(ArgumentError, match=message):
        op(x, x, x, -x.abs(), cu_seqlens=torch.tensor(bounds), backend=backend)


def test_a_wrong_copy_is_named_and_a_right_one_taken() -> None:
    op = lagen.load("gla")
    x = torch.randn(1, 5, 1, 4)
    given = (x, x, x, -x.abs())
    right = torch.tensor([0, 2, 5])
    with pytest.raises(ArgumentError, match="cu_seqlens ends at 4"):
        op(*given, cu_seqlens=right, cu_seqlens_cpu=torch.tensor([0, 4]))
    assert torch.equal(op(*given, cu_seqlens=right, cu_seqlens_cpu=right), op(*given, cu_seqlens=right.int()))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"cu_seqlens": [0, 5]}, "gla: cu_seqlens is a list; it wants a tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "gla: cu_seqlens is float32; it wants int32 or int64"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"gla: cu_seqlens is \[1, 2\]; it wants one dim of sequences \+ 1 numbers"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, r"gla: cu_seqlens is \[0\]; it wants one dim"),
        ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, "gla: cu_seqlens is on meta; it wants cpu"),
        ({"cu_seqlens_cpu": torch.tensor([0, 5])}, "gla: cu_seqlens_cpu is given without cu_seqlens"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": torch.zeros(1, 1, 4, 4)},
            r"gla: state S is \[1, 1, 4, 4\]; it wants \[NSEQ, H, K, V\] with NSEQ = 2, as cu_seqlens has it, not 1",
        ),
    ],
)
def test_a_bad_argument_is_named(named: dict, message: str) -> None:
    op = lagen.load("gla")
    x = torch.randn(1, 5, 1, 4)
    for _ in range(2):  # the second call finds nothing remembered of the first
        with pytest.raises(ArgumentError, match=message):
            op(x, x, x, -x.abs(), **named)


def test_more_than_one_batch_element_is_refused() -> None:
    x = torch.randn(2, 5, 1, 4)
    with pytest.raises(ArgumentError, match="gla: q has B = 2; with cu_seqlens it wants B = 1"):
        lagen.load("gla")(x, x, x, -x.abs(), cu_seqlens=torch.tensor([0, 5]))


def test_compile_takes_packed_sequences_of_any_number() -> None:
    op = lagen.load("gla")

    def mix(x: Tensor, state: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        return op(x, x, x, -x.abs(), initial_state=state, output_final_state=True, cu_seqlens=bounds)

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager", dynamic=True)
    for bounds in ([0, 2, 7], [0, 0, 3, 4, 9]):
        x, state = torch.randn(1, bounds[-1], 1, 4, requires_grad=True), torch.randn(len(bounds) - 1, 1, 4, 4, requires_grad=True)
        got, wanted = compiled(x, state, torch.tensor(bounds)), mix(x, state, torch.tensor(bounds))
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g, w)
        mine, theirs = (torch.autograd.grad([r.sum() for r in y], (x, state)) for y in (got, wanted))
        assert all(torch.equal(g, w) for g, w in zip(mine, theirs, strict=True))


def test_opcheck_passes_for_packed_sequences() -> None:
    op = lagen.load("gla")
    x = torch.randn(1, 7, 1, 4)
    given = [y.requires_grad_() for y in (x, x.clone(), x.clone(), -x.abs(), torch.randn(2, 1, 4, 4))]
    torch.library.opcheck(op._dispatch.forward, (*given, torch.tensor([0, 3, 7]), None, 0.5, True, ""))
