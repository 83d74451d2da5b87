"""Context parallel: one sequence split over the ranks of a torch.distributed group, for any causal spec.

What a stretch of tokens does to a state is affine: S_out = M S_in + c. Each rank runs its own tokens once from a zero state, which gives
c, and takes M from the operator's own backward: the gradient of <S_out, G> with respect to S_in is Mᵀ G. Without corrections M multiplies
each element, and a G of ones shows it; a correction mixes one dim of the state, and a G of unit vectors side by side shows the matrix. So
no family is a special case, and no decay is computed a second time. Ranks exchange c and M only (one all-gather); the state that comes in
is a prefix of products, which every rank computes for itself, and the operator runs again from there.

The gradient goes back the same way: ranks exchange the gradients of what came in, a suffix of products with Mᵀ gives the gradient of what
went out, and the operator's backward, which is linear in it, turns it into gradients of this rank's tensors.

States that read other states come in stages (a stage's writes may depend on the one before in any way): one exchange a stage. A peak is
not affine: ranks hand it on in rounds, each running its tokens from what the rank before last sent, until nothing changes. That is exact
after as many rounds as ranks, and mostly after two, for a running maximum forgets. Its gradient is linear again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lagen.ir.expr import reads, walk
from lagen.ir.variant import StateLine
from lagen.passes.canonicalise import canonicalise
from lagen.runtime.dispatch import as_tuple, state_dtype
from lagen.runtime.operator import Operator
from lagen.runtime.signature import ArgumentError, Sizes
from lagen.spec.read import read_text

LOWEST = -1.0e30
"""Where a peak starts that is not known yet: under every value, as specs' own ``init`` have it."""

Group = dist.ProcessGroup
Tensors = tuple[Tensor, ...]


def context_parallel(
    op: Operator,
    *tensors: Tensor,
    group: Group | None = None,
    scale: float | None = None,
    initial_state: Tensor | Tensors | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Computes an operator over a sequence of which this rank has a stretch: ranks of ``group`` hold it in order.

    ``tensors``: inputs [B, T of this rank, *head, *dims] (T may differ by rank, and be 0) and params. ``initial_state`` is that before the
    whole sequence, read on the first rank. Returns o, or (o, state), where state is that behind this rank's last token: the whole
    sequence's on the last rank. Every rank must call it, and run its backward: o's share of the loss on this rank suffices. A param's
    gradient is this rank's share; sum them over the ranks.

    Raises ArgumentError for a spec that is not causal, and as the operator does.
    """
    states = () if initial_state is None else as_tuple(initial_state)
    if not op.spec.causal:
        raise ArgumentError(f"{op.spec.name} is not causal: a sum over all tokens is no state that ranks hand on")
    if dist.get_world_size(group) > 1:
        exchange = _Exchange(op, group, _maps(op), scale, backend)
        incoming: Callable[..., Tensors] = _Incoming.apply
        states = incoming(exchange, *tensors, *_before(op, tensors, states, dist.get_rank(group)))
    given = (states if len(states) > 1 else states[0]) if states else None
    return op(*tensors, scale=scale, initial_state=given, output_final_state=output_final_state, backend=backend)


# ---- what a stretch of tokens does to a state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """The linear part M of what tokens do to one state, as a tensor: its form, read off the spec.

    A state [B, *head, *dims]. Without ``mixed`` M multiplies element by element and has the dims ``kept``, 1 elsewhere; none at all
    means that M is the identity. Else it is a matrix over the dim at place ``mixed`` (from the end), [B, *head, out, in, other].
    """

    stage: int
    dims: tuple[str, ...]
    kept: frozenset[str]
    mixed: str = ""
    peak: bool = False  # M is then that at the state that came in

    def of(self, state: Tensor, final: Tensor) -> Tensor:
        """Returns M, by the gradients of ``final`` with respect to ``state``."""
        if not self.mixed:
            if not self.kept:
                return final.new_empty(0)
            (whole,) = torch.autograd.grad(final, state, torch.ones_like(final), retain_graph=True)
            for place, d in enumerate(self.dims):
                if d not in self.kept:
                    whole = whole.narrow(whole.ndim - len(self.dims) + place, 0, 1)
            return whole
        size, other = self._sizes(state)
        alike = self._alike
        rows = []
        for start in range(0, size, other if alike else 1):
            unit = torch.eye(size, dtype=final.dtype, device=final.device)[:, start : start + (other if alike else 1)]
            unit = torch.nn.functional.pad(unit, (0, other - unit.shape[1])) if alike else unit.expand(size, other)
            cotangent = self._turned(unit.expand(*final.shape[: -len(self.dims)], size, other)).reshape(final.shape)
            (row,) = torch.autograd.grad(final, state, cotangent, retain_graph=True)
            rows.append(self._front(row))
        if alike:
            return torch.cat(rows, -1)[..., :size].mT.unsqueeze(-1)
        return torch.stack(rows, -3)

    def apply(self, m: Tensor, state: Tensor) -> Tensor:
        """Returns M S."""
        if not self.mixed:
            return m * state if self.kept else state
        front = self._front(state)
        moved = m[..., 0] @ front if self._alike else torch.einsum("...oin,...in->...on", m, front)
        return self._turned(moved).reshape(state.shape)

    def adjoint(self, m: Tensor, gradient: Tensor) -> Tensor:
        """Returns Mᵀ G."""
        if not self.mixed:
            return self.apply(m, gradient)
        front = self._front(gradient)
        moved = m[..., 0].mT @ front if self._alike else torch.einsum("...oin,...on->...in", m, front)
        return self._turned(moved).reshape(gradient.shape)

    def shape(self, state: Tensor) -> tuple[int, ...]:
        """Returns the shape of M for a state."""
        lead = state.shape[: state.ndim - len(self.dims)]
        if not self.mixed:
            return (
                (*lead, *(n if d in self.kept else 1 for d, n in zip(self.dims, state.shape[len(lead) :], strict=True)))
                if self.kept
                else (0,)
            )
        size, other = self._sizes(state)
        return (*lead, size, size, 1 if self._alike else other)

    @property
    def _alike(self) -> bool:
        """Tells whether M is the same for every place on the other dim, which then has no decay of its own."""
        return not self.kept - {self.mixed, ""}

    def _sizes(self, state: Tensor) -> tuple[int, int]:
        size = state.shape[state.ndim - len(self.dims) + self.dims.index(self.mixed)]
        other = 1
        for n in state.shape[state.ndim - len(self.dims) :]:
            other *= n
        return size, other // size

    def _front(self, state: Tensor) -> Tensor:
        """Brings a state to [.., mixed, other]."""
        if len(self.dims) == 1:
            return state.unsqueeze(-1)
        return state if self.dims[0] == self.mixed else state.mT

    def _turned(self, x: Tensor) -> Tensor:
        """Brings [.., mixed, other] back to the state's order."""
        return x if len(self.dims) == 1 or self.dims[0] == self.mixed else x.mT


@cache
def _maps(op: Operator) -> tuple[Map, ...]:
    """Reads off a spec what tokens do to its states."""
    variant = read_text(op.spec.source, op.spec.name)
    levels: dict[str, tuple[int, bool]] = {}
    for line in variant.states:
        above = [levels[n.name][0] for n in reads(line.expr, "past", "now") if n.name != line.name]
        levels[line.name] = 1 + max(above, default=-1), not line.peak
    stages = sorted(set(levels.values()))
    made = []
    for line, state in zip(variant.states, canonicalise(variant).states, strict=True):
        dims = {d for g in state.decay for d in g.dims} | ({""} if state.decay else set())
        kept = frozenset({"", *line.dims} if line.peak else dims)
        made.append(Map(stages.index(levels[line.name]), line.dims, kept, _mixed(line), line.peak))
    return tuple(made)


def _mixed(line: StateLine) -> str:
    """Returns the dim over which a state's own past is read into its line, "" where it is not."""
    for n in walk(line.expr):
        if n.op == "contract":
            past = [any(leaf.name == line.name for leaf in reads(a, "past")) for a in n.args]
            if any(past):
                (dim,) = set(n.args[0].dims) & set(n.args[1].dims)
                return dim
    return ""


# ---- the exchange ---------------------------------------------------------------------------------------------------------------


def _before(op: Operator, tensors: Tensors, states: Tensors, rank: int) -> Tensors:
    """Returns the states that this rank's first run starts from: those before the sequence on the first rank, else zeros."""
    if rank == 0 and states:
        return states
    sizes = Sizes(op.spec)
    sizes.meet_all(tensors, ("B", "T"))
    first = tensors[0]
    kind = state_dtype(tensors)
    return tuple(first.new_full(sizes.shape(s, "B"), 0.0 if rank else s.init, dtype=kind) for s in op.spec.states)


@dataclass(frozen=True)
class _Exchange:
    """One call: the operator, the ranks and what tokens do to each state."""

    op: Operator
    group: Group | None
    maps: tuple[Map, ...]
    scale: float | None
    backend: str | None

    @property
    def stages(self) -> list[list[int]]:
        """Lists the states' places by stage."""
        return [[i for i, m in enumerate(self.maps) if m.stage == s] for s in range(1 + max(m.stage for m in self.maps))]

    def finals(self, tensors: Sequence[Tensor], states: Sequence[Tensor]) -> Tensors:
        """Runs this rank's tokens; returns the states behind them."""
        given = states[0] if len(states) == 1 else tuple(states)
        _, finals = self.op(*tensors, scale=self.scale, initial_state=given, output_final_state=True, backend=self.backend)
        return as_tuple(finals)

    def settle(self, stage: Sequence[int], tensors: Sequence[Tensor], states: list[Tensor]) -> None:
        """Puts in the peaks that come in: each rank runs from what the rank before sent last, until all send what they sent."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if rank:
            for i in stage:
                states[i] = torch.full_like(states[i], LOWEST)
        sent: list[Tensors] = []
        for _ in range(ranks - 1):
            with torch.no_grad():
                finals = self.finals(tensors, states) if rank < ranks - 1 else states
            before, sent = sent, self.gather([finals[i] for i in stage])
            if rank:
                for place, i in enumerate(stage):
                    states[i] = sent[rank - 1][place]
            if before and all(
                torch.equal(x, y) for row, old in zip(sent[:-1], before[:-1], strict=True) for x, y in zip(row, old, strict=True)
            ):
                break

    def gather(self, mine: Sequence[Tensor]) -> list[Tensors]:
        """Returns what every rank has, in the order of the ranks: tensors of the same shapes everywhere."""
        flat = torch.cat([x.reshape(-1) for x in mine])
        everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, flat, group=self.group)
        sizes = [x.numel() for x in mine]
        return [tuple(p.view(x.shape) for p, x in zip(row.split(sizes), mine, strict=True)) for row in everyone]


class _Incoming(torch.autograd.Function):
    """The states that come in from the ranks before, as a function of all ranks' tensors."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *given: Tensor) -> Tensors:
        """Exchanges what tokens do; ``given``: inputs, params, and the states of the first run."""
        maps, rank, ranks = exchange.maps, dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
        tensors, states = given[: -len(maps)], list(given[-len(maps) :])
        seen: dict[int, list[Tensor]] = {}
        for stage in exchange.stages:
            if maps[stage[0]].peak:
                exchange.settle(stage, tensors, states)
            parts, linear = [states[i] for i in stage], [maps[i] for i in stage]
            mine = [*parts, *(x.new_zeros(m.shape(x)) for m, x in zip(linear, parts, strict=True))]
            if rank < ranks - 1:  # somebody comes after
                with torch.enable_grad():
                    starts = [s.detach().requires_grad_() for s in states]
                    finals = exchange.finals([x.detach() for x in tensors], starts)
                    mine[: len(stage)] = [finals[i].detach() for i in stage]
                    if rank:
                        mine[len(stage) :] = [maps[i].of(starts[i], finals[i]) for i in stage]
            everyone = exchange.gather(mine)
            for place, i in enumerate(stage):
                seen[i] = [row[len(stage) + place] for row in everyone]
                if rank and not maps[i].peak:
                    state = everyone[0][place]
                    for j in range(1, rank):
                        state = maps[i].apply(seen[i][j], state) + everyone[j][place]
                    states[i] = state
        ctx.exchange = exchange
        ctx.save_for_backward(*tensors, *states, *(m for i in range(len(maps)) for m in seen[i][rank + 1 :]))
        return tuple(s if rank else s.clone() for s in states)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        """Exchanges the gradients of what came in; returns those of this rank's tensors by what it handed on."""
        exchange: _Exchange = ctx.exchange
        maps, rank, ranks = exchange.maps, dist.get_rank(exchange.group), dist.get_world_size(exchange.group)
        saved, n, after = ctx.saved_tensors, len(maps), ranks - rank - 1
        cut = len(saved) - n * (after + 1)
        wanted = [needed for needed in ctx.needs_input_grad[1 : 1 + cut]]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(saved[:cut], wanted, strict=True)]
        starts = [s.detach().requires_grad_() for s in saved[cut : cut + n]]
        later = [saved[cut + n + i * after : cut + n + (i + 1) * after] for i in range(n)]
        handed: list[Tensor] = [torch.zeros_like(s) for s in starts]
        last, stages = rank == ranks - 1, exchange.stages
        finals: Tensors = ()
        if not last:
            with torch.enable_grad():
                finals = exchange.finals(leaves, starts)
        for stage in reversed(stages):
            mine = [arrived[i] for i in stage]
            if stage is not stages[-1] and not last:
                through = torch.autograd.grad(finals, [starts[i] for i in stage], handed, retain_graph=True)
                mine = [x + d for x, d in zip(mine, through, strict=True)]
            everyone = exchange.gather(mine)
            for place, i in enumerate(stage):
                for j in range(ranks - 1, rank, -1):
                    handed[i] = everyone[j][place] + maps[i].adjoint(later[i][j - rank - 1], handed[i])
        first = [d for d in arrived] if rank == 0 else [None] * n
        if last:
            return (None, *(torch.zeros_like(x) if need else None for x, need in zip(leaves, wanted, strict=True)), *first)
        taken = [x for x in leaves if x.requires_grad] + (starts if rank == 0 else [])
        found = list(torch.autograd.grad(finals, taken, handed, allow_unused=True)) if taken else []
        back = [found.pop(0) if x.requires_grad else None for x in leaves]
        if rank == 0:
            first = [a if d is None else a + d for a, d in zip(arrived, found, strict=True)]
        return (None, *back, *first)


# ---- the tokens before a stretch ------------------------------------------------------------------------------------------------


def lengths(tokens: int, device: torch.device, group: Group | None = None) -> list[int]:
    """Returns how many tokens every rank has; waits for the device."""
    mine = torch.tensor([tokens], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [int(x) for x in everyone]


def tokens_before(x: Tensor, count: int, stretches: Sequence[int], group: Group | None = None) -> Tensor:
    """Returns the ``count`` tokens before this rank's x [B, T, size], zeros before the sequence; ``stretches``: every rank's T."""
    apply: Callable[..., Tensor] = _Before.apply
    return apply(x, count, tuple(stretches), group)


class _Before(torch.autograd.Function):
    """The tokens before a stretch, as a function of all ranks' tokens. Places are counted over the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, stretches: tuple[int, ...], group: Group | None) -> Tensor:
        """Gathers every rank's last tokens; takes those before its own."""
        ctx.settings, ctx.tokens = (count, stretches, group), x.shape[1]
        kept = min(count, x.shape[1])
        tail = torch.cat([x.new_zeros(x.shape[0], count - kept, x.shape[2]), x[:, x.shape[1] - kept :]], 1).contiguous()
        everyone = [torch.empty_like(tail) for _ in stretches]
        dist.all_gather(everyone, tail, group=group)
        rank, before = dist.get_rank(group), tail.new_zeros(tail.shape)
        for j in range(rank):
            here, there, n = _shared(count, stretches, j, rank)
            before[:, here : here + n] = everyone[j][:, count - stretches[j] + there :][:, :n]
        return before

    @staticmethod
    def backward(ctx: Any, d_before: Tensor) -> tuple[Tensor | None, ...]:
        """Gathers the gradients of what every rank took; sums those of its own tokens."""
        count, stretches, group = ctx.settings
        d_before = d_before.contiguous()
        everyone = [torch.empty_like(d_before) for _ in stretches]
        dist.all_gather(everyone, d_before, group=group)
        rank, d_x = dist.get_rank(group), d_before.new_zeros(d_before.shape[0], ctx.tokens, d_before.shape[2])
        for j in range(rank + 1, len(stretches)):
            here, there, n = _shared(count, stretches, rank, j)
            d_x[:, there : there + n] += everyone[j][:, here : here + n]
        return d_x, None, None, None


def _shared(count: int, stretches: Sequence[int], source: int, taker: int) -> tuple[int, int, int]:
    """Returns where tokens of ``source`` stand among the ``count`` before ``taker``, where in their own stretch, and how many."""
    start, end = sum(stretches[:source]), sum(stretches[: source + 1])
    low, high = max(start, sum(stretches[:taker]) - count), min(end, sum(stretches[:taker]))
    return low - (sum(stretches[:taker]) - count), low - start, max(high - low, 0)
