"""Drop-in functions for flash-linear-attention's delta rules and low-rank transitions, against a loop over what a token does to its state.

Where fla-core can be imported, numbers are also compared with its naive torch references (signatures: test_compat_fla.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lagen.compat import call, fla

B, T, H, K, V = 2, 6, 2, 4, 3
HV = 4


@pytest.fixture(autouse=True, scope="module")
def torch_alone() -> Iterator[None]:
    """Runs the torch evaluation: calls are under test here, kernels elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "load", partial(call.load, printed=()))
        call.LOADED.clear()
        yield
    call.LOADED.clear()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 97 * seed))


def unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


Q, KEY, P = draw(B, T, H, K, seed=1), unit(draw(B, T, H, K, seed=2)), 0.7 * unit(draw(B, T, H, K, seed=3))
VALUE, WIDE = draw(B, T, H, V, seed=4), draw(B, T, HV, V, seed=5)
BETA, BETAS = draw(B, T, H, seed=6).sigmoid(), draw(B, T, HV, seed=7).sigmoid()
G, GS, GK, GKS = (-draw(*s, seed=8).abs() for s in ((B, T, H), (B, T, HV), (B, T, H, K), (B, T, HV, K)))
GV, ERASE, WRITE = -draw(B, T, H, V, seed=9).abs(), draw(B, T, H, K, seed=10).sigmoid(), draw(B, T, H, V, seed=11).sigmoid()
A_LOG, BIAS, BIASES = draw(HV, seed=12), draw(HV, seed=13), draw(HV * K, seed=14)

Token = Callable[[Tensor, int], Tensor]  # the state before token t -> the state behind it


def many(x: Tensor) -> Tensor:
    return x.repeat_interleave(HV // H, 2)


def write(k: Tensor, x: Tensor) -> Tensor:
    return k[..., None] * x[..., None, :]


def read(k: Tensor, state: Tensor) -> Tensor:
    return (k[..., None] * state).sum(-2)


def run(q: Tensor, token: Token, state: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    rows = []
    for t in range(q.shape[1]):
        state = token(state, t)
        rows.append(read(q[:, t], state) * (K**-0.5 if scale is None else scale))
    return torch.stack(rows, 1), state


def delta(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Token:
    """S = D S + beta k (v - k D S), g by head or by key channel."""

    def token(state: Tensor, t: int) -> Tensor:
        if g is not None:
            state = state * (g[:, t, :, :, None] if g.ndim == 4 else g[:, t, :, None, None]).exp()
        return state + write(k[:, t], beta[:, t, :, None] * (v[:, t] - read(k[:, t], state)))

    return token


def erased(state: Tensor, t: int) -> Tensor:
    state = state * GK[:, t, :, :, None].exp()
    return state + write(KEY[:, t], WRITE[:, t] * VALUE[:, t] - read(ERASE[:, t] * KEY[:, t], state))


def comba(state: Tensor, t: int) -> Tensor:
    kept = state * GS[:, t, :, None, None].exp()
    return kept + write(many(KEY)[:, t], BETAS[:, t, :, None] * (WIDE[:, t] - read(many(P)[:, t], state)))


def oja(state: Tensor, t: int) -> Tensor:
    v = unit(VALUE)[:, t]
    state = state * GV[:, t, :, None].exp()
    return state + write(BETA[:, t, :, None] * (KEY[:, t] - (state * v[..., None, :]).sum(-1)), v)


def low_rank(a: Tensor, b: Tensor, g: Tensor) -> Token:
    return lambda state, t: state * g[:, t, :, :, None].exp() + write(b[:, t], read(a[:, t], state)) + write(KEY[:, t], VALUE[:, t])


def product(n: int) -> tuple[dict[str, Any], Token]:
    k, v = unit(draw(B, T * n, H, K, seed=20)), draw(B, T * n, H, V, seed=21)
    beta = draw(B, T * n, H, seed=22).sigmoid()
    steps = [delta(*(x.unflatten(1, (T, n))[:, :, i] for x in (k, v, beta)), g=G if i == 0 else None) for i in range(n)]

    def token(state: Tensor, t: int) -> Tensor:
        for step in steps:
            state = step(state, t)
        return state

    return {"k": k, "v": v, "beta": beta, "g": G, "num_householder": n}, token


KV = {"k": KEY, "v": VALUE}
GATE = {"use_gate_in_kernel": True, "A_log": A_LOG, "dt_bias": BIAS}
MADE = -A_LOG.exp() * functional.softplus(GS + BIAS)
MADE_K = -A_LOG.exp()[:, None] * functional.softplus(GKS + BIASES.view(HV, K))
BOUNDED = -5.0 * (A_LOG.exp()[:, None] * GKS).sigmoid()
SIGMOID = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
NO_DECAY = torch.zeros(B, T, H, K)

CASES: dict[str, tuple[str, dict[str, Any], Token]] = {
    "delta": ("chunk_delta_rule", {**KV, "beta": BETA}, delta(KEY, VALUE, BETA)),
    "delta, beta 1": ("fused_recurrent_delta_rule", KV, delta(KEY, VALUE, torch.ones(B, T, H))),
    "gated": ("chunk_gated_delta_rule", {"k": KEY, "v": WIDE, "g": GS, "beta": BETAS}, delta(many(KEY), WIDE, BETAS, GS)),
    "gdn": ("chunk_gdn", {"k": KEY, "v": WIDE, "g": GS, "beta": BETAS}, delta(many(KEY), WIDE, BETAS, GS)),
    "gate inside": ("chunk_gated_delta_rule", {"k": KEY, "v": WIDE, "g": GS, "beta": BETAS, **GATE}, delta(many(KEY), WIDE, BETAS, MADE)),
    "sigmoid inside": (
        "chunk_gated_delta_rule",
        {"k": KEY, "v": WIDE, "g": GS, "beta": BETAS, **SIGMOID},
        delta(many(KEY), WIDE, 2 * BETAS.sigmoid(), GS),
    ),
    "recurrent": ("fused_recurrent_gated_delta_rule", {"k": KEY, "v": WIDE, "g": GS, "beta": BETAS}, delta(many(KEY), WIDE, BETAS, GS)),
    "recurrent, gk": ("fused_recurrent_gdn", {"k": KEY, "v": WIDE, "gk": GKS, "beta": BETAS}, delta(many(KEY), WIDE, BETAS, GKS)),
    "recurrent, g and gk": (
        "fused_recurrent_gdn",
        {"k": KEY, "v": WIDE, "g": GS, "gk": GKS, "beta": BETAS},
        delta(many(KEY), WIDE, BETAS, GKS + GS[..., None]),
    ),
    "recurrent, no gate": ("fused_recurrent_gdn", {"k": KEY, "v": WIDE, "beta": BETAS}, delta(many(KEY), WIDE, BETAS)),
    "kda": ("chunk_kda", {"k": KEY, "v": WIDE, "g": GKS, "beta": BETAS}, delta(many(KEY), WIDE, BETAS, GKS)),
    "kda, gate inside": (
        "chunk_kda",
        {"k": KEY, "v": WIDE, "g": GKS, "beta": BETAS, **GATE, "dt_bias": BIASES},
        delta(many(KEY), WIDE, BETAS, MADE_K),
    ),
    "kda, bounded gate": (
        "fused_recurrent_kda",
        {"k": KEY, "v": WIDE, "g": GKS, "beta": BETAS, "use_gate_in_kernel": True, "A_log": A_LOG, "lower_bound": -5.0},
        delta(many(KEY), WIDE, BETAS, BOUNDED),
    ),
    "gdn2": ("chunk_gdn2", {**KV, "g": GK, "b": ERASE, "w": WRITE}, erased),
    "gdn2, recurrent": ("fused_recurrent_gdn2", {**KV, "g": GK, "b": ERASE, "w": WRITE}, erased),
    "comba": ("chunk_comba", {"k": KEY, "v": WIDE, "p": P, "g": GS, "beta": BETAS}, comba),
    "comba, recurrent": ("fused_recurrent_comba", {"k": KEY, "v": WIDE, "p": P, "g": GS, "beta": BETAS}, comba),
    "oja": ("chunk_gated_oja_rule", {"k": KEY, "v": unit(VALUE), "gv": GV, "beta": BETA}, oja),
    "oja, recurrent": ("fused_recurrent_gated_oja_rule", {"k": KEY, "v": unit(VALUE), "gv": GV, "beta": BETA}, oja),
    "dplr": ("chunk_dplr_delta_rule", {**KV, "a": -P, "b": ERASE * P, "gk": GK}, low_rank(-P, ERASE * P, GK)),
    "dplr, recurrent": ("fused_recurrent_dplr_delta_rule", {**KV, "a": -P, "b": P, "gk": GK}, low_rank(-P, P, GK)),
    "iplr": ("chunk_iplr_delta_rule", {**KV, "a": -P, "b": P}, low_rank(-P, P, NO_DECAY)),
    "iplr, recurrent": ("fused_recurrent_iplr_delta_rule", {**KV, "a": -P, "b": P}, low_rank(-P, P, NO_DECAY)),
    "rwkv7": ("chunk_rwkv7", {**KV, "w": GK, "a": -P, "b": P}, low_rank(-P, P, GK)),
    "rwkv7, recurrent": ("fused_recurrent_rwkv7", {**KV, "w": GK, "a": -P, "b": P}, low_rank(-P, P, GK)),
    "rwkv7, kk": ("fused_mul_recurrent_rwkv7", {**KV, "w": GK, "kk": P, "a": ERASE}, low_rank(-P, ERASE * P, GK)),
    **{f"product of {n}": ("chunk_gated_delta_product", *product(n)) for n in (1, 2, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_function_computes_its_recurrence(case: str) -> None:
    name, tensors, token = CASES[case]
    heads = tensors["v"].shape[2]
    queries = {"r" if "rwkv7" in name else "q": Q}
    state = draw(B, heads, K, V, seed=30)
    wanted, last = run(Q if heads == H else many(Q), token, state, 0.3)
    o, final = getattr(fla, name)(**queries, **tensors, scale=0.3, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)
    plain = run(Q if heads == H else many(Q), token, torch.zeros_like(state), 1.0 if name in UNSCALED else None)[0]
    torch.testing.assert_close(getattr(fla, name)(**queries, **tensors)[0], plain, rtol=1e-4, atol=1e-5)


UNSCALED = {"chunk_rwkv7", "fused_mul_recurrent_rwkv7"}


def test_norms_inside_a_function_are_norms_before_it() -> None:
    long = {"q": 3 * Q, "k": 5 * KEY}
    for name, more in (("chunk_gated_delta_rule", {"v": WIDE, "g": GS, "beta": BETAS}), ("chunk_delta_rule", {"v": VALUE, "beta": BETA})):
        got = getattr(fla, name)(**long, **more, use_qk_l2norm_in_kernel=True)[0]
        wanted = getattr(fla, name)(unit(Q), KEY, **more)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got = fla.chunk_comba(**long, v=WIDE, p=4 * P, g=GS, beta=BETAS, use_qk_l2norm_in_kernel=True)[0]
    torch.testing.assert_close(got, fla.chunk_comba(unit(Q), KEY, WIDE, unit(P), GS, BETAS)[0], rtol=1e-4, atol=1e-5)
    got = fla.chunk_gated_oja_rule(**long, v=unit(VALUE), gv=GV, beta=BETA, use_q_l2norm=True, use_k_l2norm=True)[0]
    torch.testing.assert_close(got, fla.chunk_gated_oja_rule(unit(Q), KEY, unit(VALUE), GV, BETA)[0], rtol=1e-4, atol=1e-5)


PRECONDITIONED = {"k": KEY, "v": WIDE, "g_atk": G, "g": GS, "beta_atk": BETA, "beta": BETAS}


def preconditioned(state: Tensor, diagonal: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = []
    for t in range(T):
        diagonal = G[:, t, :, None].exp() * diagonal + BETA[:, t, :, None] * KEY[:, t].square()
        far = torch.log(diagonal + 1e-6) - center[:, None]
        scaled = (KEY[:, t] * 1.5 ** (-far / (1 + far.abs()))).repeat_interleave(HV // H, 1)
        state = state * GS[:, t, :, None, None].exp()
        state = state + write(scaled, BETAS[:, t, :, None] * (WIDE[:, t] - read(many(KEY)[:, t], state)))
        rows.append(read(many(unit(Q))[:, t], state) * K**-0.5)
    return torch.stack(rows, 1), state, diagonal


@pytest.mark.parametrize("name", ["chunk_precond_gated_delta_rule", "fused_recurrent_precond_gated_delta_rule"])
def test_a_preconditioned_rule_keeps_two_states(name: str) -> None:
    state, diagonal, center = draw(B, HV, K, V, seed=30), draw(B, H, K, seed=31).abs(), draw(H, seed=32)
    f = getattr(fla, name)
    given = {"initial_state": state, "initial_A_state": diagonal, "log_atk_scale": center, "output_final_state": True}
    for got, wanted in zip(f(Q, **PRECONDITIONED, **given), preconditioned(state, diagonal, center), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    turned = f(Q, **PRECONDITIONED, **{**given, "initial_state": state.mT}, transpose_state_layout=True)
    torch.testing.assert_close(turned[1].mT, preconditioned(state, diagonal, center)[1], rtol=1e-4, atol=1e-5)
    o, last, end = f(Q, **PRECONDITIONED)
    plain = preconditioned(torch.zeros_like(state), torch.zeros_like(diagonal), torch.full((H,), -0.2))[0]
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-5)
    assert last is end is None
    with pytest.raises(NotImplementedError, match="x=1.5"):
        f(Q, **PRECONDITIONED, x=2.0)


def test_what_is_not_offered_says_so() -> None:
    with pytest.raises(NotImplementedError, match="chunk_kda: return_intermediate_states is not offered"):
        fla.chunk_kda(Q, KEY, VALUE, GK, BETA, return_intermediate_states=True)
    with pytest.raises(NotImplementedError, match=r"lagen\.parallel splits a sequence over ranks"):
        fla.chunk_gated_delta_rule(Q, KEY, VALUE, G, BETA, cp_context=object())
    with pytest.raises(NotImplementedError, match="num_householder = 4 is not offered"):
        fla.chunk_gated_delta_product(Q, *(x.repeat_interleave(4, 1) for x in (KEY, VALUE)), G, BETA.repeat_interleave(4, 1), 4)
    with pytest.raises(ValueError, match="`allow_neg_eigval=True` requires `use_beta_sigmoid_in_kernel=True`"):
        fla.chunk_kda(Q, KEY, VALUE, GK, BETA, allow_neg_eigval=True)
    with pytest.raises(ValueError, match="`A_log` must be provided"):
        fla.chunk_kda(Q, KEY, VALUE, GK, BETA, use_gate_in_kernel=True)


def test_gradients_reach_what_a_gate_is_made_of() -> None:
    leaves = [x.clone().requires_grad_() for x in (GKS, A_LOG, BIASES, BETAS)]
    g, rate, bias, beta = leaves
    o, _ = fla.chunk_kda(
        Q,
        KEY,
        WIDE,
        g,
        beta,
        use_gate_in_kernel=True,
        A_log=rate,
        dt_bias=bias,
        use_beta_sigmoid_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert all(d.abs().max() > 0 for d in torch.autograd.grad(o.square().sum(), leaves))


# ---- against the installed package ----------------------------------------------------------------------------------------------

TURNED = {"delta_rule_recurrence", "iplr_recurrence", "dplr_recurrence"}  # these have heads in front of time, and ask for no state
NAIVE = [
    ("delta_rule.naive", "delta_rule_recurrence", "chunk_delta_rule", {**KV, "beta": BETA}),
    ("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule", "chunk_gated_delta_rule", {**KV, "g": G, "beta": BETA}),
    ("kda.naive", "naive_recurrent_kda", "chunk_kda", {**KV, "g": GK, "beta": BETA}),
    ("gdn2.naive", "naive_recurrent_gdn2", "chunk_gdn2", {**KV, "g": GK, "b": ERASE, "w": WRITE}),
    ("generalized_delta_rule.iplr.naive", "iplr_recurrence", "chunk_iplr_delta_rule", {**KV, "alpha": -P, "beta": P}),
    ("generalized_delta_rule.dplr.naive", "dplr_recurrence", "chunk_dplr_delta_rule", {**KV, "alpha": -P, "beta": P, "gk": GK}),
    (
        "gated_delta_product.naive",
        "naive_recurrent_gated_delta_product",
        "chunk_gated_delta_product",
        {**product(2)[0], "scale": K**-0.5},
    ),
]


@pytest.mark.parametrize(("module", "theirs", "name", "tensors"), NAIVE, ids=[n for _, n, _, _ in NAIVE])
def test_numbers_are_those_of_the_installed_references(module: str, theirs: str, name: str, tensors: dict[str, Any]) -> None:
    found = pytest.importorskip(f"fla.ops.{module}", reason="fla-core is not importable here", exc_type=ImportError)
    named = {"q": Q, **tensors}
    if theirs in TURNED:
        o, state = getattr(found, theirs)(**{n: x.transpose(1, 2) for n, x in named.items()})
        o = o.transpose(1, 2)
    else:
        o, state = getattr(found, theirs)(**named, output_final_state=True)
    if "alpha" in named:
        named = {{"alpha": "a", "beta": "b"}.get(n, n): x for n, x in named.items()}
    got, final = getattr(fla, name)(**named, output_final_state=True)
    torch.testing.assert_close(got, o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-5)


def test_a_preconditioned_rule_has_the_numbers_of_the_installed_reference() -> None:
    found = pytest.importorskip("fla.ops.precond_gated_delta_rule.naive", reason="fla-core is not importable here", exc_type=ImportError)
    named = {"q": Q, **PRECONDITIONED, "log_atk_scale": draw(H, seed=32), "output_final_state": True}
    theirs = found.naive_recurrent_precond_gated_delta_rule(**named)
    for got, wanted in zip(fla.chunk_precond_gated_delta_rule(**named), theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
