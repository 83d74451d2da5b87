"""What torch asks of an operator, over all shipped specs: opcheck, gradcheck, compile, export, autocast, vmap, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.ir.roles import gate_inputs
from lagen.ir.variant import Variant
from lagen.runtime.operator import Operator
from lagen.spec import read
from lagen.verify import cases
from lagen.verify.cases import Extent

NAMES = sorted(path.stem for path in data.specs())
FEW = ("gla", "mamba2", "gated_deltanet", "efficient_attention")
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in NAMES]
"""Every spec; those beyond a few are slow: tracing takes seconds."""

SIZES = (("K", 3), ("V", 2))


def given(name: str, tokens: int = 5, batch: int = 2) -> tuple[Variant, Operator, list[Tensor], list[Tensor]]:
    """Returns a spec with its operator on torch, tensors and initial states."""
    variant = read(data.spec(name))
    case = cases.make(variant, Extent(tokens, batch=batch, heads=1, dims=SIZES), carried=True)
    return variant, lagen.load(variant, printed=()), [*case.inputs, *case.params], list(case.initial_states or ())


def flat(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for part in x for y in flat(part)]  # type: ignore[attr-defined]


def call(op: Operator, variant: Variant, tensors: list[Tensor], states: list[Tensor], **named: object) -> list[Tensor]:
    if not variant.causal:
        return flat(op(*tensors, **named))
    return flat(op(*tensors, initial_state=tuple(states), output_final_state=True, **named))


@pytest.mark.parametrize("name", EACH)
def test_opcheck_passes(name: str) -> None:
    variant, op, tensors, states = given(name)
    leaves = [x.requires_grad_() for x in (*tensors, *states)]
    torch.library.opcheck(op._dispatch.forward, (*leaves, None, None, 0.5, variant.causal, ""))
    if variant.causal:
        token = [x.detach()[:, 0] if i < len(variant.inputs) else x.detach() for i, x in enumerate(tensors)]
        outputs = [torch.zeros(shape) for shape in op._shapes(tuple(token), ("B",))[0]]
        torch.library.opcheck(op._dispatch.step, (*token, *(s.detach() for s in states), *outputs, None, 0.5, ""))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    variant, op, tensors, states = given(name, batch=1)
    leaves = [x.double().requires_grad_() for x in (*tensors, *states)]
    n = len(tensors)
    assert torch.autograd.gradcheck(lambda *x: tuple(call(op, variant, list(x[:n]), list(x[n:]))), leaves, fast_mode=True)


@pytest.mark.parametrize("name", EACH)
def test_compile_and_export_take_the_whole_graph_at_any_length_and_batch(name: str) -> None:
    torch._dynamo.reset()  # a limit on recompilations counts those of other specs
    variant, op, tensors, states = given(name)

    class Mixer(torch.nn.Module):
        def forward(self, tensors: list[Tensor], states: list[Tensor]) -> list[Tensor]:
            return call(op, variant, tensors, states)

    batch, time = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("time", min=2, max=512)
    free = [{0: batch, 1: time} if i < len(variant.inputs) else {} for i in range(len(tensors))]
    shapes = {"tensors": free, "states": [{0: batch} for _ in states]}
    exported = torch.export.export(Mixer(), (tensors, states), dynamic_shapes=shapes)
    compiled = torch.compile(
        lambda *x: call(op, variant, list(x[: len(tensors)]), list(x[len(tensors) :])), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens, rows in ((5, 2), (70, 3)):
        _, _, own, first = given(name, tokens, rows)
        leaves = [x.requires_grad_() for x in (*own, *first)]
        wanted = call(op, variant, own, first)
        got = compiled(*leaves)
        for other in (got, exported.module()(own, first)):
            for g, w in zip(other, wanted, strict=True):
                torch.testing.assert_close(g, w)
        mine, theirs = (
            torch.autograd.grad([y.sum() for y in made if y.requires_grad], leaves, allow_unused=True) for made in (got, wanted)
        )
        for g, w in zip(mine, theirs, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_narrows_inputs_and_leaves_gates_and_states(name: str) -> None:
    variant, op, tensors, states = given(name)
    gates = gate_inputs(variant)
    narrow = [x.bfloat16() if i < len(variant.inputs) and variant.inputs[i].name not in gates else x for i, x in enumerate(tensors)]
    leaves, others = ([x.detach().requires_grad_() for x in (*group, *states)] for group in (tensors, narrow))
    n = len(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(op, variant, leaves[:n], leaves[n:])
        mine = torch.autograd.grad([y.sum() for y in got], leaves, allow_unused=True)
    wanted = call(op, variant, others[:n], others[n:])
    theirs = torch.autograd.grad([y.sum() for y in wanted], others, allow_unused=True)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)
    for leaf, g, w in zip(leaves, mine, theirs, strict=True):
        assert g is None or g.dtype == leaf.dtype
        assert g is w is None or torch.equal(g, w.to(g.dtype))
    if variant.causal:
        assert got[-1].dtype == torch.float32
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            row = [x[:, 0] if i < len(variant.inputs) else x for i, x in enumerate(tensors)]
            o, _ = op.step(*row, tuple(s.clone() for s in states))
        first = variant.inputs[0].name in gates
        assert flat(o)[0].dtype == (torch.float32 if first else torch.bfloat16)


def test_a_step_that_went_before_is_cast_too() -> None:
    _, _, tensors, (state,) = given("gla")
    op = lagen.load("gla")
    token = [x[:, 0] for x in tensors]
    for _ in range(2):
        assert op.step(*token, state)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op.step(*token, state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gla", "mamba2", "efficient_attention", "gated_deltanet"])
def test_a_mapped_dim_is_a_call_for_each_of_its_elements(name: str) -> None:
    variant, op, _, _ = given(name)
    sets = [given(name, 5, 2)[2:], [[x.flip(0) if i < len(variant.inputs) else x for i, x in enumerate(g)] for g in given(name, 5, 2)[2:]]]
    n = len(variant.inputs)
    tokens = [torch.stack([s[0][i] for s in sets]).requires_grad_() for i in range(n)]
    params = sets[0][0][n:]
    states = [torch.stack(parts) for parts in zip(*(s[1] for s in sets), strict=True)]

    def one(tokens: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        return call(op, variant, [*tokens, *params], states)

    got = torch.vmap(one)(tokens, states)
    wanted = [one([x[i] for x in tokens], [s[i] for s in states]) for i in range(2)]
    for g, parts in zip(got, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(parts))
    mine = torch.autograd.grad([g.sum() for g in got], tokens)
    theirs = torch.autograd.grad([x.sum() for parts in wanted for x in parts], tokens)
    for g, w in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, w)
    wide = [p.expand(2, *p.shape) for p in params]  # mapped params: a call for each
    mapped = torch.vmap(lambda tokens, params, states: call(op, variant, [*tokens, *params], states))(tokens, wide, states)
    for g, w in zip(mapped, got, strict=True):
        torch.testing.assert_close(g, w)


def test_a_mapped_step_writes_each_state() -> None:
    _, op, tensors, states = given("gla")
    token = [x[:, 0] for x in tensors]
    pair = [torch.stack([x, x.flip(0)]) for x in token]
    mine, theirs = torch.stack([states[0], states[0] * 2]), torch.stack([states[0], states[0] * 2])
    o = torch.vmap(lambda *x: op.step(*x)[0])(*pair, mine)
    for i in range(2):
        assert torch.equal(o[i], op.step(*(x[i] for x in pair), theirs[i])[0])
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["gla", "hedgehog", "gated_deltanet"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_has_the_same_gradients(name: str, reentrant: bool) -> None:
    variant, op, tensors, states = given(name)
    leaves = [x.requires_grad_() for x in (*tensors, *states)]
    n = len(tensors)

    def run(*x: Tensor) -> Tensor:
        return sum(y.sum() for y in call(op, variant, list(x[:n]), list(x[n:])))  # type: ignore[return-value]

    torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    for leaf, wanted in zip(leaves, torch.autograd.grad(run(*leaves), leaves), strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name: str) -> None:
    variant, op, tensors, states = given(name)
    tensors[0].requires_grad_()
    (d,) = torch.autograd.grad(sum(y.sum() for y in call(op, variant, tensors, states)), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative: its backward cannot be differentiated"):
        d.sum().backward()


@pytest.mark.slow
def test_aot_inductor_packs_the_operator_and_takes_any_length(tmp_path: Path) -> None:
    op = lagen.load("gla")

    class Mixer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            o, state = op(torch.tanh(q), k, v, torch.nn.functional.logsigmoid(g), output_final_state=True)
            return o * 2, state

    def draw(tokens: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, tokens, 2, 8) for _ in range(4))

    time = torch.export.Dim("time", min=2, max=4096)
    exported = torch.export.export(Mixer(), draw(9), dynamic_shapes=dict.fromkeys("qkvg", {1: time}))
    packed = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "gla.pt2"))
    loaded = torch._inductor.aoti_load_package(packed)  # calls the operator by name, which importing its module registers
    for tokens in (9, 70):
        own = draw(tokens)
        for got, wanted in zip(loaded(*own), Mixer()(*own), strict=True):
            torch.testing.assert_close(got, wanted)
