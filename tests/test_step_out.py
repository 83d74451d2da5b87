"""What a decode step writes: the caller's outputs and states, and nothing besides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lagen
from lagen import data
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.plan import plan
from lagen.runtime.operator import ArgumentError, Operator
from lagen.spec import read
from lagen.targets.launch import record
from lagen.targets.target import find
from lagen.tune.trial import Refused, decoder, repeated
from lagen.verify import cases
from lagen.verify.cases import Extent

NAMES = sorted(p.stem for p in data.specs() if read(p).causal)
IN_TORCH = {"based", "cosformer", "gated_rfa", "hedgehog", "performer", "rebased"}
"""Whose feature maps change the size of a vector, and run as torch operations before the kernel."""


Dims = tuple[tuple[str, int], ...]


def served(name: str, tokens: int = 1, rows: int = 3, dims: Dims = ()) -> tuple[Operator, list[Tensor], list[Tensor]]:
    """Returns an operator, tensors of a step (of several tokens where there are more than one), and states."""
    variant = read(data.spec(name))
    case = cases.make(variant, Extent(max(tokens, 1), batch=rows, heads=2, dims=dims), carried=True)
    assert case.initial_states is not None
    inputs = case.inputs if tokens > 1 else [x[:, 0] for x in case.inputs]
    return lagen.load(variant), [*inputs, *case.params], list(case.initial_states)


def many(x: object) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)  # type: ignore[return-value]


def one(x: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return x[0] if len(x) == 1 else tuple(x)


def padded(x: Tensor) -> Tensor:
    """Returns a poisoned tensor like ``x`` with room between its rows."""
    wide = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    return wide[:, 1]


class Operations(TorchDispatchMode):
    """Notes the operations that make a tensor or read one on the host; views and writes in place are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returns = func._schema.returns
        if func.namespace == "aten" and (not returns or any(r.alias_info is None for r in returns)):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_go_where_the_caller_says(name: str, tokens: int) -> None:
    op, tensors, states = served(name, tokens)
    for backend in (None, "torch"):
        mine, theirs = [s.clone() for s in states], [s.clone() for s in states]
        for _ in range(3):  # the second and third go the short way where there is one
            wanted = many(op.step(*tensors, one(mine), backend=backend)[0])
            for out in ([torch.full_like(o, torch.nan) for o in wanted], [padded(o) for o in wanted]):
                again = [s.clone() for s in theirs]
                got = many(op.step(*tensors, one(again), backend=backend, out=one(out))[0])
                assert all(a is b for a, b in zip(got, out, strict=True))
                assert all(map(torch.equal, (*got, *again), (*wanted, *mine)))
            theirs = again


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_the_cpu_makes_no_tensor(name: str) -> None:
    op, tensors, states = served(name)
    if "cpp" not in op.backends:
        pytest.skip(f"{name} has no C++")
    with Operations() as seen:
        out = [*many(op.step(*tensors, one(states))[0])]
    assert len(seen.made) == len(out)
    with Operations() as seen:
        op.step(*tensors, one(states), out=one(out))
    assert seen.made == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_a_gpu_makes_no_tensor(name: str) -> None:
    """So a captured graph holds its launches alone; tiles narrower than V make several programs share a state."""
    variant = read(data.spec(name))
    op, tensors, states = served(name, dims=(("V", 128), ("E", 128)))
    recurrence = canonicalise(variant)
    assert any(k.kind == "torch" for k in plan(recurrence, differentiate(recurrence)).step) == (name in IN_TORCH)
    out = [o.to("meta") for o in many(op.step(*tensors, one([s.clone() for s in states]))[0])]
    tensors, states = [x.to("meta") for x in tensors], [x.to("meta") for x in states]
    for slots in (None, torch.empty(3, dtype=torch.int32, device="meta")):
        with record(find("cuda:90")) as launched, Operations() as seen:
            op.step(*tensors, one(states), slots=slots, backend="triton", out=one(out))
        assert {x.kernel.partition("_")[0] for x in launched} == {"step"}
        assert seen.made == [] or name in IN_TORCH


def test_a_wrong_out_is_named_before_anything_is_written() -> None:
    op, tensors, states = served("gla")
    wide = op.step(*tensors, states[0].clone())[0]
    before = states[0].clone()
    for out, message in (
        (wide[:1], r"gla.step: out is \[1, 2, 11\]; it wants \[B, H, V\] = \[3, 2, 11\]"),
        (wide.double(), "gla.step: out is float64; it wants float32"),
        (wide.to("meta"), "gla.step: out is on meta; it wants cpu"),
        ([wide, wide], "gla.step: out is a list; it wants a tensor"),
        (wide.mT.contiguous().mT, r"gla.step: out has strides \[22, 1, 2\]; it wants the numbers of each head behind each other"),
        (tensors[2], "gla: out shares memory with v; a step writes it, and wants it apart"),
        (states[0][:, :, 0], "gla: out shares memory with state S"),
        (wide[:1].expand(3, -1, -1), "gla: out is an expanded view"),
    ):
        for _ in range(2):
            with pytest.raises(ArgumentError, match=message):
                op.step(*tensors, states[0], out=out)
        assert torch.equal(states[0], before)


def test_slots_may_not_lie_in_what_is_written() -> None:
    op, tensors, states = served("gla")
    slots = states[0].view(torch.int32).flatten()[:3].zero_()
    with pytest.raises(ArgumentError, match="gla: state S shares memory with slots"):
        op.step(*tensors, states[0], slots=slots)


def test_a_mapped_step_wants_mapped_states_and_outputs() -> None:
    op, tensors, states = served("gla")
    pairs = [torch.stack([x, x.flip(0)]) for x in (*tensors, states[0])]
    wanted = torch.stack([op.step(*(x[i] for x in pairs[:-1]), pairs[-1][i].clone())[0] for i in range(2)])
    out = torch.empty_like(wanted)
    torch.vmap(lambda o, *x: op.step(*x, out=o)[0])(out, *(x.clone() for x in pairs))
    assert torch.equal(out, wanted)
    with pytest.raises(ArgumentError, match="gla.step under torch.vmap: state S is not mapped, and every element would write it"):
        torch.vmap(lambda *x: op.step(*x, states[0])[0])(*pairs[:-1])
    with pytest.raises(ArgumentError, match="gla.step under torch.vmap: out is not mapped"):
        torch.vmap(lambda *x: op.step(*x, out=wanted[0])[0])(*pairs)


def test_a_written_output_has_a_new_version() -> None:
    op, tensors, states = served("gla")
    out = op.step(*tensors, states[0])[0].clone()
    for _ in range(2):  # through the dispatcher, and past it
        weights = torch.randn_like(out, requires_grad=True)
        loss = (weights * out).sum()
        with torch.no_grad():
            op.step(*tensors, states[0], out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_compile_takes_a_step_into_given_outputs() -> None:
    op, tensors, states = served("gla")
    mine, theirs = states[0].clone(), states[0].clone()
    wanted = op.step(*tensors, theirs)[0]
    out = torch.full_like(wanted, torch.nan)
    torch.compile(lambda out, *x: op.step(*x, out=out)[0], fullgraph=True, backend="aot_eager")(out, *tensors, mine)
    assert torch.equal(out, wanted)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["gla", "mlstm"])
def test_the_tuner_times_a_step_that_repeats(name: str) -> None:
    variant = read(data.spec(name))
    decode, reset = decoder(lagen.load(variant), cases.make(variant, Extent(1, batch=2, heads=2)), "cpp")
    repeated(decode, reset)
    with pytest.raises(Refused, match="other bits"):
        repeated(decode)
