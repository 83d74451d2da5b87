"""The oracle against loops written by hand: heads, exclusive reads, stages, peak lines, feature maps, not causal, one step."""

from __future__ import annotations

import math

import pytest
import torch

from lagen.ir import expr as x
from lagen.ir.expr import Expr
from lagen.ir.variant import OutputLine, Span, StateLine, Tensor, Variant
from lagen.verify.oracle import OracleError, evaluate, oracle, step

HERE = Span(1, 1)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def variant(
    inputs: list[Tensor],
    states: list[StateLine],
    outputs: list[OutputLine],
    params: list[Tensor] | None = None,
    causal: bool = True,
    sizes: tuple[tuple[str, Expr], ...] = (),
) -> Variant:
    return Variant(
        "made_by_hand", "", tuple(inputs), tuple(params or ()), tuple(states), tuple(outputs), (), (16,), 16, causal, (), sizes, "", "", ()
    )


def tensor(name: str, head: str, *dims: str, token: bool = True) -> tuple[Tensor, Expr]:
    return Tensor(name, head, dims, token), x.leaf("input" if token else "param", name, dims, head, token)


def past(name: str, head: str, *dims: str) -> Expr:
    return x.leaf("past", name, dims, head, True)


def now(name: str, head: str, *dims: str) -> Expr:
    return x.leaf("now", name, dims, head, True)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_grouped_values_with_an_exclusive_read_and_a_bonus() -> None:
    (q_, q), (k_, k), (v_, v), (w_, w) = tensor("q", "H", "K"), tensor("k", "H", "K"), tensor("v", "HV", "V"), tensor("w", "H", "K")
    u_, u = tensor("u", "H", "K", token=False)
    old = past("S", "HV", "K", "V")
    state = StateLine("S", "HV", ("K", "V"), x.add(x.mul(x.call("exp", w), old), x.outer(k, v)), HERE)
    out = OutputLine("o", "HV", ("V",), x.mul(x.scale(), x.contract(q, x.add(old, x.outer(x.mul(u, k), v)))), HERE)
    spec = variant([q_, k_, v_, w_], [state], [out], [u_])
    tq, tk, tw, tv, tu = normal(2, 7, 3, 5), normal(2, 7, 3, 5) + 1, -normal(2, 7, 3, 5).abs(), normal(2, 7, 6, 4), normal(3, 5)
    start = normal(2, 6, 5, 4)
    (o,), final = oracle(spec, (tq, tk, tv, tw), (tu,), 0.7, (start,))
    assert final is not None
    for b in range(2):
        for head in range(6):
            s, group = start[b, head].clone(), head // 2
            for t in range(7):
                write = torch.outer(tk[b, t, group], tv[b, t, head])
                torch.testing.assert_close(o[b, t, head], 0.7 * tq[b, t, group] @ (s + tu[group][:, None] * write), **TIGHT)
                s = tw[b, t, group].exp()[:, None] * s + write
            torch.testing.assert_close(final[0][b, head], s, **TIGHT)


def test_layout_of_a_state_whose_first_outer_has_the_later_dim() -> None:
    (v_, v), (k_, k) = tensor("v", "", "V"), tensor("k", "", "K")
    state = StateLine("S", "", ("V", "K"), x.add(past("S", "", "K", "V"), x.outer(v, k)), HERE)
    out = OutputLine("o", "", ("V",), x.contract(now("S", "", "K", "V"), k), HERE)
    tv, tk = normal(2, 5, 3), normal(2, 5, 4)
    (o,), final = oracle(variant([v_, k_], [state], [out]), (tv, tk), ())
    assert final is not None and final[0].shape == (2, 3, 4) and o.shape == (2, 5, 3)
    torch.testing.assert_close(final[0], torch.einsum("btv,btk->bvk", tv, tk), **TIGHT)
    torch.testing.assert_close(o[:, 4], torch.einsum("bvk,bk->bv", final[0], tk[:, 4]), **TIGHT)


def test_delta_rule_and_its_gradients() -> None:
    (k_, k), (v_, v), (b_, beta), (g_, g) = tensor("k", "H", "K"), tensor("v", "H", "V"), tensor("beta", "H"), tensor("g", "H")
    decayed = x.mul(x.call("exp", g), past("S", "H", "K", "V"))
    line = x.add(decayed, x.mul(beta, x.outer(k, x.sub(v, x.contract(k, decayed)))))
    state = StateLine("S", "H", ("K", "V"), line, HERE)
    out = OutputLine("o", "H", ("V",), x.contract(k, now("S", "H", "K", "V")), HERE)
    spec = variant([k_, v_, b_, g_], [state], [out])
    data = [normal(1, 4, 2, 3) / 2, normal(1, 4, 2, 5), normal(1, 4, 2).sigmoid(), -normal(1, 4, 2).abs()]
    start = normal(1, 2, 3, 5)
    for tensor_ in (*data, start):
        tensor_.requires_grad_()

    def by_hand() -> torch.Tensor:
        s, out = start, []
        for t in range(4):
            s = data[3][:, t, :, None, None].exp() * s
            error = data[1][:, t] - torch.einsum("bhk,bhkv->bhv", data[0][:, t], s)
            s = s + data[2][:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", data[0][:, t], error)
            out.append(torch.einsum("bhk,bhkv->bhv", data[0][:, t], s))
        return torch.stack(out, 1)

    (o,), _ = oracle(spec, tuple(data), (), initial_states=(start,))
    torch.testing.assert_close(o, by_hand(), **TIGHT)
    weights = normal(1, 4, 2, 5)
    ours = torch.autograd.grad((o * weights).sum(), [*data, start])
    theirs = torch.autograd.grad((by_hand() * weights).sum(), [*data, start])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_two_stages_with_a_softmax_between_and_a_peak_line() -> None:
    (q_, q), (k_, k), (s_, s), (v_, v) = tensor("q", "H", "K"), tensor("k", "H", "K"), tensor("s", "H", "M"), tensor("v", "H", "V")
    top_old, top = past("m", "H", "M"), now("m", "H", "M")
    peak = StateLine("m", "H", ("M",), x.call("max", top_old, s), HERE, init=-1e30, peak=True)
    write, keep = x.call("exp", x.sub(s, top)), x.call("exp", x.sub(top_old, top))
    a = StateLine("A", "H", ("K", "M"), x.add(x.mul(keep, past("A", "H", "K", "M")), x.outer(k, write)), HERE)
    b = StateLine("B", "H", ("M", "V"), x.add(x.mul(keep, past("B", "H", "M", "V")), x.outer(write, v)), HERE)
    readout = x.contract(x.row("softmax", x.contract(q, now("A", "H", "K", "M"))), now("B", "H", "M", "V"))
    spec = variant([q_, k_, s_, v_], [b, peak, a], [OutputLine("o", "H", ("V",), readout, HERE)])
    tq, tk, ts, tv = normal(2, 6, 1, 3), normal(2, 6, 1, 3) + 1, 30 * normal(2, 6, 1, 4), normal(2, 6, 1, 5)
    (o,), final = oracle(spec, (tq, tk, ts, tv), ())
    assert final is not None
    torch.testing.assert_close(final[1], ts.amax(1), **TIGHT)
    for t in range(6):
        w = (ts[:, : t + 1] - ts[:, : t + 1].amax(1, keepdim=True)).exp()
        left = torch.einsum("bthk,bthm->bhkm", tk[:, : t + 1], w)
        right = torch.einsum("bthm,bthv->bhmv", w, tv[:, : t + 1])
        p = torch.softmax(torch.einsum("bhk,bhkm->bhm", tq[:, t], left), -1)
        torch.testing.assert_close(o[:, t], torch.einsum("bhm,bhmv->bhv", p, right), rtol=1e-10, atol=1e-10)


def test_feature_maps_keep_their_inner_products() -> None:
    (a_, a), (b_, b) = tensor("a", "H", "K"), tensor("b", "H", "K")
    taylor = x.contract(x.resize("taylor2", a, "F"), x.resize("taylor2", b, "F"))
    quad = x.contract(x.resize("quad", a, "G"), x.resize("quad", b, "G"))
    both = x.reduce("sum", x.concat(a, x.neg(b), "E"))
    spec = variant([a_, b_], [], [])
    ta, tb = normal(2, 3, 2, 5), normal(2, 3, 2, 5) + 0.5
    inner = (ta * tb).sum(-1)
    for expr, wanted in ((taylor, 1 + inner + inner**2 / 2), (quad, inner**2), (both, ta.sum(-1) - tb.sum(-1))):
        torch.testing.assert_close(evaluate(spec, [expr], (ta, tb), ())[0], wanted, **TIGHT)


def test_row_and_scalar_functions() -> None:
    a_, a = tensor("a", "H", "K")
    spec, ta = variant([a_], [], []), 3 * normal(2, 3, 2, 5)
    norm = ta / (ta.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    rms = ta / (ta.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    table = {
        x.row("l2norm", a, 1e-6): norm,
        x.row("rmsnorm", a, 1e-5): rms,
        x.reduce("rowmax", a): ta.max(-1).values,
        x.reduce("mean", a): ta.sum(-1) / 5,
        x.call("where", x.call("gt", a, x.ZERO), a, x.const(-1.0)): torch.where(ta > 0, ta, -1.0),
        x.call("softplus", a): (1 + ta.exp()).log(),
        x.call("gelu", a): ta * 0.5 * (1 + torch.erf(ta / math.sqrt(2))),
        x.call("elu", a): torch.where(ta > 0, ta, ta.exp() - 1),
        x.power(x.size("K"), -0.5): torch.full((1, 1, 1), 5**-0.5, dtype=torch.float64),
        x.power(a, 3.0): ta * ta * ta,
    }
    for expr, wanted in table.items():
        torch.testing.assert_close(evaluate(spec, [expr], (ta,), ())[0], wanted, **TIGHT)


def linear(causal: bool) -> Variant:
    (q_, q), (k_, k), (v_, v) = tensor("q", "H", "K"), tensor("k", "H", "K"), tensor("v", "H", "V")
    write = x.outer(k, v)
    line = x.add(past("S", "H", "K", "V"), write) if causal else write
    out = OutputLine("o", "H", ("V",), x.contract(q, now("S", "H", "K", "V")), HERE)
    return variant([q_, k_, v_], [StateLine("S", "H", ("K", "V"), line, HERE)], [out], causal=causal)


def test_not_causal_reads_the_sum_over_all_tokens() -> None:
    q, k, v = normal(2, 5, 2, 3), normal(2, 5, 2, 3), normal(2, 5, 2, 4)
    (o,), final = oracle(linear(causal=False), (q, k, v), ())
    assert final is None
    torch.testing.assert_close(o, torch.einsum("bthk,bshk,bshv->bthv", q, k, v), **TIGHT)


def test_steps_are_the_scan() -> None:
    q, k, v = normal(2, 5, 2, 3), normal(2, 5, 2, 3), normal(2, 5, 2, 4)
    (o,), final = oracle(linear(causal=True), (q, k, v), ())
    states: tuple[torch.Tensor, ...] = (torch.zeros(2, 2, 3, 4, dtype=torch.float64),)
    for t in range(5):
        (row,), states = step(linear(causal=True), (q[:, t], k[:, t], v[:, t]), (), states)
        torch.testing.assert_close(row, o[:, t], **TIGHT)
    assert final is not None
    torch.testing.assert_close(states[0], final[0], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_leaves_the_state_as_it_was(dtype: torch.dtype) -> None:
    start = torch.ones(2, 1, 3, 4)
    (o,), final = oracle(linear(True), (torch.ones(2, 0, 1, 3),) * 2 + (torch.ones(2, 0, 1, 4),), (), None, (start,), dtype=dtype)
    assert final is not None and o.shape == (2, 0, 1, 4) and o.dtype == dtype
    torch.testing.assert_close(final[0], start.to(dtype), rtol=0, atol=0)


def test_a_tensor_that_does_not_fit_is_named() -> None:
    with pytest.raises(OracleError, match="k: K is 4 here and 3 before"):
        oracle(linear(True), (normal(1, 2, 1, 3), normal(1, 2, 1, 4), normal(1, 2, 1, 4)), ())
    with pytest.raises(OracleError, match="takes 3 inputs"):
        oracle(linear(True), (), ())
