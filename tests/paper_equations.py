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


def transitions(q: Tensor, steps: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
    """Returns o_t = S_t^T q_t, where steps(S, t) makes S_t [B, H, K, V] of S_{t-1}; S_0 = 0."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], size)
    out = []
    for t in range(q.shape[1]):
        state = steps(state, t)
        out.append((state.transpose(-1, -2) @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, 1)


def rank_one(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b^T."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def householder(k: Tensor, beta: Tensor) -> Tensor:
    """Returns I - beta k k^T."""
    return torch.eye(k.shape[-1], dtype=k.dtype) - beta[..., None, None] * rank_one(k, k)


def unit(x: Tensor) -> Tensor:
    """Returns x / sqrt(|x|^2 + 1e-6)."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """arXiv:2406.06484, eq. 4: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""

    def step(s: Tensor, t: int) -> Tensor:
        return householder(k[:, t], beta[:, t]) @ s + beta[:, t, :, None, None] * rank_one(k[:, t], v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def gated_deltanet(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """arXiv:2412.06464: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T; heads of q and k serve neighbours."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))

    def step(s: Tensor, t: int) -> Tensor:
        decayed = g[:, t].exp()[..., None, None] * householder(k[:, t], beta[:, t]) @ s
        return decayed + beta[:, t, :, None, None] * rank_one(k[:, t], v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def gated_deltaproduct(
    q: Tensor, k1: Tensor, v1: Tensor, b1: Tensor, k2: Tensor, v2: Tensor, b2: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor
) -> Tensor:
    """arXiv:2502.10297: S_t = alpha_t A_2 A_1 S_{t-1} + beta_1 A_2 k_1 v_1^T + beta_2 k_2 v_2^T with A_i = I - beta_i k_i k_i^T."""
    alpha = (-A_log.exp() * (1 + (a + dt_bias).exp()).log()).exp()
    (n1, beta1), (n2, beta2) = ((unit(k), 2 / (1 + (-b).exp())) for k, b in ((k1, b1), (k2, b2)))

    def step(s: Tensor, t: int) -> Tensor:
        first = householder(n1[:, t], beta1[:, t]) @ (alpha[:, t, :, None, None] * s)
        first = first + beta1[:, t, :, None, None] * rank_one(n1[:, t], v1[:, t])
        return householder(n2[:, t], beta2[:, t]) @ first + beta2[:, t, :, None, None] * rank_one(n2[:, t], v2[:, t])

    return transitions(unit(q), step, v1.shape[-1]) / math.sqrt(q.shape[-1])


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """arXiv:2510.26692, eq. 1: S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T."""

    def step(s: Tensor, t: int) -> Tensor:
        decayed = g[:, t].exp().unsqueeze(-1) * s
        return householder(k[:, t], beta[:, t]) @ decayed + beta[:, t, :, None, None] * rank_one(k[:, t], v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def comba(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """arXiv:2506.02475: S_t = (alpha_t - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T, p = sigmoid(b) k, read by q - d k."""
    p = k / (1 + (-b).exp()).unsqueeze(-1)

    def step(s: Tensor, t: int) -> Tensor:
        fed = beta[:, t, :, None, None] * rank_one(k[:, t], p[:, t])
        move = g[:, t].exp()[..., None, None] * torch.eye(k.shape[-1], dtype=k.dtype) - fed
        return move @ s + beta[:, t, :, None, None] * rank_one(k[:, t], v[:, t])

    return transitions(q - d.unsqueeze(-1) * k, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def gdn2(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """arXiv:2605.22791: S_t = (I - k_t (b_t * k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T."""

    def step(s: Tensor, t: int) -> Tensor:
        move = torch.eye(k.shape[-1], dtype=k.dtype) - rank_one(k[:, t], b[:, t] * k[:, t])
        return move @ (g[:, t].exp().unsqueeze(-1) * s) + rank_one(k[:, t], w[:, t] * v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """arXiv:2503.14456, eq. 17: S_t = S_{t-1} (Diag(w_t) - z_t^T (a_t * z_t)) + v_t^T k_t, here transposed; w in [exp(-exp(-1/2)), 1]."""
    decay = (-math.exp(-0.5) / (1 + (-w).exp())).exp()
    z = unit(kappa)

    def step(s: Tensor, t: int) -> Tensor:
        move = torch.diag_embed(decay[:, t]) - rank_one(a[:, t] * z[:, t], z[:, t])
        return move @ s + rank_one(k[:, t], v[:, t])

    return transitions(r, step, v.shape[-1])


def dplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """arXiv:2503.14456, generalised: S_t = (Diag(alpha_t) + b_t a_t^T) S_{t-1} + k_t v_t^T."""

    def step(s: Tensor, t: int) -> Tensor:
        return (torch.diag_embed(g[:, t].exp()) + rank_one(b[:, t], a[:, t])) @ s + rank_one(k[:, t], v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def iplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """arXiv:2406.06484, generalised: S_t = (I + b_t a_t^T) S_{t-1} + k_t v_t^T."""
    return dplr(q, k, v, a, b, torch.zeros_like(k))


def gated_oja(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Oja's rule on decayed values: S_t = S_{t-1} Diag(alpha_t) (I - beta_t v_t v_t^T) + beta_t k_t v_t^T."""

    def step(s: Tensor, t: int) -> Tensor:
        decayed = s * g[:, t].exp().unsqueeze(-2)
        return decayed @ householder(v[:, t], beta[:, t]) + beta[:, t, :, None, None] * rank_one(k[:, t], v[:, t])

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def preconditioned_deltanet(
    q: Tensor, k: Tensor, v: Tensor, g_a: Tensor, g: Tensor, beta_a: Tensor, beta: Tensor, center: Tensor
) -> Tensor:
    """arXiv:2604.21100, diagonal form: Gated DeltaNet whose writes are k over the squashed sum A_t of decayed beta_a k^2."""
    group = v.shape[2] // k.shape[2]
    age = g_a.cumsum(1).transpose(1, 2)
    shares = (age.unsqueeze(-1) - age.unsqueeze(-2)).exp().tril() * beta_a.transpose(1, 2).unsqueeze(-2)
    far = torch.log(torch.einsum("bhts,bshk->bthk", shares, k.square()) + 1e-6) - center[:, None]
    scaled = k * 1.5 ** (-far / (1 + far.abs()))
    q, k, scaled = (x.repeat_interleave(group, 2) for x in (q, k, scaled))

    def step(s: Tensor, t: int) -> Tensor:
        decayed = s * g[:, t, :, None, None].exp()
        return decayed + beta[:, t, :, None, None] * (rank_one(scaled[:, t], v[:, t]) - rank_one(scaled[:, t], k[:, t]) @ decayed)

    return transitions(q, step, v.shape[-1]) / math.sqrt(q.shape[-1])


def shares(s: Tensor, g: Tensor | None = None) -> Tensor:
    """Returns what of token j's slots is left at token i, exp(s_j) over its sum or times the gates between: [B, H, M, T, T]."""
    lower = torch.ones(s.shape[1], s.shape[1], dtype=torch.bool).tril()
    if g is None:
        weights = s.permute(0, 2, 3, 1).unsqueeze(-2).expand(-1, -1, -1, s.shape[1], -1)
        return torch.softmax(weights.masked_fill(~lower, -torch.inf), -1)
    total = g.permute(0, 2, 3, 1).cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).exp() * lower * s.permute(0, 2, 3, 1).unsqueeze(-2)


def slots(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Returns softmax(q . K) V of slots that hold weighted sums of keys and values."""
    keys, values = (torch.einsum("bhmts,bshx->bthmx", weights, x) for x in (k, v))
    p = torch.softmax(torch.einsum("bthk,bthmk->bthm", q, keys) / math.sqrt(q.shape[-1]), -1)
    return torch.einsum("bthm,bthmv->bthv", p, values)


def gsa(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """arXiv:2409.07146: slots decay by exp(g) and take s of each token."""
    return slots(q, k, v, shares(s, g))


def abc(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """arXiv:2110.02488, its learned control: slot m holds the mean of the tokens so far, weighted by exp(s_m)."""
    return slots(q, k, v, shares(s))


def hgrn(x: Tensor, g: Tensor) -> Tensor:
    """arXiv:2311.04823: h_t = f_t h_{t-1} + (1 - f_t) x_t, as a sum over the tokens before."""
    total = g.cumsum(1)
    weight = (total[:, :, None] - total[:, None]).exp() * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()[:, :, None]
    return torch.einsum("btsd,bsd->btd", weight, (1 - g.exp()) * x)


def rwkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """arXiv:2305.13048, equation 16: wkv_t, each token's weight exp(-(t - 1 - i) w + k_i), the last one's exp(u + k_t)."""
    rows = []
    for t in range(k.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None]
        weight = torch.cat([(k[:, :t] - age * w).exp(), (u + k[:, t : t + 1]).exp()], 1)
        rows.append((weight * v[:, : t + 1]).sum(1) / weight.sum(1))
    return torch.stack(rows, 1)


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """arXiv:2405.04517, equations 19 to 27, in the form without a stabiliser."""
    weight = decays((1 / (1 + (-f).exp())).log()) * i.exp().transpose(1, 2).unsqueeze(-2)
    top, bottom = attend(q / math.sqrt(q.shape[-1]), k, v, weight)
    return top / bottom.abs().clamp(min=1.0)


def selective(x: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Runs S_t = decay_t S_{t-1} + x_t B_t, number by number, and returns S_t C_t; decay is [B, T, E, N]."""
    state, rows = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + x[:, t, :, None] * B[:, t, None]
        rows.append((state * C[:, t, None]).sum(-1))
    return torch.stack(rows, 1)


def mamba1(x: Tensor, dt_raw: Tensor, B: Tensor, C: Tensor, A_log: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """arXiv:2312.00752, algorithm 2: A = -exp(A_log), dt = softplus(dt_raw + dt_bias), y = C h + D x."""
    dt = (1 + (dt_raw + dt_bias).exp()).log()
    return selective(dt * x, (-A_log.exp() * dt.unsqueeze(-1)).exp(), B, C) + D * x


def longhorn(x: Tensor, b: Tensor, q: Tensor, k: Tensor, D: Tensor) -> Tensor:
    """arXiv:2407.14207, algorithm 1: delta = beta / (1 + beta k.k), S_t = (1 - delta k^2) S_{t-1} + delta x k."""
    beta = 1 / (1 + (-b).exp())
    delta = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    return selective(delta * x, 1 - delta.unsqueeze(-1) * k.square().unsqueeze(-2), k, q) + D * x


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        abc,
        based,
        comba,
        cosformer,
        delta_rule,
        dplr,
        efficient_attention,
        gated_deltanet,
        gated_deltaproduct,
        gated_oja,
        gated_rfa,
        gdn2,
        gla,
        gsa,
        hedgehog,
        hgrn,
        hgrn2,
        iplr,
        kda,
        lightning,
        linear_attention,
        longhorn,
        mamba1,
        mamba2,
        metala,
        mlstm,
        performer,
        preconditioned_deltanet,
        rebased,
        relu_attention,
        retnet,
        rwkv4,
        rwkv6,
        rwkv7,
        simple_gla,
    )
}
