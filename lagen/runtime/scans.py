"""States that have no matmul form, token by token in plain torch: peaks, and matrix states whose decay is dense.

Stands alone (torch and the standard library): it is copied into every built package as ``_scans.py``. Layout as in chunked: a token
value is [B, T, H, G, *dims], dims in order of their names; a state [B, H, G, *dims], dims in order of its storage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lagen.runtime.chunked import FLOOR, Value, constant, sum_to


class Peak:
    """A running maximum m_t = max(m_{t-1} + shift_t, write_t) over T tokens: a scan in the max-plus sense, in log2(T) rounds."""

    def __init__(
        self, dims: tuple[str, ...], shape: tuple[int, ...], tokens: int, shift: Value, write: Value, edge: Tensor | None, like: Tensor
    ) -> None:
        self.shape = shape
        full = (shape[0], tokens, *shape[1:])
        first = like.new_zeros(shape) if edge is None else edge.to(like.dtype).expand(shape)
        moved = constant(shift, like).expand(full).clone()
        most = constant(write, like).expand(full).clone()
        reach = 1
        while reach < tokens:  # m over the last `reach` tokens becomes m over the last 2 * reach
            earlier = most[:, :-reach] + moved[:, reach:]
            most = torch.cat((most[:, :reach], torch.maximum(earlier, most[:, reach:])), 1)
            moved = torch.cat((moved[:, :reach], moved[:, :-reach] + moved[:, reach:]), 1)
            reach *= 2
        self.now = torch.maximum(first.unsqueeze(1) + moved, most)
        self.previous = torch.cat((first.unsqueeze(1), self.now), 1)[:, :tokens]
        self.final = self.now[:, -1] if tokens else first

    def read(self, vector: Value, over: str, at: str) -> Tensor:
        """Returns each token's m, or the one before it, times a number; [B, T, H, G, *dims]."""
        return {"now": self.now, "previous": self.previous}[at] * vector


class Dense:
    """A matrix state with a log-decay for each of its elements; keeps T * its size numbers.

    ``writes`` as in chunked.State; ``decay`` [B, T, H, G, two dims]; ``edge`` is the state before the first token, or after the last
    one where ``reverse``.
    """

    def __init__(
        self,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        tokens: int,
        writes: Sequence[tuple[Value, Value] | tuple[Value, Value, bool]],
        decay: Tensor,
        edge: Tensor | None,
        like: Tensor,
        reverse: bool = False,
    ) -> None:
        self.dims, self.shape, self.reverse = dims, shape, reverse
        self.swapped = list(dims) != sorted(dims)
        full = (shape[0], tokens, *shape[1:])
        decay = decay.transpose(-1, -2) if self.swapped else decay
        self.factor = decay.clamp(FLOOR, 0.0).exp().expand(*full[:2], *decay.shape[2:])
        before = self._written([w for w in writes if reverse and (len(w) < 3 or w[2])], full, like)
        after = self._written([w for w in writes if not (reverse and (len(w) < 3 or w[2]))], full, like)
        state = like.new_zeros(shape) if edge is None else edge.to(like.dtype).expand(shape)
        met: list[Tensor] = []
        for t in range(tokens - 1, -1, -1) if reverse else range(tokens):
            met.append(state)
            state = (state if before is None else state + before[:, t]) * self.factor[:, t]
            state = state if after is None else state + after[:, t]
        self.final = state
        self.met = torch.stack(met[::-1] if reverse else met, 1) if met else like.new_zeros(full)
        self.after = after

    @staticmethod
    def _written(writes: Sequence[Sequence[Value]], full: tuple[int, ...], like: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for w in writes:
            part = constant(w[0], like)[..., :, None] * constant(w[1], like)[..., None, :]
            total = part if total is None else total + part
        return None if total is None else sum_to(total, full, like)

    def read(self, vector: Value, over: str, at: str) -> Tensor:
        """Contracts the dim ``over`` with each token's vector, or multiplies by a number where it is ""; [B, T, H, G, *what is left]."""
        state = self.met
        if not self.reverse and at != "previous":
            state = state * self.factor
            if at == "now" and self.after is not None:
                state = state + self.after
        if not over:
            return (state.transpose(-1, -2) if self.swapped else state) * vector
        x = constant(vector, state)
        first = over == self.dims[0]
        return (state * (x[..., :, None] if first else x[..., None, :])).sum(-2 if first else -1)
