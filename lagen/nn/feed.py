"""Feed: the modules that make a spec's inputs from the hidden vector of a token, chosen by the dims and assumptions of each input.

vectors [.., K]                   a linear map without bias, then the short convolution where the layer has one
vectors with dot(k, k) <= c       the same, then scaled to that length (what the delta rule asks of its keys)
bounded inputs, such as g <= 0    a linear map with a bias, then the smooth map into the interval (nn/start.Bound), in float32.
                                  A log-decay <= 0 is logsigmoid / ``GENTLE``, as GLA's code has it
numbers [H], inputs of a decay    a linear map, with a bias where no param of the spec stands beside the input; in float32
one number a token, []            the token's position, as a part of the longest length where the spec bounds it
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lagen.ir import expr as E
from lagen.ir.expr import Expr, reads, walk
from lagen.ir.roles import gate_inputs
from lagen.ir.variant import Tensor as Declared
from lagen.ir.variant import Variant
from lagen.nn.start import Bound, bound_of

GENTLE = 16.0
"""What divides the log-decay of a gate, so that it starts near log(0.5) / 16 a token (GLA, arXiv:2312.06635, section 4.4)."""

GAIN = 2.0**-2.5
"""Gain of the projections' Xavier start, as RetNet's and GLA's code have it."""


def projection(width: int, size: int, bias: bool = False) -> nn.Linear:
    """Makes a linear map with the start of the field's layers."""
    linear = nn.Linear(width, size, bias=bias)
    nn.init.xavier_uniform_(linear.weight, gain=GAIN)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def is_position(variant: Variant, declared: Declared) -> bool:
    """Tells whether an input is the token's position: one number a token, not a gate."""
    return not declared.head and not declared.dims and declared.name not in gate_inputs(variant)


def is_gate(variant: Variant, declared: Declared) -> bool:
    """Tells whether an input stays in float32: it feeds a decay, is bounded, or is a number."""
    return not declared.dims or declared.name in gate_inputs(variant) or bound_of(variant, declared.name).closed


class Feed(nn.Module):
    """Makes one input [B, T, *head, *dims] from x [B, T, dim], or [B, *head, *dims] from [B, dim].

    ``before`` is the linear map, ``after`` what follows a short convolution.
    """

    def __init__(self, variant: Variant, declared: Declared, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape = shape
        squares, highs = product_bounds(variant)
        own = bound_of(variant, declared.name)
        self.bound = Bound(own.low, min(own.high, highs.get(declared.name, math.inf)))
        self.gate = is_gate(variant, declared)
        self.decays = declared.name in gate_inputs(variant)
        self.square = squares.get(declared.name, 0.0)
        self.linear = projection(width, math.prod(shape), bias=self.gate and not _has_bias(variant, declared.name))

    def extra_repr(self) -> str:
        """Returns what is printed in the module's parentheses."""
        parts = [str(list(self.shape))]
        if self.bound.closed:
            parts.append(f"{self.bound.low} .. {self.bound.high}")
        return ", ".join(parts + ([f"|x|² <= {self.square}"] if self.square else []))

    def before(self, x: Tensor) -> Tensor:
        """Projects: [.., dim] to [.., size]."""
        projected: Tensor = self.linear(x)
        return projected

    def after(self, x: Tensor) -> Tensor:
        """Shapes [.., size] into heads and dims, and brings the values where the spec wants them."""
        x = x.unflatten(-1, self.shape) if self.shape else x.squeeze(-1)
        if self.square:
            wide = x if x.dtype == torch.float64 else x.float()
            longest = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * (1.0 + 1e-6) + 1e-6  # so that rounding stays inside
            x = (wide * (self.square**0.5 / longest)).to(x.dtype)
        if not self.gate:
            return x
        x = x if x.dtype == torch.float64 else x.float()
        if self.decays and self.bound == Bound(-math.inf, 0.0):
            return functional.logsigmoid(x) / GENTLE
        return self.bound.apply(x)

    def forward(self, x: Tensor) -> Tensor:
        """Projects and shapes."""
        return self.after(self.before(x))


def product_bounds(variant: Variant) -> tuple[dict[str, float], dict[str, float]]:
    """Returns what assumptions on products of squared lengths leave to each: squared lengths of vectors, upper bounds of numbers."""
    squares: dict[str, float] = {}
    highs: dict[str, float] = {}
    for fact in variant.assumptions:
        if fact.op not in ("lt", "le", "gt", "ge"):
            continue
        left, right = fact.args if fact.op in ("lt", "le") else fact.args[::-1]
        factors = E.factors(left)
        vectors = [f.args[0].name for f in factors if f.op == "contract" and f.args[0] == f.args[1] and f.args[0].op == "input"]
        numbers = [f.name for f in factors if f.op == "input" and not f.dims]
        if vectors and right.op == "const":
            squares |= dict.fromkeys(vectors, 1.0 if numbers else right.value ** (1 / len(vectors)))
            highs |= dict.fromkeys(numbers, right.value / 2)
    return squares, highs


def _leaf(e: Expr, name: str) -> bool:
    return e.op == "input" and e.name == name


def _has_bias(variant: Variant, name: str) -> bool:
    """Tells whether a param is added to an input, as its bias."""
    nodes = walk(*(s.expr for s in variant.states), *(o.expr for o in variant.outputs))
    return any(n.op == "add" and any(_leaf(a, name) for a in n.args) and bool(reads(n, "param")) for n in nodes)
