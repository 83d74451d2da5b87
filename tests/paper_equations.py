"""The papers' equations in plain torch, written from the papers' sums over tokens and apart from the compiler, the oracle and the specs.

Tensors are [B, T, H, D] in float64; every function takes the inputs and params of the spec of its name and returns the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | float = 1.0, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Returns sum_s w_ts (q_t . k_s) v_s and sum_s w_ts (q_t . k_s), the sums over s <= t, or over all s; weight is [B, H, T, T]."""
    score = torch.einsum("bthk,bshk->bhts", q, k) * weight
    if causal:
        score = score.tril()
    return torch.einsum("bhts,bshv->bthv", score, v), score.sum(-1).transpose(1, 2).unsqueeze(-1)


def normalised(q: Tensor, k: Tensor, v: Tensor, eps: float = 0.0) -> Tensor:
    """Returns the weighted mean of the values seen so far."""
    top, bottom = attend(q, k, v)
    return top / (bottom + eps)


def distances(time: int) -> Tensor:
    """Returns t - s as [T, T]."""
    t = torch.arange(time, dtype=torch.float64)
    return t[:, None] - t[None, :]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv:2006.16236: phi(x) = elu(x) + 1, which is exp(x) below zero and x + 1 above."""
    return normalised(*(torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k)), v)


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv:2009.14794, generalised attention: phi(x) = relu(x) + 1e-3."""
    return normalised(q.clamp(min=0) + 1e-3, k.clamp(min=0) + 1e-3, v)


def performer(q: Tensor, k: Tensor, v: Tensor, W: Tensor) -> Tensor:
    """arXiv:2009.14794: phi(x) = exp(-|x|^2 / 2) / sqrt(m) (exp(w_1 . x), ..., exp(w_m . x)) of x / K^(1/4)."""

    def phi(x: Tensor) -> Tensor:
        x = x / x.shape[-1] ** 0.25
        directions = [(x * w).sum(-1).exp() for w in W.unbind(1)]
        return (-x.norm(dim=-1).square() / 2).exp().unsqueeze(-1) / math.sqrt(len(directions)) * torch.stack(directions, -1)

    return normalised(phi(q), phi(k), v)


def cosformer(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """arXiv:2202.08791: the score is relu(q_i) . relu(k_j) cos(pi / 2 (i - j) / M)."""
    weight = torch.cos(math.pi / 2 * (pos[:, :, None] - pos[:, None, :])).unsqueeze(1)
    top, bottom = attend(q.relu(), k.relu(), v, weight)
    return top / bottom.clamp(min=1e-6)


def hedgehog(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv:2402.04347: phi(x) = softmax([x, -x])."""

    def phi(x: Tensor) -> Tensor:
        both = torch.cat([x.exp(), (-x).exp()], -1)
        return both / both.sum(-1, keepdim=True)

    return normalised(phi(q), phi(k), v)


def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv:2402.18668: the score is 1 + x + x^2 / 2 with x = q . k / sqrt(K)."""
    x = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    score = (1 + x + x**2 / 2).tril()
    return torch.einsum("bhts,bshv->bthv", score / score.sum(-1, keepdim=True), v)


def rebased(q: Tensor, k: Tensor, v: Tensor, gamma_q: Tensor, beta_q: Tensor, gamma_k: Tensor, beta_k: Tensor) -> Tensor:
    """arXiv:2402.10644: the score is (q' . k')^2 / K with x' = gamma * norm(x) + beta; 1e-5 as in the authors' code."""
    q = functional.layer_norm(q, q.shape[-1:], gamma_q, beta_q, 1e-5)
    k = functional.layer_norm(k, k.shape[-1:], gamma_k, beta_k, 1e-5)
    score = (torch.einsum("bthk,bshk->bhts", q, k) ** 2 / q.shape[-1]).tril()
    return torch.einsum("bhts,bshv->bthv", score / (score.sum(-1, keepdim=True) + 1e-5), v)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv:1812.01243: softmax of q over features, of k over tokens; every token sees every token."""
    return attend(torch.softmax(q, -1), torch.softmax(k, 1), v, causal=False)[0]


def retnet(q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor) -> Tensor:
    """arXiv:2307.08621: (Q K^T o D) V with D_ts = gamma^(t-s), and 1 / sqrt(K)."""
    weight = g_gamma.exp()[:, None, None] ** distances(q.shape[1]).clamp(min=0)
    return attend(q / math.sqrt(q.shape[-1]), k, v, weight)[0]


def lightning(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """arXiv:2401.04658: (Q K^T o M) V with M_ts = lambda^(t-s), lambda = exp(-s)."""
    return attend(q, k, v, (-s).exp()[:, None, None] ** distances(q.shape[1]).clamp(min=0))[0]


def spread(x: Tensor, heads: int) -> Tensor:
    """Repeats each head of [B, T, H, ...] for the neighbours that share it."""
    return torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], 2)


def decays(log_gate: Tensor) -> Tensor:
    """Returns prod_{s < r <= t} exp(g_r) as [B, H, T, T] of a scalar log-gate [B, T, H]."""
    total = log_gate.cumsum(1).transpose(1, 2)
    return (total[..., :, None] - total[..., None, :]).exp()


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """arXiv:2405.05254, gated retention: S_t = gamma_t S_{t-1} + k_t v_t, and 1 / sqrt(K)."""
    heads = v.shape[2]
    return attend(spread(q, heads) / math.sqrt(q.shape[-1]), spread(k, heads), v, decays(g))[0]


def mamba2(x: Tensor, dt_raw: Tensor, B: Tensor, C: Tensor, A_log: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """arXiv:2405.21060: h_t = exp(dt A) h_{t-1} + dt B x, y = C h + D x, with A = -exp(A_log) and dt = softplus(dt_raw + dt_bias)."""
    dt, heads = (1 + (dt_raw + dt_bias).exp()).log(), x.shape[2]
    mixed, _ = attend(spread(C, heads), spread(B, heads), x * dt.unsqueeze(-1), decays(-A_log.exp() * dt))
    return mixed + D[:, None] * x


def scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor | None = None) -> Tensor:
    """Runs S_t = diag(gate_t) S_{t-1} + k_t v_t; reads S_t, or S_{t-1} + diag(bonus) k_t v_t where there is a bonus."""
    state, rows = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        write = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        new = gate[:, t].unsqueeze(-1) * state + write
        read = new if bonus is None else state + bonus.unsqueeze(-1) * write
        rows.append((q[:, t].unsqueeze(-1) * read).sum(-2))
        state = new
    return torch.stack(rows, 1)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """arXiv:2312.06635: S_t = diag(alpha_t) S_{t-1} + k_t v_t, and 1 / sqrt(K)."""
    return scan(q, k, v, g.exp()) / math.sqrt(q.shape[-1])


def hgrn2(q: Tensor, f: Tensor, i: Tensor, lower_bound: Tensor) -> Tensor:
    """arXiv:2404.07904: h_t = diag(f_t) h_{t-1} + (1 - f_t) i_t, o_t = q_t h_t, f_t bounded below."""
    gate = lower_bound + (1 - lower_bound) / (1 + (-f).exp())
    return scan(q, 1 - gate, i, gate)


def rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """arXiv:2404.05892: o_t = r_t (diag(u) k_t v_t + S_{t-1}), S_t = diag(exp w_t) S_{t-1} + k_t v_t."""
    return scan(r, k, v, w.exp(), u)


def metala(q: Tensor, v: Tensor, g: Tensor, w_aug: Tensor) -> Tensor:
    """arXiv:2411.10741: S_t = diag(alpha_t) S_{t-1} + (1 - alpha_t) v_t, plus sigmoid(q_t . (w_aug (1 - alpha_t)) v_t)."""
    alpha = g.exp()
    own = (q * w_aug * (1 - alpha)).sum(-1, keepdim=True) * v
    return scan(q, 1 - alpha, v, alpha) + 1 / (1 + (-own).exp())


def gated_rfa(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor) -> Tensor:
    """arXiv:2103.02143: S and z decay by g and gain (1 - g) phi(k) v and (1 - g) phi(k); phi of unit vectors (1e-6 under the root)."""

    def phi(x: Tensor) -> Tensor:
        unit = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        angle = torch.einsum("bthk,hkm->bthm", unit, W)
        return torch.cat([angle.sin(), angle.cos()], -1) / math.sqrt(W.shape[-1])

    gate = 1 / (1 + (-f).exp())
    top, bottom = attend(phi(q), phi(k) * (1 - gate).unsqueeze(-1), v, decays(gate.log()))
    return top / bottom


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        based,
        cosformer,
        efficient_attention,
        gated_rfa,
        gla,
        hedgehog,
        hgrn2,
        lightning,
        linear_attention,
        mamba2,
        metala,
        performer,
        rebased,
        relu_attention,
        retnet,
        rwkv6,
        simple_gla,
    )
}
