"""The oracle: evaluates a Variant token by token as it stands, in float64 on the CPU, differentiable by torch autograd.

What it is: the meaning of a spec. What it is not: fast, chunked, or sharing any code with the passes; it reads ir/variant and
ir/expr alone, so that a mistake in the compiler cannot hide in it. Who reads it: verify/laws, the tests, ``backend="oracle"``.

A value of an expression has the shape [B, T, head, *dims]: head and dims as the expression's type says them (dims sorted), 1 where
the value does not vary. Inside the loop over tokens T is absent, so every rule below counts axes from the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from graphlib import TopologicalSorter

import torch
from torch import Tensor
from torch.nn import functional

from lagen.ir.expr import Expr, reads, walk
from lagen.ir.variant import StateLine, Variant
from lagen.ir.variant import Tensor as Declared

Tensors = tuple[Tensor, ...]


class OracleError(ValueError):
    """Says which tensor does not fit the variant, what it got and what it wants."""


# ---- sizes ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call: batch, time, both head dims, and every other dim by name, derived ones included."""

    batch: int
    time: int
    heads: dict[str, int]
    dims: dict[str, int]

    def shape(self, tensor: Declared | StateLine) -> tuple[int, ...]:
        """Returns the shape of a declared tensor, or of a state, in storage order."""
        head = (self.heads[tensor.head],) if tensor.head else ()
        front: tuple[int, ...] = (self.batch,) if isinstance(tensor, StateLine) else ()
        if isinstance(tensor, Declared) and tensor.token:
            front = (self.batch, self.time)
        return front + head + tuple(self.dims[d] for d in tensor.dims)


def measure(variant: Variant, inputs: Tensors, params: Tensors) -> Sizes:
    """Reads all sizes off the tensors; raises OracleError where count, rank or a dim does not fit."""
    for what, wanted, got in (("inputs", variant.inputs, inputs), ("params", variant.params, params)):
        if len(wanted) != len(got):
            raise OracleError(f"{variant.name} takes {len(wanted)} {what} ({', '.join(t.name for t in wanted)}), got {len(got)}")
    known: dict[str, int] = {}
    for declared, tensor in zip(variant.inputs + variant.params, inputs + params, strict=True):
        if tensor.ndim != len(declared.shape):
            raise OracleError(f"{declared.name}: wants {declared.shape}, got a tensor of shape {tuple(tensor.shape)}")
        for dim, size in zip(declared.shape, tensor.shape, strict=True):
            if known.setdefault(dim, size) != size:
                raise OracleError(f"{declared.name}: {dim} is {size} here and {known[dim]} before")
    batch, time = known.pop("B"), known.pop("T")
    heads: dict[str, int] = {h: known.pop(h) for h in ("H", "HV") if h in known}
    heads.setdefault("H", heads.get("HV", 1))
    heads.setdefault("HV", heads["H"])
    if heads["HV"] % max(heads["H"], 1):
        raise OracleError(f"HV = {heads['HV']} is no multiple of H = {heads['H']}")
    heads[""] = 1
    return Sizes(batch, time, heads, derive_sizes(variant, known))


def derive_sizes(variant: Variant, dims: dict[str, int]) -> dict[str, int]:
    """Adds the dims that ``-> F`` makes, by their size expressions."""
    out = dict(dims)
    for dim, expr in variant.sizes:
        value = Evaluation(Sizes(1, 1, {"": 1, "H": 1, "HV": 1}, out), 1.0, torch.float64).value(expr)
        out[dim] = round(value.item())
    return out


# ---- one node -------------------------------------------------------------------------------------------------------------------


def _compare(relation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: relation(a, b).to(a.dtype)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition != 0, a, b)


class _Sigmoid(torch.autograd.Function):
    """The sigmoid, whose gradient does not round a closed or an open gate's slope to 0, as y (1 - y) does."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Returns 1 / (1 + exp(-x))."""
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d: Tensor) -> Tensor:
        """Returns d sigmoid(x) sigmoid(-x)."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d * torch.sigmoid(x) * torch.sigmoid(-x)


def _sigmoid(x: Tensor) -> Tensor:
    y: Tensor = _Sigmoid.apply(x)  # type: ignore[no-untyped-call]
    return y


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "abs": torch.abs,
    "sign": torch.sign,
    "min": torch.minimum,
    "max": torch.maximum,
    "where": _where,
    "lt": _compare(torch.lt),
    "le": _compare(torch.le),
    "gt": _compare(torch.gt),
    "ge": _compare(torch.ge),
    "eq": _compare(torch.eq),
    "ne": _compare(torch.ne),
    "sigmoid": _sigmoid,
    "logsigmoid": functional.logsigmoid,
    # torch's softplus goes over to x at 20, which is off by 2e-9 there: too coarse for a float64 reference
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": functional.elu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "cos": torch.cos,
    "sin": torch.sin,
}


def _taylor2(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1)
    return torch.cat([torch.ones_like(x[..., :1]), x, x * x / math.sqrt(2.0), x[..., i] * x[..., j]], dim=-1)


def _quad(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1)
    return torch.cat([x * x, math.sqrt(2.0) * x[..., i] * x[..., j]], dim=-1)


_ROW: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sum": lambda x, eps: x.sum(-1),
    "mean": lambda x, eps: x.mean(-1),
    "rowmax": lambda x, eps: x.amax(-1),
    "softmax": lambda x, eps: torch.softmax(x, -1),
    "l2norm": lambda x, eps: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps),
    "rmsnorm": lambda x, eps: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps),
    "taylor2": lambda x, eps: _taylor2(x),
    "quad": lambda x, eps: _quad(x),
    "rename": lambda x, eps: x,
}


def _widen(value: Tensor, node: Expr, head: str, dims: tuple[str, ...], heads: dict[str, int]) -> Tensor:
    """Gives a node's value the head and the dims of its user: H repeated in neighbours for HV, 1 where a dim is missing."""
    lead, own = value.shape[: value.ndim - len(node.dims)], iter(value.shape[value.ndim - len(node.dims) :])
    if head == "HV" and node.head == "H" and heads["HV"] != heads["H"]:
        value = value.repeat_interleave(heads["HV"] // heads["H"], dim=len(lead) - 1)
        lead = value.shape[: len(lead)]
    return value.reshape(*lead, *(next(own) if d in node.dims else 1 for d in dims))


def _join(node: Expr, a: Tensor, b: Tensor) -> Tensor:
    """Sums or keeps dims of a product of two values: outer and contract, by named dims."""
    names = sorted({*node.args[0].dims, *node.args[1].dims})
    left, right, out = ("".join(chr(97 + names.index(d)) for d in e.dims) for e in (*node.args, node))
    return torch.einsum(f"...{left},...{right}->...{out}", a, b)


def _apply(node: Expr, args: list[Tensor], heads: dict[str, int]) -> Tensor:
    """Evaluates one node from its operands' values; raises KeyError naming an op that has no meaning in a Variant."""
    if node.op in _ELEMENTWISE:
        return _ELEMENTWISE[node.op](*(_widen(x, a, node.head, node.dims, heads) for x, a in zip(args, node.args, strict=True)))
    args = [_widen(x, a, node.head, a.dims, heads) for x, a in zip(args, node.args, strict=True)]
    if node.op == "pow":
        return args[0] ** node.value
    if node.op in ("outer", "contract"):
        return _join(node, args[0], args[1])
    if node.op == "concat":
        lead = [max(m, n) if min(m, n) else 0 for m, n in zip(args[0].shape[:-1], args[1].shape[:-1], strict=True)]
        return torch.cat([x.expand(*lead, x.shape[-1]) for x in args], dim=-1)
    if node.op in _ROW:
        return _ROW[node.op](args[0], node.value)
    raise KeyError(f"the oracle has no rule for the op {node.op!r}")


# ---- a call ---------------------------------------------------------------------------------------------------------------------


class Evaluation:
    """The values of one call: known leaves, and every node that was evaluated for all tokens at once."""

    def __init__(self, sizes: Sizes, scale: float, dtype: torch.dtype) -> None:
        self.sizes = sizes
        self.scale = scale
        self.dtype = dtype
        self.known: dict[Expr, Tensor] = {}
        self.leaves: dict[tuple[str, str], Tensor] = {}

    def set_leaf(self, op: str, declared: Declared | StateLine, value: Tensor) -> None:
        """Sets an input, a param, or a state's values (``now``, ``past``), given [B or 1, T or 1, *head, *dims] in storage order."""
        if not declared.head:
            value = value.unsqueeze(2)
        order = sorted(range(len(declared.dims)), key=lambda i: declared.dims[i])
        self.leaves[op, declared.name] = value.permute(0, 1, 2, *(3 + i for i in order))

    def _leaf(self, node: Expr) -> Tensor:
        if node.op in ("const", "size", "scale"):
            number = {"const": node.value, "size": float(self.sizes.dims.get(node.name, 0)), "scale": self.scale}[node.op]
            return torch.full((1, 1, 1), number, dtype=self.dtype)
        return self.leaves[node.op, node.name]

    def value(self, root: Expr) -> Tensor:
        """Evaluates an expression for all tokens at once; its leaves must be set."""
        for node in walk(root):
            if node not in self.known:
                args = [self.known[a] for a in node.args]
                self.known[node] = _apply(node, args, self.sizes.heads) if args else self._leaf(node)
        return self.known[root]

    def scan(self, line: StateLine, state: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a state line over time from ``state`` [B, head, *dims]; returns its values before and after each token, [B, T, ...]."""
        below: set[Expr] = set()
        for node in walk(line.expr):
            if (node.op == "past" and node.name == line.name) or any(a in below for a in node.args):
                below.add(node)
        loop = [n for n in walk(line.expr) if n in below and n.args]
        own = [n for n in below if not n.args]
        border = {a for n in loop for a in n.args if a not in below}
        if line.expr not in below:
            border.add(line.expr)
        # unbind, not indexing: the gradient of T single slices would be T tensors of full length
        rows = {n: self.value(n).unbind(1) for n in border}
        before, after = [], []
        for t in range(self.sizes.time):
            here = {n: r[t if len(r) > 1 else 0] for n, r in rows.items()} | dict.fromkeys(own, state)
            for node in loop:
                here[node] = _apply(node, [here[a] for a in node.args], self.sizes.heads)
            before.append(state)
            state = here[line.expr].expand(state.shape)
            after.append(state)
        if not before:
            empty = state.unsqueeze(1)[:, :0]
            return empty, empty
        return torch.stack(before, 1), torch.stack(after, 1)


def _order(variant: Variant) -> list[StateLine]:
    """Returns the states so that each follows those that it reads."""
    graph = {s.name: {n.name for n in reads(s.expr, "past", "now")} - {s.name} for s in variant.states}
    return [variant.state(name) for name in TopologicalSorter(graph).static_order()]


def evaluation(
    variant: Variant, inputs: Tensors, params: Tensors, scale: float | None = None, dtype: torch.dtype = torch.float64
) -> Evaluation:
    """Makes an Evaluation in which inputs and params are known; raises OracleError where they do not fit the variant."""
    sizes = measure(variant, inputs, params)
    if scale is None:
        scale = sizes.dims["K"] ** -0.5 if sizes.dims.get("K") else 1.0
    run = Evaluation(sizes, scale, dtype)
    for declared, tensor in zip(variant.inputs, inputs, strict=True):
        run.set_leaf("input", declared, tensor.to("cpu", dtype))
    for declared, tensor in zip(variant.params, params, strict=True):
        run.set_leaf("param", declared, tensor.to("cpu", dtype)[None, None])
    return run


def evaluate(
    variant: Variant,
    exprs: Iterable[Expr],
    inputs: Tensors,
    params: Tensors,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Evaluates token-wise expressions (a gate, an assumption) on given data; each comes back as [B or 1, T or 1, head, *sorted dims]."""
    run = evaluation(variant, inputs, params, scale, dtype)
    return [run.value(e) for e in exprs]


def oracle(
    variant: Variant,
    inputs: Tensors,
    params: Tensors,
    scale: float | None = None,
    initial_states: Tensors | None = None,
    output_final_state: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensors, Tensors | None]:
    """Evaluates a variant token by token in ``dtype`` and returns (outputs, final states).

    Inputs [B, T, *head, *dims], params [*head, *dims], states [B, *head, *dims] in spec order; results in ``dtype`` on the CPU, attached to
    the autograd graph of what was given. Final states are None where they were not asked for, or the variant is not causal.
    Raises OracleError where a tensor does not fit.
    """
    run = evaluation(variant, inputs, params, scale, dtype)
    sizes = run.sizes
    if initial_states is not None and (not variant.causal or len(initial_states) != len(variant.states)):
        wanted = len(variant.states) if variant.causal else 0
        raise OracleError(f"{variant.name} has {wanted} initial states, got {len(initial_states)}")
    final: dict[str, Tensor] = {}
    for line in _order(variant):
        shape = sizes.shape(line)
        stored = [sorted(line.dims).index(d) for d in line.dims]
        if not variant.causal:
            value = run.value(line.expr)
            total = value.expand(sizes.batch, sizes.time, *value.shape[2:]).sum(1, keepdim=True)
            run.leaves["now", line.name] = total
            continue
        if initial_states is None:
            state = torch.full(shape, line.init, dtype=dtype)
        else:
            state = initial_states[variant.states.index(line)].to("cpu", dtype)
            if tuple(state.shape) != shape:
                raise OracleError(f"initial state {line.name}: wants shape {shape}, got {tuple(state.shape)}")
        run.set_leaf("past", line, state.unsqueeze(1))
        start = run.leaves["past", line.name][:, 0]
        before, after = run.scan(line, start)
        run.leaves["past", line.name], run.leaves["now", line.name] = before, after
        last = after[:, -1] if sizes.time else start
        last = last.permute(0, 1, *(2 + i for i in stored))
        final[line.name] = last if line.head else last.squeeze(1)
    outputs = []
    for out in variant.outputs:
        value = run.value(out.expr)
        value = value.expand(sizes.batch, sizes.time, *value.shape[2:])
        value = value.permute(0, 1, 2, *(3 + sorted(out.dims).index(d) for d in out.dims))
        outputs.append(value if out.head else value.squeeze(2))
    states = tuple(final[s.name] for s in variant.states) if variant.causal and output_final_state else None
    return tuple(outputs), states


def step(
    variant: Variant, inputs: Tensors, params: Tensors, states: Tensors, scale: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensors, Tensors]:
    """Evaluates one token: inputs [B, *head, *dims], states [B, *head, *dims]; returns (outputs [B, *head, *dims], states after it)."""
    outputs, final = oracle(variant, tuple(x.unsqueeze(1) for x in inputs), params, scale, states, True, dtype)
    assert final is not None, f"{variant.name} is not causal and has no step"
    return tuple(o.squeeze(1) for o in outputs), final
