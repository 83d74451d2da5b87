"""Drop-in functions for flash-linear-attention's slots and channels: GSA, ABC, HGRN and RWKV-4, against loops over tokens.

Where fla-core can be imported, numbers are also compared with its naive torch references (signatures: test_compat_fla.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lagen.compat import call, fla

B, T, H, HQ, K, V, M, D = 2, 7, 2, 4, 4, 3, 5, 6


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


Q, KEY, VALUE, S = draw(B, T, H, K), draw(B, T, H, K, seed=1), draw(B, T, H, V, seed=2), draw(B, T, H, M, seed=3)
MANY = draw(B, T, HQ, K, seed=4)
G = -draw(B, T, H, M, seed=5).abs()
X, GX = draw(B, T, D), -draw(B, T, D, seed=1).abs()


def slots(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, states: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = states
    rows = []
    for t in range(q.shape[1]):
        keys = g[:, t, :, None].exp() * keys + k[:, t, :, :, None] * s[:, t, :, None]
        values = g[:, t, :, :, None].exp() * values + s[:, t, :, :, None] * v[:, t, :, None]
        weights = ((scale * q[:, t, :, :, None]) * keys).sum(-2).softmax(-1)
        rows.append((weights[..., None] * values).sum(-2))
    return torch.stack(rows, 1), keys, values


def empty() -> tuple[Tensor, Tensor]:
    return torch.zeros(B, H, K, M), torch.zeros(B, H, M, V)


def close(got: Any, wanted: Any) -> None:
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_slots_are_gated_and_read_through_a_softmax() -> None:
    start = (draw(B, H, K, M), draw(B, H, M, V))
    wanted, *last = slots(Q, KEY, VALUE, S, G, start, 0.3)
    for run in (fla.chunk_gsa, fla.fused_recurrent_gsa):
        o, finals = run(Q, KEY, VALUE, S, G, scale=0.3, initial_state=start, output_final_state=True)
        close((o, *finals), (wanted, *last))
        o, finals = run(Q, KEY, VALUE, S, G)
        close([o], slots(Q, KEY, VALUE, S, G, empty(), K**-0.5)[:1])
        assert finals == [None, None]


def test_query_heads_share_slots() -> None:
    start = (draw(B, H, K, M), draw(B, H, M, V))
    o, finals = fla.chunk_gsa(MANY, KEY, VALUE, S, G, initial_state=start, output_final_state=True)
    wide = [x.repeat_interleave(2, 2) for x in (KEY, VALUE, S, G)]
    wanted, *_ = slots(MANY, *wide, tuple(x.repeat_interleave(2, 1) for x in start), K**-0.5)
    close((o, *finals), (wanted, *slots(Q, KEY, VALUE, S, G, start, 1.0)[1:]))


def test_slots_without_gates_hold_means() -> None:
    past = S.exp().cumsum(1)
    g = (torch.cat([past[:, :1], past[:, :-1]], 1) / past).log()
    wanted, *last = slots(Q, KEY, VALUE, S.exp() / past, g, empty(), K**-0.5)
    close([fla.chunk_gsa(Q, KEY, VALUE, S)[0]], [wanted])
    o, finals = fla.chunk_abc(Q, KEY, VALUE, S, output_final_state=True)
    close((o, *finals), (wanted, *last))
    assert fla.chunk_abc(Q, KEY, VALUE, S)[1] is None
    with pytest.raises(NotImplementedError, match="chunk_abc from an initial state is not offered"):
        fla.chunk_abc(Q, KEY, VALUE, S, initial_state=empty())
    with pytest.raises(NotImplementedError, match="without g, gates are made of s along one sequence"):
        fla.fused_recurrent_gsa(Q, KEY, VALUE, S, reverse=True)


def test_channels_decay_and_add() -> None:
    start, rows = draw(B, D), []
    state = start
    for t in range(T):
        state = GX[:, t].exp() * state + X[:, t]
        rows.append(state)
    for run in (fla.chunk_hgrn, fla.fused_recurrent_hgrn):
        close(run(X, GX, initial_state=start, output_final_state=True), (torch.stack(rows, 1), state))
        assert run(X, GX)[1] is None


def test_rwkv4_weighs_by_exponentials_kept_in_range() -> None:
    w, u, k, v = draw(D), draw(D, seed=1), draw(B, T, D, seed=2), draw(B, T, D, seed=3)
    state = torch.stack([draw(B, D), draw(B, D, seed=1).abs() + 1, draw(B, D, seed=2)], 1).unsqueeze(2)
    above, below = (state[:, i, 0] * state[:, 2, 0].exp() for i in (0, 1))
    rows = []
    for t in range(T):
        rows.append((above + (u + k[:, t]).exp() * v[:, t]) / (below + (u + k[:, t]).exp()))
        above, below = ((-w.exp()).exp() * x + k[:, t].exp() * y for x, y in ((above, v[:, t]), (below, 1.0)))
    leaves = [x.requires_grad_() for x in (w, u, k, v, state)]
    o, last = fla.fused_recurrent_rwkv4(*leaves)
    close([o], [torch.stack(rows, 1)])
    assert last.shape == (B, 3, 1, D)
    close([last[:, i, 0] * last[:, 2, 0].exp() for i in (0, 1)], [above, below])
    assert all(d.abs().max() > 0 for d in torch.autograd.grad(o.sum(), leaves))


# ---- against the installed package ----------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_installed_references() -> None:
    gsa = pytest.importorskip("fla.ops.gsa.naive", reason="fla-core is not importable here", exc_type=ImportError)
    hgrn = pytest.importorskip("fla.ops.hgrn.naive", reason="fla-core is not importable here", exc_type=ImportError)
    start = (draw(B, H, K, M), draw(B, H, M, V))
    wanted, last = gsa.naive_recurrent_gsa(Q, KEY, VALUE, S, G, initial_state=start, output_final_state=True)
    o, finals = fla.chunk_gsa(Q, KEY, VALUE, S, G, initial_state=start, output_final_state=True)
    close((o, *finals), (wanted, *last))
    close([fla.chunk_abc(Q, KEY, VALUE, S)[0]], [gsa.naive_recurrent_gsa(Q, KEY, VALUE, S)[0]])
    close(fla.chunk_hgrn(X, GX, output_final_state=True), hgrn.naive_recurrent_hgrn(X, GX, output_final_state=True))
