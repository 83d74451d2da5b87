"""Decode for servers: pools of states by slot, several tokens a call, speculative tokens verified and committed, what may not overlap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lagen
from lagen import data
from lagen.runtime.operator import ArgumentError, Operator
from lagen.spec import read
from lagen.verify import cases
from lagen.verify.cases import Extent
from lagen.verify.sanitize import sanitize

NAMES = sorted(p.stem for p in data.specs() if read(p).causal)
POOL = 5


def serve(name: str, tokens: int, rows: int = 3, dims: tuple[tuple[str, int], ...] = ()) -> tuple[Operator, list[Tensor], list[Tensor]]:
    """Returns an operator, tokens for a call, and a pool of states."""
    variant = read(data.spec(name))
    given = cases.make(variant, Extent(tokens, batch=rows, heads=2, dims=dims))
    pool = cases.make(variant, Extent(1, batch=POOL, heads=2, dims=dims), carried=True).initial_states
    assert pool is not None
    return lagen.load(variant), [*given.inputs, *given.params], list(pool)


def token(op: Operator, tensors: list[Tensor], t: int) -> list[Tensor]:
    return [x[:, t] if i < len(op.spec.inputs) else x for i, x in enumerate(tensors)]


def one(states: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else tuple(states)


def many(x: object) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def check_pool(name: str, backend: str, dims: tuple[tuple[str, int], ...] = ()) -> None:
    """Asserts that rows advance their slots as they would advance states of their own, and that padding does nothing.

    To the bit, but in torch, whose matmuls add up in another order for another number of rows.
    """
    loose = {"rtol": 1e-5, "atol": 1e-5} if backend == "torch" else {"rtol": 0, "atol": 0}
    op, tensors, pool = serve(name, 2, dims=dims)
    for slots in (torch.tensor([3, -1, 0]), torch.tensor([-1, -1, 4], dtype=torch.int32)):
        mine = [s.clone() for s in pool]
        o, _ = op.step(*tensors, one(mine), slots=slots, backend=backend)
        kept = slots >= 0
        own = [s[slots[kept].long()] for s in pool]
        rows = [x[kept] if i < len(op.spec.inputs) else x for i, x in enumerate(tensors)]
        wanted = []
        for t in range(2):
            wanted.append(many(op.step(*token(op, rows, t), one(own), backend=backend)[0]))
        for got, parts in zip(many(o), zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(got[kept], torch.stack(parts, 1), **loose)
            assert not got[~kept].any()
        for s, before, after in zip(mine, pool, own, strict=True):
            expected = before.clone()
            expected[slots[kept].long()] = after
            torch.testing.assert_close(s, expected, **loose)


@pytest.mark.parametrize("name", NAMES)
def test_rows_advance_their_slots(name: str) -> None:
    for backend in ("cpp", "torch"):
        if backend in lagen.load(data.spec(name)).backends:
            check_pool(name, backend)


@pytest.mark.parametrize("name", ["gla", "linear_attention", "mamba2", "hedgehog", "mlstm"])
def test_rows_advance_their_slots_in_kernels(name: str) -> None:
    with sanitize() as findings:
        check_pool(name, "triton", (("K", 13), ("V", 70)))
    assert [str(f) for f in findings] == []


class Sizes(TorchDispatchMode):
    """Notes how many rows the results of operations have."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        self.rows += [made.shape[0]] if isinstance(made, Tensor) and made.dim() > 1 else []
        return made


def test_a_step_in_kernels_copies_no_pool() -> None:
    """Where several programs read a state that one writes, they read a copy of the call's rows."""
    op, tensors, pool = serve("linear_attention", 1, dims=(("K", 13), ("V", 70)))
    large = [torch.cat([s] * 20) for s in pool]
    with Sizes() as seen:
        op.step(*token(op, tensors, 0), one(large), slots=torch.tensor([70, -1, 3]), backend="triton")
    assert max(seen.rows) == 3


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    """Whatever dim lies innermost, and whatever lies between the rows."""
    op, tensors, pool = serve(name, 1)
    row = token(op, tensors, 0)
    if "cpp" not in op.backends:
        pytest.skip(f"{name} has no C++")
    apart = [torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]] if x.dim() else x for x in row]
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x for x in row]
    for slots in (None, torch.tensor([2, -1, 0])):
        own = pool if slots is not None else [s[:3] for s in pool]
        wanted_states = [s.clone() for s in own]
        wanted = many(op.step(*row, one(wanted_states), slots=slots)[0])
        for given in (apart, turned):
            for _ in range(2):  # the second goes the short way where there is one
                mine = [s.clone() for s in own]
                got = many(op.step(*given, one(mine), slots=slots)[0])
                assert all(map(torch.equal, (*got, *mine), (*wanted, *wanted_states)))


def test_a_pool_is_written_without_a_look_at_the_slots() -> None:
    from lagen.runtime import pool

    states, rows = (torch.randn(5, 2),), (torch.randn(3, 2),)
    slots = torch.tensor([4, -1, 0])
    expected = states[0].clone()
    expected[[4, 0]] = rows[0][[0, 2]]

    class Elsewhere(Tensor):  # as on a GPU, whose values the host does not see
        device = torch.device("cuda")

    real = torch.full, torch.arange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.torch, "full", lambda *a, device, **k: real[0](*a, **k))
        patch.setattr(pool.torch, "arange", lambda *a, device, **k: real[1](*a, **k))
        pool.put(states, slots.as_subclass(Elsewhere), rows)
    assert torch.equal(states[0].as_subclass(Tensor), expected)


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton", "oracle"])
def test_verified_tokens_leave_the_state_and_committed_ones_are_steps(backend: str) -> None:
    op, tensors, pool = serve("linear_attention", 4)
    slots, accepted = torch.tensor([2, -1, 0]), torch.tensor([3, 4, 0])
    mine = [s.clone() for s in pool]
    versions = [s._version for s in mine]
    o = op.verify(*tensors, one(mine), slots=slots, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(mine, pool, strict=True))
    assert [s._version for s in mine] == versions
    stepped = [s.clone() for s in pool]
    wanted, _ = op.step(*tensors, one(stepped), slots=slots, backend=backend)
    assert torch.equal(o, wanted)
    op.commit(*tensors, one(mine), slots=slots, accepted=accepted, backend=backend)
    for t in range(3):
        rows = torch.where(accepted > t, slots, -1)
        op.step(*token(op, tensors, t), one(pool), slots=rows, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(mine, pool, strict=True))
    assert any(s._version > v for s, v in zip(mine, versions, strict=True))


def test_without_slots_each_row_has_its_state() -> None:
    op, tensors, pool = serve("gla", 3, rows=POOL)
    o = op.verify(*tensors, pool[0])
    mine, whole = pool[0].clone(), pool[0].clone()
    assert torch.equal(op.step(*tensors, whole)[0], o)
    assert op.commit(*tensors, mine, accepted=torch.full((POOL,), 3)) is mine
    assert torch.equal(mine, whole)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet"])
def test_greedy_decoding_agrees_with_the_chunked_form_over_a_thousand_tokens(name: str) -> None:
    variant = read(data.spec(name))
    op = lagen.load(variant)
    generator = torch.Generator().manual_seed(1)
    case = cases.make(variant, Extent(64, batch=1, heads=2, dims=(("K", 16), ("V", 16))))
    head = torch.randn(case.d_outputs[0][0, 0].numel(), 64, generator=generator)
    tables = [x[0] for x in case.inputs]  # what each of 64 words becomes
    words, state = [0], None
    for _ in range(1000):
        o, state = op.step(*(t[words[-1:]] for t in tables), *case.params, state=state)
        words.append(int((o.flatten() @ head).argmax()))
    o = op(*(t[words[:-1]][None] for t in tables), *case.params)
    again = (o[0].flatten(1) @ head).argmax(1).tolist()
    assert len(set(words)) > 3, "a sequence that says something"
    assert again == words[1:]


# ---- what is refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"slots": torch.tensor([0, 5, 1])}, "gla: slots is 5 at row 1; it wants 0 to 4, a state of the pool, or -1 for padding"),
        ({"slots": torch.tensor([0, -2, 1])}, "gla: slots is -2 at row 1"),
        ({"slots": torch.tensor([1, -1, 1])}, "gla: slots is 1 at rows 0 and 2; a call may advance a state once"),
        ({"slots": torch.tensor([1, 2])}, r"gla: slots is \[2\]; it wants \[B\] = \[3\]"),
        ({"slots": torch.tensor([1.0, 2.0, 0.0])}, "gla: slots is float32; it wants int32 or int64"),
        ({"slots": [0, 1, 2]}, "gla: slots is a list; it wants a tensor"),
        ({"slots": torch.tensor([0, 1, 2], device="meta")}, "gla: slots is on meta; it wants cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "torch", "triton", "oracle"])
def test_wrong_slots_are_named_before_anything_is_written(named: dict, message: str, backend: str) -> None:
    op, tensors, pool = serve("gla", 1)
    before = pool[0].clone()
    with pytest.raises(ArgumentError, match=message):
        op.step(*token(op, tensors, 0), pool[0], backend=backend, **named)
    assert torch.equal(pool[0], before)


def test_a_wrong_state_is_named() -> None:
    op, tensors, pool = serve("gla", 1)
    row, slots = token(op, tensors, 0), torch.tensor([0, 1, 2])
    for state, message in (
        (pool[0][:, :1], r"gla: state S is \[5, 1, 13, 11\]; it wants \[POOL, H, K, V\] with H = 2"),
        (pool[0].half(), "gla: state S is float16; it wants float32"),
        (pool[0].to("meta"), "gla: state S is on meta; it wants cpu"),
    ):
        with pytest.raises(ArgumentError, match=message):
            op.step(*row, state, slots=slots)
    with pytest.raises(ArgumentError, match=r"gla.step: slots is given without the state"):
        op.step(*row, slots=slots)
    for verb in (op.verify, op.commit):
        extra = {"accepted": torch.zeros(3, dtype=torch.int64)} if verb == op.commit else {}
        with pytest.raises(ArgumentError, match="wants the state"):
            verb(*tensors, **extra)
    with pytest.raises(ArgumentError, match=r"accepted is 2 at row 1; it wants 0 to 1, the number of tokens"):
        op.commit(*tensors, pool[0], slots=slots, accepted=torch.tensor([0, 2, 0]))
    with pytest.raises(ArgumentError, match=r"gla.commit: q is one token"):
        op.commit(*row, pool[0], slots=slots, accepted=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton", "oracle"])
def test_what_shares_memory_with_a_state_is_refused(backend: str) -> None:
    op, tensors, pool = serve("linear_attention", 1)
    row = token(op, tensors, 0)
    s, z = pool
    before = s.clone()
    for given, states, message in (
        ([s[:3, :, :, 0], *row[1:]], (s, z), "linear_attention: state S shares memory with q; a step writes it, and wants it apart"),
        (row, (s, s[:, :, :, 0]), "linear_attention: state z shares memory with state S; a step writes it, and wants it apart"),
        (row, (s[:1].expand(5, -1, -1, -1), z), "linear_attention: state S is an expanded view"),
    ):
        with pytest.raises(ArgumentError, match=message):
            op.step(*given, states, slots=torch.tensor([0, 1, 2]), backend=backend)
        assert torch.equal(s, before)


def test_what_lies_side_by_side_in_one_storage_is_taken() -> None:
    op, tensors, pool = serve("linear_attention", 1)
    row = token(op, tensors, 0)
    s, z = pool
    both = torch.cat([s, z[..., None]], -1)
    slots = torch.tensor([0, 1, 2])
    wanted, _ = op.step(*row, (s, z), slots=slots)
    got, _ = op.step(*row, (both[..., :-1], both[..., -1]), slots=slots)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(both, torch.cat([s, z[..., None]], -1))


def test_a_gradient_through_an_overwritten_state_raises() -> None:
    op, tensors, pool = serve("gla", 1, rows=POOL)
    state = pool[0].clone()
    weights = torch.randn_like(state, requires_grad=True)
    loss = (weights * state).sum()
    with torch.no_grad():
        op.step(*token(op, tensors, 0), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compile_takes_a_step_over_a_pool() -> None:
    op, tensors, pool = serve("gla", 2)
    slots = torch.tensor([4, -1, 1])
    compiled = torch.compile(lambda *x: op.step(*x, slots=slots)[0], fullgraph=True, backend="aot_eager")
    mine, other = pool[0].clone(), pool[0].clone()
    assert torch.equal(compiled(*tensors, mine), op.step(*tensors, other, slots=slots)[0])
    assert torch.equal(mine, other)
    row = token(op, tensors, 0)
    torch.library.opcheck(op._dispatch.step, (*row, pool[0], torch.zeros_like(row[2]), slots, 0.5, ""))
