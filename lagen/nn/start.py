"""Start: the value that a param of a spec has before training, read off the place where the param stands.

What the place tells, in this order:

    a bounded param          kept inside by a map (``Bound``) and trained in front of it. A log-decay <= 0 starts as RetNet's
                             log(1 - 2^-(5 + h)), a slope >= 0 of a decay as Lightning's 2^(-8 (h + 1) / H), any other near its low end
    exp(param) in a decay    log of 1 .. 16 drawn evenly (Mamba-2's A_log); with two dims log of 1 .. N along the last (S4D, Mamba)
    softplus(input + param)  what makes the softplus 0.001 .. 0.1, drawn evenly in the log (Mamba's dt_bias)
    two dims                 random directions along the first, orthogonal in blocks (Performer's W)
    a factor                 one (D, a norm's gain)
    a summand                zero (a norm's offset)

What the place does not tell is in PAPERS: there a spec names a start of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lagen.ir.expr import Expr, reads, walk
from lagen.ir.roles import bounds, gates
from lagen.ir.variant import Tensor as Declared
from lagen.ir.variant import Variant

Start = Callable[[Tensor], Tensor]  # from a tensor of the param's shape to one with its first values

NEAR = 1e-2
"""How far from its end a bounded value starts, as a part of its interval: at the end itself it would not learn."""


# ---- bounds ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """An interval, and the smooth map from all numbers into it."""

    low: float
    high: float

    @property
    def closed(self) -> bool:
        """Tells whether there is a bound at all."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    def apply(self, x: Tensor) -> Tensor:
        """Maps numbers into the interval."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return self.low + (self.high - self.low) * torch.sigmoid(x)
        if math.isfinite(self.high):
            return self.high - functional.softplus(x)
        return self.low + functional.softplus(x) if math.isfinite(self.low) else x

    def invert(self, y: Tensor) -> Tensor:
        """Returns what ``apply`` maps to ``y``."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return torch.logit((y - self.low) / (self.high - self.low))
        if math.isfinite(self.high):
            return inverse_softplus(self.high - y)
        return inverse_softplus(y - self.low) if math.isfinite(self.low) else y


def bound_of(variant: Variant, name: str) -> Bound:
    """Returns the bound that a variant's assumptions put on a tensor."""
    return Bound(*bounds(variant, name))


def inverse_softplus(y: Tensor) -> Tensor:
    """Returns x with softplus(x) = y."""
    return y + torch.log(-torch.expm1(-y))


# ---- starts ---------------------------------------------------------------------------------------------------------------------


def _heads(like: Tensor) -> Tensor:
    """Counts along the first dim, in the shape of ``like``."""
    return torch.arange(like.shape[0], dtype=torch.float32).reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def retention(like: Tensor) -> Tensor:
    """Returns log(1 - 2^-(5 + h)) of head h (RetNet, arXiv:2307.08621, section 2.2)."""
    return torch.log1p(-torch.exp2(-5.0 - _heads(like)))


def slopes(like: Tensor) -> Tensor:
    """Returns 2^(-8 (h + 1) / H) of head h, as ALiBi and Lightning Attention have it; the latter's layers scale it down in depth."""
    return torch.exp2(-8.0 * (_heads(like) + 1.0) / like.shape[0])


def log_rates(like: Tensor) -> Tensor:
    """Returns the log of rates: 1 .. N along the last of two dims (S4D's real form), else drawn from 1 .. 16 (Mamba-2)."""
    if like.ndim > 1:
        return torch.log(torch.arange(1.0, like.shape[-1] + 1)).expand(like.shape)
    return torch.log(torch.empty(like.shape).uniform_(1.0, 16.0))


def time_steps(like: Tensor) -> Tensor:
    """Returns the inverse softplus of steps drawn from 0.001 .. 0.1, evenly in the log (Mamba, arXiv:2312.00752, section 3.6)."""
    return inverse_softplus(torch.exp(torch.empty(like.shape).uniform_(math.log(1e-3), math.log(1e-1))))


def directions(like: Tensor) -> Tensor:
    """Returns Gaussian directions [..., K, M], orthogonal within every K of them (Performer, arXiv:2009.14794, section 2.4)."""
    *lead, k, m = like.shape
    blocks: list[Tensor] = [torch.linalg.qr(torch.randn(*lead, k, k)).Q for _ in range(-(-m // k))]
    lengths = torch.linalg.vector_norm(torch.randn(*lead, k, m), dim=-2, keepdim=True)
    made: Tensor = torch.cat(blocks, -1)[..., :m] * lengths
    return made


def bonus(like: Tensor) -> Tensor:
    """Returns RWKV-6's first u [H, K]: from 1 down to 0 over the channels, with a zigzag of three (its code, time_faaaa)."""
    channel = torch.arange(like.numel(), dtype=torch.float32)
    zigzag = ((channel + 1) % 3 - 1) * 0.1
    return (1.0 - channel / max(like.numel() - 1, 1) + zigzag).reshape(like.shape)


def speeds(like: Tensor) -> Tensor:
    """Returns RWKV-4's first w [D], a decay from exp(-5) in the first channel to exp(3) in the last (its code, time_decay)."""
    return torch.exp(-5.0 + 8.0 * (torch.arange(like.numel(), dtype=torch.float32) / max(like.numel() - 1, 1)).reshape(like.shape))


def squash_centers(like: Tensor) -> Tensor:
    """Returns Preconditioned DeltaNet's first center [H]: -0.2 (its code in flash-linear-attention, log_atk_scale)."""
    return torch.full(like.shape, -0.2)


def firsts(like: Tensor) -> Tensor:
    """Returns RWKV-4's first u [D]: log(0.3), with a zigzag of three (its code, time_first)."""
    zigzag = (torch.arange(like.numel(), dtype=torch.float32) + 1) % 3 - 1
    return (math.log(0.3) + 0.5 * zigzag).reshape(like.shape)


PAPERS: dict[tuple[str, str], Start] = {
    ("preconditioned_deltanet", "center"): squash_centers,
    ("rwkv4", "u"): firsts,
    ("rwkv4", "w"): speeds,
    ("rwkv6", "u"): bonus,
    ("metala", "w_aug"): torch.zeros_like,
}
"""Starts by spec and param, where the paper's is not what the param's place tells."""


# ---- which start a param has ----------------------------------------------------------------------------------------------------


def start_of(variant: Variant, param: Declared) -> Start:
    """Returns the start of a param, as the table above says; of a bounded param the value behind the bound."""
    bound = bound_of(variant, param.name)
    decays = [n for gate in gates(variant) for n in walk(gate)]
    if (variant.name, param.name) in PAPERS:
        return PAPERS[variant.name, param.name]
    if bound.closed:
        return _inside(bound, any(n.name == param.name and n.op == "param" for n in decays))
    nodes = list(walk(*(s.expr for s in variant.states), *(o.expr for o in variant.outputs)))
    if any(n.op == "exp" and _is(n.args[0], param) for n in decays):
        return log_rates
    if any(n.op == "softplus" and n.args[0].op == "add" and _beside(n.args[0], param) for n in nodes):
        return time_steps
    if len(param.dims) == 2:
        return directions
    if any(n.op in ("mul", "div", "contract") and any(_is(a, param) for a in n.args) for n in nodes):
        return torch.ones_like
    return torch.zeros_like


def _is(e: Expr, param: Declared) -> bool:
    return e.op == "param" and e.name == param.name


def _beside(total: Expr, param: Declared) -> bool:
    """Tells whether a param is a summand beside an input."""
    return any(_is(a, param) for a in total.args) and bool(reads(total, "input"))


def _inside(bound: Bound, decays: bool) -> Start:
    """Returns the start of a bounded param."""
    if math.isfinite(bound.low) and math.isfinite(bound.high):
        return lambda like: torch.full_like(like, bound.low + NEAR * (bound.high - bound.low))
    if math.isfinite(bound.high):
        return lambda like: bound.high + (retention(like) if decays else torch.full_like(like, -1.0))
    return lambda like: bound.low + (slopes(like) if decays else torch.full_like(like, 1.0))
