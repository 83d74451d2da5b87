"""The operator: what it accepts and refuses, how it registers, and what torch.compile, opcheck and autograd make of it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import lagen
from lagen.runtime.operator import ArgumentError, Backend, Operator
from lagen.spec.read import read_text

B, T, H, HV, K, V = 2, 9, 2, 4, 5, 3


@pytest.fixture(scope="module")
def op() -> Operator:
    """gla with grouped values, so that H and HV differ."""
    text = """
name: grouped
inputs: {q: [H, K], k: [H, K], v: [HV, V], g: [H, K]}
assume:
  - g <= 0
recurrence:
  S: exp(g) * S[t-1] + outer(k, v)
  o: scale * (q @ S[t])
"""
    return lagen.load(read_text(text), printed=())


@pytest.fixture(scope="module")
def whole() -> Operator:
    return lagen.load("efficient_attention", printed=())


def tensors(dtype: torch.dtype = torch.float32, tokens: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(B, tokens, *shape, generator=generator)

    return [x.to(dtype) for x in (draw(H, K), draw(H, K), draw(HV, V), -draw(H, K).abs())]


# ---- what a call gives ----------------------------------------------------------------------------------------------------------


def test_a_call_takes_tensors_by_place_and_by_name(op: Operator) -> None:
    q, k, v, g = tensors()
    o, state = op(q, k, v, g, output_final_state=True)
    assert o.shape == (B, T, HV, V)
    assert state.shape == (B, HV, K, V)
    assert torch.equal(op(q, k, g=g, v=v), o)
    assert torch.equal(op(q, k, v, g, scale=K**-0.5), o)
    torch.testing.assert_close(op(q, k, v, g, scale=2.0), o * 2.0 * K**0.5)


def test_no_tokens_leave_the_state_as_it_was(op: Operator) -> None:
    state = torch.randn(B, HV, K, V)
    o, final = op(*tensors(tokens=0), initial_state=state, output_final_state=True)
    assert o.shape == (B, 0, HV, V)
    assert torch.equal(final, state)
    assert final.data_ptr() != state.data_ptr()


def test_strides_do_not_matter(op: Operator) -> None:
    given = tensors()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    torch.testing.assert_close(op(*turned), op(*given))


def test_step_writes_the_state_in_place_and_says_so_to_autograd(op: Operator) -> None:
    token = [x[:, 0] for x in tensors()]
    state = torch.zeros(B, HV, K, V)
    version = state._version
    o, given = op.step(*token, state)
    assert given is state
    assert state._version > version
    fresh_o, fresh = op.step(*token)
    assert torch.equal(o, fresh_o)
    assert torch.equal(state, fresh)
    assert torch.equal(op.step(*token, state=op.init_state(B, H=H, HV=HV, K=K, V=V))[0], o)


def test_step_refuses_to_drop_a_gradient(op: Operator) -> None:
    token = [x[:, 0] for x in tensors()]
    token[0].requires_grad_()
    with pytest.raises(ArgumentError, match=r"step has no gradient; call it under torch.no_grad\(\)"):
        op.step(*token)
    with torch.no_grad():
        op.step(*token)


def test_a_second_derivative_is_refused(op: Operator) -> None:
    q, *rest = tensors()
    q.requires_grad_()
    (d,) = torch.autograd.grad(op(q, *rest).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped has no second derivative"):
        d.sum().backward()


def test_only_what_asks_gets_a_gradient_and_the_final_state_counts(op: Operator) -> None:
    given = tensors()
    state = torch.randn(B, HV, K, V, requires_grad=True)
    given[1].requires_grad_()
    _, final = op(*given, initial_state=state, output_final_state=True)
    final.sum().backward()
    assert given[1].grad is not None
    assert given[1].grad.abs().max() > 0
    assert state.grad is not None
    torch.testing.assert_close(state.grad, given[3].sum(1).exp().repeat_interleave(HV // H, 1)[..., None].expand(B, HV, K, V))
    assert given[0].grad is None


def test_a_checkpointed_call_has_the_same_gradients(op: Operator) -> None:
    given = [x.requires_grad_() for x in tensors()]
    again = torch.utils.checkpoint.checkpoint(op, *given, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(again.sum(), given), torch.autograd.grad(op(*given).sum(), given), strict=True):
        assert torch.equal(got, wanted)


def test_check_tests_what_the_spec_assumes(op: Operator) -> None:
    given = tensors()
    assert torch.equal(op(*given, check=True), op(*given))
    given[3][0, 0, 0, :2] = 0.5
    with pytest.raises(ArgumentError, match="grouped: the spec assumes g <= 0; it does not hold at 2 of 180 places"):
        op(*given, check=True)


def test_the_oracle_serves_as_a_backend(op: Operator) -> None:
    given = tensors()
    o, state = op(*given, output_final_state=True, backend="oracle")
    assert o.dtype == state.dtype == torch.float32
    torch.testing.assert_close(o, op(*given))
    token = [x[:, 0] for x in given]
    torch.testing.assert_close(op.step(*token, state.clone(), backend="oracle")[0], op.step(*token, state.clone())[0])


# ---- what a call refuses --------------------------------------------------------------------------------------------------------


def put(at: int, change: Callable[[Tensor], object]) -> Callable[[list], dict]:
    def spoil(given: list) -> dict:
        given[at] = change(given[at])
        return {}

    return spoil


BAD = [
    (put(1, lambda x: x.long()), "grouped: k is int64; it wants float32 or bfloat16 or float16 or float64"),
    (put(2, lambda x: x[0]), r"grouped: v has 3 dims, \[9, 4, 3\]; it wants 4, \[B, T, HV, V\]"),
    (put(1, lambda x: x[..., :4]), r"grouped: k is \[2, 9, 2, 4\]; it wants \[B, T, H, K\] with K = 5, as q has it, not 4"),
    (put(3, lambda x: x[:, :8]), r"grouped: g is \[2, 8, 2, 5\]; it wants \[B, T, H, K\] with T = 9, as q has it, not 8"),
    (put(2, lambda x: x[:, :, :3]), "grouped: v has HV = 3 heads and q has H = 2; it wants HV to be a multiple of H"),
    (put(2, lambda x: x.to("meta")), "grouped: v is on meta; it wants cpu, where the first input is"),
    (put(0, lambda x: x.numpy()), "grouped: q is a ndarray; it wants a tensor"),
    (put(0, lambda x: None), "grouped: q is a NoneType; it wants a tensor"),
    (lambda given: given.pop() is None or {}, "grouped takes q, k, v, g; g is missing"),
    (lambda given: given.append(given[0]) or {}, "grouped takes q, k, v, g: 5 tensors were given, it wants 4"),
    (lambda given: {"q": given[0]}, "grouped takes q, k, v, g; q is given twice"),
    (lambda given: {"beta": given[0]}, "grouped takes q, k, v, g; 'beta' is none of them"),
    (
        lambda given: {"initial_state": torch.zeros(B, HV, V, K)},
        r"state S is \[2, 4, 3, 5\]; it wants \[B, HV, K, V\] with K = 5, as q has it",
    ),
    (lambda given: {"initial_state": torch.zeros(B, HV, K, V).half()}, "state S is float16; it wants float32"),
    (lambda given: {"initial_state": (torch.zeros(B, HV, K, V),) * 2}, r"the number of states is 2; it wants 1 \(S\)"),
    (lambda given: {"initial_state": 0.0}, "the state is a float; it wants a tensor"),
    (lambda given: {"backend": "cuda"}, "backend is 'cuda'; it wants one of torch, oracle"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_a_bad_argument_is_named_with_what_it_got_and_what_it_wants(op: Operator, spoil: Callable[[list], dict], message: str) -> None:
    given: list = tensors()
    named = spoil(given)
    for _ in range(2):  # the second call finds nothing remembered of the first
        with pytest.raises(ArgumentError, match=message):
            op(*given, **named)


def test_nothing_is_launched_before_the_check(op: Operator) -> None:
    def launch(*args: object) -> tuple:
        raise AssertionError("launched")

    spied = Operator(dataclasses.replace(op.spec, digest="spied"), {"torch": Backend(launch, launch, launch)})
    q, k, v, g = tensors()
    with pytest.raises(ArgumentError):
        spied(q, k[:1], v, g)
    with pytest.raises(ArgumentError):
        spied.step(q[:, 0], k, v[:, 0], g[:, 0])
    with pytest.raises(AssertionError, match="launched"):
        spied(q, k, v, g)


def test_scale_is_refused_where_the_spec_has_none(whole: Operator) -> None:
    x = torch.randn(1, 3, 1, 4)
    with pytest.raises(ArgumentError, match="efficient_attention: scale is given, but its spec does not mention scale"):
        whole(x, x, x, scale=0.5)


def test_what_is_not_causal_has_no_state_and_no_step(whole: Operator) -> None:
    x = torch.randn(1, 3, 1, 4)
    assert whole(x, x, x).shape == x.shape
    for named in ({"output_final_state": True}, {"initial_state": torch.zeros(1, 1, 4, 4)}):
        with pytest.raises(ArgumentError, match="efficient_attention is not causal"):
            whole(x, x, x, **named)
    with pytest.raises(ArgumentError, match="no decode step"):
        whole.step(x[:, 0], x[:, 0], x[:, 0])


def test_float64_is_refused_where_a_kernel_was_asked_for() -> None:
    gla = lagen.load("gla")
    x = torch.randn(1, 3, 1, 16, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="gla: q is float64; it wants float32 or bfloat16 or float16"):
        gla(x, x, x, -x.abs(), backend="triton")
    assert gla(x, x, x, -x.abs()).dtype == torch.float64


def test_triton_on_the_cpu_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.randn(1, 3, 1, 16)
    with pytest.raises(ArgumentError, match="backend 'triton' on CPU tensors wants TRITON_INTERPRET=1"):
        lagen.load("gla")(x, x, x, -x.abs(), backend="triton")


# ---- torch's own view -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_passes(op: Operator, keep: bool) -> None:
    given = [x.requires_grad_() for x in tensors()]
    state = torch.randn(B, HV, K, V, requires_grad=True) if keep else None
    torch.library.opcheck(op._dispatch.forward, (*given, state, None, None, 0.3, keep, "torch"))
    token = [x.detach()[:, 0] for x in given]
    torch.library.opcheck(op._dispatch.step, (*token, torch.randn(B, HV, K, V), torch.zeros(B, HV, V), None, 0.3, "torch"))


def test_compile_takes_the_whole_graph_forward_backward_and_step(op: Operator) -> None:
    given = [x.requires_grad_() for x in (*tensors(), torch.randn(B, HV, K, V))]

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        o, final = op(q, k, v, torch.nn.functional.logsigmoid(g), initial_state=state, output_final_state=True)
        return (o * o).sum() + final.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given), strict=True):
        torch.testing.assert_close(got, wanted)
    token, state = [x.detach()[:, 0] for x in tensors()], torch.randn(B, HV, K, V)
    other = state.clone()
    step = torch.compile(lambda *x: op.step(*x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(*token, state), op.step(*token, other)[0])
    torch.testing.assert_close(state, other)


def test_export_keeps_the_operator_and_any_length(op: Operator) -> None:
    class Mixer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return op(q, k, v, g)

    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(Mixer(), tuple(tensors()), dynamic_shapes=dict.fromkeys("qkvg", {1: length}))
    assert any(op.spec.digest in str(n.target) for n in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*tensors(tokens=70)), op(*tensors(tokens=70)))


def test_compile_takes_any_length(op: Operator) -> None:
    compiled = torch.compile(lambda *x: op(*x), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 70):
        torch.testing.assert_close(compiled(*tensors(tokens=tokens)), op(*tensors(tokens=tokens)))


def test_meta_tensors_give_shapes(op: Operator) -> None:
    o, state = op(*(x.to("meta") for x in tensors(torch.bfloat16)), output_final_state=True)
    assert (o.device.type, o.shape, o.dtype) == ("meta", (B, T, HV, V), torch.bfloat16)
    assert (state.shape, state.dtype) == ((B, HV, K, V), torch.float32)


def test_a_forced_backend_runs_on_meta_tensors_itself(op: Operator) -> None:
    ran: list[str] = []

    def forward(inputs: tuple, params: tuple, scale: float, states: object, keep: bool, cu_seqlens: object) -> tuple:
        ran.append("forward")
        return (torch.empty_like(inputs[2]),), None, (inputs[0] * 1,)

    def backward(inputs: tuple, params: tuple, scale: float, states: object, saved: tuple, *rest: object) -> tuple:
        ran.append(f"backward with {len(saved)} saved")
        return tuple(map(torch.empty_like, inputs)), (), None

    forced = Operator(dataclasses.replace(op.spec, digest="forced"), {"triton": Backend(forward, backward, None, saves=1), **op.backends})
    given = [x.to("meta").requires_grad_() for x in tensors()]
    forced(*given)
    assert ran == []
    forced(*given, backend="triton").sum().backward()
    assert ran == ["forward", "backward with 1 saved"]
    assert given[0].grad is not None


# ---- registration ---------------------------------------------------------------------------------------------------------------


def test_two_builds_of_one_name_live_in_one_process() -> None:
    text = "name: twin\ninputs: {{k: [H, K], v: [H, V]}}\nrecurrence:\n  S: S[t-1] + outer(k, v)\n  o: {} * (k @ S[t])\n"
    one, two = (lagen.load(read_text(text.format(n)), printed=()) for n in (1.0, 3.0))
    assert one.spec.digest != two.spec.digest
    x = torch.randn(1, 4, 1, 3)
    torch.testing.assert_close(two(x, x), 3.0 * one(x, x))


def test_importing_a_build_twice_reuses_what_is_registered(op: Operator) -> None:
    given = tensors()
    again = Operator(op.spec, op.backends)
    assert again._dispatch.forward is op._dispatch.forward
    assert torch.equal(again(*given), op(*given))
    assert lagen.load(read_text(op.spec.source), printed=()) is op


def test_an_operator_survives_a_reload_of_its_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lagen.runtime.build import build

    text = "name: anew\ninputs: {k: [H, K], v: [H, V]}\nrecurrence:\n  S: S[t-1] + outer(k, v)\n  o: k @ S[t]\n"
    build([read_text(text)], tmp_path / "again", printed=())
    monkeypatch.syspath_prepend(str(tmp_path))
    package = importlib.import_module("again")
    x = torch.randn(1, 4, 1, 3)
    first = package.anew(x, x)
    for name in ("signature", "dispatch", "operator"):
        importlib.reload(importlib.import_module(f"again._{name}"))
    importlib.reload(importlib.import_module("again.anew"))
    assert torch.equal(importlib.reload(package).anew(x, x), first)


def test_a_model_with_an_operator_can_be_copied(op: Operator) -> None:
    assert copy.deepcopy({"mix": op})["mix"] is op


def test_compile_and_autograd_take_a_backend_that_keeps_tensors() -> None:
    gla = lagen.load("gla")
    assert gla.backends["triton"].saves > 0
    q, k, v, g = (x.requires_grad_() for x in tensors())
    v = v[:, :, :H].detach().requires_grad_()
    compiled = torch.compile(lambda *x: gla(*x, backend="triton"), fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(gla(q, k, v, g, backend="torch").sum(), (q, k, v, g))
    for got, want in zip(torch.autograd.grad(compiled(q, k, v, g).sum(), (q, k, v, g)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_dim_too_long_to_be_held_whole_is_refused_not_cut() -> None:
    op = lagen.load("simple_gla")

    def call(k: int, v: int, backend: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in (*torch.randn(2, 1, 19, 1, k), torch.randn(1, 19, 1, v), -torch.rand(1, 19, 1))]
        o = op(*leaves, backend=backend)
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    for got, expected in zip(call(256, 20, "triton"), call(256, 20, "torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * float(expected.detach().abs().max()))
    with pytest.raises(ValueError, match='K = 257: these kernels hold K whole, up to 256; .*backend="torch"'):
        call(257, 20, "triton")
    with pytest.raises(ValueError, match="V = 300: these kernels hold V whole"):
        call(16, 300, "triton")
