"""Linear states over whole chunks in plain torch: what the generated torch functions are written with.

Stands alone (torch and the standard library): it is copied into every built package as ``_chunked.py``.

Layout. A token value is [B, T, H, G, *dims], a param value [H, G, *dims], a state [B, H, G, *dims]; the head axes are HV = H * G split,
with G = 1 for what lives on H and H = G = 1 for what has no head, so plain broadcasting repeats a head in neighbours.
Inside a state everything is cut into chunks [B, H, G, N, C, D], a missing dim having size one, so that a vector state is a K x 1
matrix and a number a 1 x 1 matrix.

Numerics. Every exponent that reaches exp is <= 0: a decay on a channel is applied through dyadic anchors (the pairs of a block's
upper and lower half meet at the middle, one product per level), a decay without a channel through pairwise differences. Sums of
log-decays are float64 and their differences are rounded, so strong gates keep their digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CHUNK = 64  # tokens per chunk; a power of two
FLOOR = -104.0  # exp(-104) is 0 in float32: a hard reset (-inf) is legal and stays finite
Value = Tensor | float
Write = tuple[Tensor, Tensor, bool]

# ---- layout ---------------------------------------------------------------------------------------------------------------------


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Returns float64 where a tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def lift(x: Tensor, axis: int, head: str, heads: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Casts ``x`` and splits its head axis (at ``axis``; absent where head is "") into [H, G]."""
    x = x.to(dtype)
    if head == "HV":
        return _split(x, axis, *(heads or ()))
    return x.unsqueeze(axis + 1) if head == "H" else x.unsqueeze(axis).unsqueeze(axis)


def _split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """Views one axis as several."""
    return x.unflatten(axis, sizes)  # type: ignore[no-any-return]


def share(x: Tensor, axis: int, heads: tuple[int, int]) -> Tensor:
    """Deals a cotangent out to all ``heads`` that its head serves, in equal parts: what comes of the parts adds up again."""
    wide = x.expand(*x.shape[:axis], *heads, *x.shape[axis + 2 :])
    return wide * (x.shape[axis] * x.shape[axis + 1] / max(heads[0] * heads[1], 1))


def join(x: Tensor, axis: int, head: str) -> Tensor:
    """Joins the head axes [H, G] at ``axis`` to what the tensor outside has."""
    if head == "HV":
        return x.flatten(axis, axis + 1)
    return x.squeeze(axis + 1) if head == "H" else x.squeeze(axis + 1).squeeze(axis)


def lower(x: Value, shape: Sequence[int], axis: int, head: str, like: Tensor, swap: bool = False) -> Tensor:
    """Brings a value to ``shape`` [.., H, G, *dims] and joins its head axes: a new tensor in the dtype of ``like``.

    ``swap`` exchanges the last two axes, where the tensor outside stores its dims the other way.
    """
    x = join(sum_to(x, shape, like), axis, head)
    x = x.transpose(-1, -2) if swap else x
    return torch.empty(x.shape, dtype=like.dtype, device=like.device).copy_(x)


def sum_to(x: Value, shape: Sequence[int], like: Tensor) -> Tensor:
    """Brings ``x`` to ``shape``: repeats it where it has size one or no axis, sums it where ``shape`` has size one."""
    if not isinstance(x, Tensor):
        return like.new_full(tuple(shape), x)
    x = x.reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))
    excess = [i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1]
    return (x.sum(excess, keepdim=True) if excess else x).expand(tuple(shape))


def sum_tokens(x: Value, tokens: tuple[int, int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Sums a value over batch and time (``tokens`` = B, T) to a param's ``shape`` [H, G, *dims]."""
    if not isinstance(x, Tensor):
        return like.new_full(tuple(shape), x * tokens[0] * tokens[1])
    x = x.reshape((1,) * (len(shape) + 2 - x.dim()) + tuple(x.shape))
    x = x.expand(*tokens, *x.shape[2:])
    return sum_to(x.sum((0, 1)), shape, like)


def repeat(x: Value, size: int, axis: int = -1) -> Value:
    """Repeats a value over a dim it lacks; a number stays one."""
    if not isinstance(x, Tensor):
        return x
    x = x.unsqueeze(axis)
    return x.expand(*x.shape[:axis], size, *x.shape[axis % x.dim() + 1 :])


def lead(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Takes every token's value [B, T, ..] from the token after; a sequence's last token keeps its own."""
    after = torch.cat((x[:, 1:], x[:, -1:]), 1)
    if cu_seqlens is None:
        return after
    inside = follows(x.shape[1], x, cu_seqlens).reshape(1, -1, *[1] * (x.dim() - 2))
    return torch.where(inside != 0, after, x)


def follows(tokens: int, like: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Makes 1 for each token that another one of its sequence follows and 0 for the last: [1, T, 1, 1]."""
    out = torch.ones(1, tokens, 1, 1, dtype=like.dtype, device=like.device)
    out[:, -1:] = 0.0
    if cu_seqlens is not None and tokens:
        last = cu_seqlens[1:] - 1  # of an empty sequence: the one before, or where there is none, the last of all
        out[:, torch.where(last < 0, tokens - 1, last).long()] = 0.0
    return out


def constant(x: Value, like: Tensor) -> Tensor:
    """Makes a number a tensor for functions that take none."""
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)


# ---- row functions --------------------------------------------------------------------------------------------------------------


def l2norm(x: Tensor, eps: float) -> Tensor:
    """Computes x / sqrt(sum x**2 + eps) over the last axis."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """Computes x / sqrt(mean x**2 + eps) over the last axis."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Joins two vectors on the last axis."""
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat((a.expand(*lead, a.shape[-1]), b.expand(*lead, b.shape[-1])), -1)


def _pairs(n: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index pairs i < j of n numbers, in rows of i."""
    at = torch.triu_indices(n, n, 1, device=x.device)
    return at[0], at[1]


def quad(x: Tensor) -> Tensor:
    """Computes [x_i**2, sqrt(2) x_i x_j (i < j)], so that quad(a) @ quad(b) = (a @ b)**2."""
    i, j = _pairs(x.shape[-1], x)
    return torch.cat((x * x, 2**0.5 * x[..., i] * x[..., j]), -1)


def taylor2(x: Tensor) -> Tensor:
    """Computes [1, x_i, x_i**2 / sqrt(2), x_i x_j (i < j)], so that taylor2(a) @ taylor2(b) = 1 + a @ b + (a @ b)**2 / 2."""
    i, j = _pairs(x.shape[-1], x)
    return torch.cat((torch.ones_like(x[..., :1]), x, x * x * 0.5**0.5, x[..., i] * x[..., j]), -1)


def _unpair(d: Tensor, x: Tensor) -> Tensor:
    """Computes the adjoint of x_i x_j (i < j)."""
    n = x.shape[-1]
    i, j = _pairs(n, x)
    matrix = d.new_zeros(*d.shape[:-1], n, n)
    matrix[..., i, j] = d
    return ((matrix + matrix.transpose(-1, -2)) @ x[..., None]).squeeze(-1)


def quad_adjoint(d: Tensor, x: Tensor) -> Tensor:
    """Computes the cotangent of x from that of quad(x)."""
    n = x.shape[-1]
    return 2.0 * x * d[..., :n] + 2**0.5 * _unpair(d[..., n:], x)


def taylor2_adjoint(d: Tensor, x: Tensor) -> Tensor:
    """Computes the cotangent of x from that of taylor2(x)."""
    n = x.shape[-1]
    return d[..., 1 : 1 + n] + 2**0.5 * x * d[..., 1 + n : 1 + 2 * n] + _unpair(d[..., 1 + 2 * n :], x)


# ---- one token ------------------------------------------------------------------------------------------------------------------


def decayed(state: Tensor, dims: tuple[str, ...], decay: Mapping[str, Value]) -> Tensor:
    """Computes exp(g) * S of one token; ``decay`` as in State."""
    for dim, g in decay.items():
        factor = constant(g, state).clamp(FLOOR, 0.0).exp()
        if dim == "*":  # a number for every element, its dims in order of their names
            state = state * (factor if list(dims) == sorted(dims) else factor.transpose(-1, -2))
        else:
            state = state * _spread(factor, dims, dim)
    return state


def written(state: Tensor, dims: tuple[str, ...], writes: Sequence[tuple[Value, Value]]) -> Tensor:
    """Adds the writes (row, col) of one token to a state."""
    row, col = (*dims, "", "")[:2]
    for a, b in writes:
        state = state + _spread(constant(a, state), dims, row) * _spread(constant(b, state), dims, col)
    return state


def contracted(state: Tensor, dims: tuple[str, ...], vector: Value, over: str) -> Tensor:
    """Contracts the dim ``over`` ("" for none) of one token's state with a vector."""
    product = state * _spread(constant(vector, state), dims, over)
    return product.sum(dims.index(over) - len(dims)) if over else product


def _spread(x: Tensor, dims: tuple[str, ...], dim: str) -> Tensor:
    """Gives a value on ``dim`` ("" for none) an axis for each of ``dims``."""
    for missing in (d for d in dims if d != dim):
        x = x.unsqueeze(-1 if missing != dims[0] or not dim else -2)
    return x


# ---- states ---------------------------------------------------------------------------------------------------------------------


class State:
    """A linear state over T tokens, cut into chunks, with the carries between them.

    shape: [B, H, G, *dims] of the state; ``dims`` names its dims, at most two. ``writes``: (row, col) or, of a reverse state,
    (row, col, decayed). ``decay``: log-decays by the name of their dim, "" for one of no dim. ``edge``: the state before the first
    token, or after the last one where ``reverse``; None means zeros. ``solves``: of each write whose one side depends on the state's own
    past, by its index, the reads [(vector, at)] over the dim ``over`` that are added to what stands on that side.
    """

    def __init__(
        self,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        tokens: int,
        writes: Sequence[tuple[Value, Value] | tuple[Value, Value, bool]],
        decay: Mapping[str, Value],
        edge: Tensor | None,
        like: Tensor,
        reverse: bool = False,
        causal: bool = True,
        over: str = "",
        solves: Mapping[int, Sequence[tuple[Value, str]]] | None = None,
    ) -> None:
        self.dims, self.shape, self.tokens, self.like, self.reverse, self.causal = dims, shape, tokens, like, reverse, causal
        self.size = CHUNK
        while self.size > 1 and self.size // 2 >= tokens:
            self.size //= 2
        self.count = -(-tokens // self.size)
        row, col = (*dims, "", "")[:2]
        self.writes = [(self._cut(w[0], row), self._cut(w[1], col), w[2] if len(w) == 3 else True) for w in writes]
        # by side (0: first dim, 1: second dim, 2: none): inclusive and exclusive sums of log-decays inside each chunk
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        for dim, g in decay.items():
            g = self._cut(g, dim).double().clamp(FLOOR, 0.0)
            b = g.cumsum(-2)
            self.sums[2 if dim == "" else dims.index(dim)] = (b, b - g)
        full = (*shape, 1, 1)[:5]
        self.given = edge is not None
        self.edge = self.like.new_zeros(full) if edge is None else edge.to(like.dtype).reshape(full)
        self.system = System(self, over, solves) if solves else None
        self.carries, self.end = self._scan()

    def _cut(self, x: Value, dim: str) -> Tensor:
        """Cuts a token value into [B, H, G, N, C, D]; pads the tail with zeros, a missing dim with size one."""
        x = constant(x, self.like)
        if not dim:
            x = x.unsqueeze(-1)
        x = x.reshape((1,) * (5 - x.dim()) + tuple(x.shape))
        x = x.expand(-1, self.tokens, -1, -1, -1)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.count * self.size - self.tokens))
        return _split(x, 1, self.count, self.size).permute(0, 3, 4, 1, 2, 5).contiguous()

    def _join(self, x: Tensor) -> Tensor:
        """Returns [B, H, G, N, C, D] as [B, T, H, G, D]."""
        return x.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)[:, : self.tokens]

    def _exp(self, x: Tensor) -> Tensor:
        return x.to(self.like.dtype).exp()

    # -- carries --

    def _gathered(self, writes: Sequence[Write], chunks: slice = slice(None)) -> Tensor | None:
        """Returns what ``writes`` add to the carry in each of ``chunks``, [B, H, G, N, K, V]; None where there are none."""
        total: Tensor | None = None
        for row, col, decayed in writes:
            sides = [row[:, :, :, chunks], col[:, :, :, chunks]]
            for side, (b, before) in self.sums.items():
                b, before = b[:, :, :, chunks], before[:, :, :, chunks]
                at = (b if decayed else before) if self.reverse else b[..., -1:, :] - b
                sides[side % 2] = sides[side % 2] * self._exp(at)
            part = sides[0].transpose(-1, -2) @ sides[1]
            total = part if total is None else total + part
        return None if total is None else sum_to(total, (*self.edge.shape[:3], total.shape[3], *self.edge.shape[3:]), self.like)

    def _whole(self, chunks: slice = slice(None)) -> Tensor | None:
        """Returns the decay over each of ``chunks``, [B, H, G, N, K or 1, V or 1]; None where there is no decay."""
        decay: Tensor | None = None
        for side, (b, _) in self.sums.items():
            last = self._exp(b[:, :, :, chunks, -1])
            last = (last[..., None], last[..., None, :], last[..., None])[side]
            decay = last if decay is None else decay * last
        return decay

    def _scan(self) -> tuple[Tensor, Tensor]:
        """Returns the state each chunk meets, [B, H, G, N, K, V], and the state behind the last chunk; solves what is to be solved."""
        solved = () if self.system is None else self.system.writes
        gathered, decay = self._gathered([w for i, w in enumerate(self.writes) if i not in solved]), self._whole()
        state, met = self.edge, []
        if not self.causal:
            assert gathered is not None, "a state without writes"
            return gathered[:, :, :, :0], state + gathered.sum(3)
        for n in range(self.count - 1, -1, -1) if self.reverse else range(self.count):
            met.append(state)
            kept = state if decay is None else state * decay[:, :, :, n]
            state = kept if gathered is None else kept + gathered[:, :, :, n]
            if self.system is not None:
                self.system.solve(met[-1], slice(n, n + 1))
                written = self._gathered([self.writes[i] for i in solved], slice(n, n + 1))
                assert written is not None
                state = state + written[:, :, :, 0]
        return torch.stack(met[::-1] if self.reverse else met, 3) if met else self.edge.unsqueeze(3)[:, :, :, :0], state

    def solved(self, index: int) -> Tensor:
        """Returns what was solved for the write ``index``, [B, T, H, G, D]."""
        assert self.system is not None, "a state that solves nothing"
        return self._join(self.writes[index][:2][self.system.kept])

    @property
    def final(self) -> Tensor:
        """Returns the state behind the last token, [B, H, G, *dims]; of a reverse state the one before the first."""
        return self.end.reshape(self.shape)

    @property
    def decayed_final(self) -> Tensor:
        """Returns the final state without the last token's own write: exp(g_T) * S_{T-1}."""
        if self.tokens == 0:
            return torch.zeros_like(self.final)
        last, at = self.count - 1, (self.tokens - 1) % self.size
        own = torch.ones(self.size, 1, dtype=self.like.dtype, device=self.like.device)
        own[at] = 0.0
        chunk = slice(last, last + 1)
        gathered, decay = self._gathered([(row * own, col, decayed) for row, col, decayed in self.writes], chunk), self._whole(chunk)
        kept = self.carries[:, :, :, last] if decay is None else self.carries[:, :, :, last] * decay[:, :, :, 0]
        return (kept if gathered is None else kept + gathered[:, :, :, 0]).reshape(self.shape)

    def closing(self, back: State, keep: str) -> Value:
        """Returns <dS_T, exp(g_T) * S_{T-1}> summed to the dim ``keep`` ("" for none), where ``back`` starts from a given dS_T."""
        if not back.given:
            return 0.0
        product = back.edge.reshape(back.shape) * self.decayed_final
        axes = [i - len(self.dims) for i, d in enumerate(self.dims) if d != keep]
        return (product.sum(axes) if axes else product).unsqueeze(1)

    # -- readouts --

    def read(self, vector: Value, over: str, at: str) -> Tensor:
        """Contracts the dim ``over`` ("" for none) with each token's vector; returns [B, T, H, G, *the other dim].

        at: now, decayed (without the token's own write), previous (the undecayed past), later and since (of a
        reverse state: without and with the token's own write; since wants no decay), all.
        """
        side = self.dims.index(over) if over else len(self.dims) % 2
        x = self._cut(vector, over)
        kept = 1 - side
        if at == "all":
            out = x @ self._face(self.end, side).unsqueeze(3)
        elif self.count == 0:
            out = x.new_zeros(*x.shape[:-1], self.edge.shape[3 + kept])
        else:
            out = self._carried(x, side, at, self.carries)
            for row, col, decayed in self.writes:
                read, left = (row, col)[side], (row, col)[kept]
                out = out + self._mix(self._gram(x, read, side, at, decayed), left, kept, at, decayed)
        joined = self._join(out)
        return joined if len(self.dims) - bool(over) else joined.squeeze(-1)

    def _face(self, state: Tensor, side: int) -> Tensor:
        """Turns a state so that the dim that is read stands first."""
        return state.transpose(-1, -2) if side else state

    def _coordinates(self, side: int, at: str, decayed: bool, chunks: slice = slice(None)) -> tuple[Tensor, Tensor] | None:
        """Returns where reads and writes stand on the sums of a decay: reads of the undecayed past one token earlier."""
        if side not in self.sums:
            return None
        b, before = (x[:, :, :, chunks] for x in self.sums[side])
        return (before if at == "previous" else b), (b if decayed else before)

    def _carried(self, x: Tensor, side: int, at: str, carries: Tensor, chunks: slice = slice(None)) -> Tensor:
        """Reads the states ``carries`` that ``chunks`` meet."""
        factors = {}
        for s in self.sums:
            here = self._coordinates(s, at, True, chunks)
            assert here is not None
            factors[s] = self._exp(here[1][..., -1:, :] - here[0] if self.reverse else here[0])
        for s in (2, side):
            x = x * factors[s] if s in factors else x
        out = x @ self._face(carries, side)
        return out * factors[1 - side] if 1 - side in factors else out

    def _gram(self, x: Tensor, y: Tensor, side: int, at: str, decayed: bool) -> Tensor:
        """Returns how much each token reads of each write in its chunk, [.., C, C], by the decays on no dim and on the read one."""
        around = self._coordinates(side, at, decayed)
        if around is None:
            weights = x @ y.transpose(-1, -2)
        else:
            lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], around[0].shape[:-2])
            weights = x.new_zeros(*lead, self.size, self.size)
            for half in self._halves():
                a, b = self._meet(x, y, around, half)
                self._block(weights, half).copy_(a @ b.transpose(-1, -2))
            if at == "now":
                weights.diagonal(dim1=-1, dim2=-2).copy_((x * y).sum(-1))
        plain = self._coordinates(2, at, decayed)
        if plain is None:
            return weights.triu(0 if at == "since" else 1) if self.reverse else weights.tril(0 if at == "now" else -1)
        reader, writer = plain[0], plain[1].transpose(-1, -2)
        between = writer - reader if self.reverse else reader - writer
        unseen = torch.ones(self.size, self.size, dtype=torch.bool, device=x.device)
        unseen = unseen.tril() if self.reverse else unseen.triu(1 if at == "now" else 0)
        return weights * self._exp(between.masked_fill(unseen, -torch.inf))

    def _mix(self, weights: Tensor, y: Tensor, side: int, at: str, decayed: bool, chunks: slice = slice(None)) -> Tensor:
        """Adds up the writes by their weights, each decayed on the kept dim from its token to the reader's."""
        around = self._coordinates(side, at, decayed, chunks)
        if around is None:
            return weights @ y
        lead = torch.broadcast_shapes(weights.shape[:-2], y.shape[:-2], around[0].shape[:-2])
        own = weights.diagonal(dim1=-1, dim2=-2)[..., None] * y
        out = own.expand(*lead, *own.shape[-2:]).clone(memory_format=torch.contiguous_format)
        ones = y.new_ones(self.size, 1)
        for half in self._halves():
            a, b = self._meet(ones, y, around, half)
            self._half(out, half, self._reader).add_(a * (self._block(weights, half) @ b))
        return out

    # -- dyadic anchors: blocks of 2 * half tokens; the later half reads the earlier one (of a reverse state: the other way) --

    @property
    def _reader(self) -> int:
        return 0 if self.reverse else 1

    def _halves(self) -> list[int]:
        return [1 << i for i in range(self.size.bit_length() - 1)]

    def _half(self, x: Tensor, half: int, which: int) -> Tensor:
        """Views one half of every block of [.., C, D]: [.., blocks, half, D]."""
        return _split(x, -2, -1, 2, half)[..., which, :, :]

    def _block(self, weights: Tensor, half: int) -> Tensor:
        """Views the weights between the halves of every block of [.., C, C]: [.., blocks, half readers, half writers]."""
        grid = _split(_split(weights, -1, -1, 2, half), -4, -1, 2, half)  # [.., blocks, 2, half, blocks, 2, half]
        return grid[..., self._reader, :, :, 1 - self._reader, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    def _meet(self, x: Tensor, y: Tensor, around: tuple[Tensor, Tensor], half: int) -> tuple[Tensor, Tensor]:
        """Decays readers x and writers y of every block to its middle; all exponents are <= 0."""
        inclusive = around[0] if self.reverse else around[1]
        middle = self._half(inclusive, half, 0)[..., -1:, :]
        at_x, at_y = self._half(around[0], half, self._reader), self._half(around[1], half, 1 - self._reader)
        to_x, to_y = (middle - at_x, at_y - middle) if self.reverse else (at_x - middle, middle - at_y)
        x, y = self._half(x, half, self._reader), self._half(y, half, 1 - self._reader)
        return x * self._exp(to_x), y * self._exp(to_y)


class System:
    """What a state solves: of some writes the side u that depends on the state's own past.

    Over the n writes and C tokens of a chunk, in the order of the tokens, u = (I - A)^-1 (base + reads of the carry and of the other
    writes), A being what each token reads of the u of others: strictly triangular. A decay on the dim that the reads keep stands
    between a token and what it is solved from, and telescopes along every path of A, so that (I - A)^-1 is taken without it.
    """

    def __init__(self, state: State, over: str, solves: Mapping[int, Sequence[tuple[Value, str]]]) -> None:
        self.state, self.writes = state, tuple(solves)
        self.side = side = state.dims.index(over)
        self.kept = kept = 1 - side
        self.reads = [[(state._cut(vector, over), at) for vector, at in reads] for reads in solves.values()]
        self.base = []
        rows = []
        for index, reads in zip(self.writes, self.reads, strict=True):
            base = state.writes[index][:2][kept]
            for i, w in enumerate(state.writes):
                if i not in self.writes:
                    for x, at in reads:
                        base = base + state._mix(state._gram(x, w[:2][side], side, at, w[2]), w[:2][kept], kept, at, w[2])
            self.base.append(base)
            others = [state.writes[i] for i in self.writes]
            rows.append([sum_all([state._gram(x, w[:2][side], side, at, w[2]) for x, at in reads]) for w in others])
        for index in self.writes:
            row, col, decayed = state.writes[index]
            u = state.like.new_zeros(*state.edge.shape[:3], state.count, state.size, state.edge.shape[3 + kept])
            state.writes[index] = (u, col, decayed) if kept == 0 else (row, u, decayed)
        lead = torch.broadcast_shapes(*(a.shape for row in rows for a in row))
        a = torch.stack([torch.stack([x.expand(lead) for x in row], -1) for row in rows], -3)  # [.., C, n, C, n]
        a = a.flatten(-4, -3).flatten(-2, -1).to(state.like.dtype)  # autocast may have narrowed it
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        self.inverse = torch.linalg.solve_triangular(eye - a, eye.expand_as(a), upper=state.reverse, unitriangular=True)

    def solve(self, carry: Tensor, chunks: slice) -> None:
        """Solves one chunk, which meets ``carry``, and puts u into the state's writes."""
        state, n = self.state, len(self.writes)
        carries = carry.unsqueeze(3)
        known = [base[:, :, :, chunks] for base in self.base]
        for i, reads in enumerate(self.reads):
            known[i] = sum_all([known[i], *(state._carried(x[:, :, :, chunks], self.side, at, carries, chunks) for x, at in reads)])
        inverse = self.inverse[:, :, :, chunks]
        at = "later" if state.reverse else "now"
        for i, index in enumerate(self.writes):
            parts = [state._mix(inverse[..., i::n, j::n], x, self.kept, at, True, chunks) for j, x in enumerate(known)]
            state.writes[index][:2][self.kept][:, :, :, chunks] = sum_all(parts)


def sum_all(parts: Sequence[Tensor]) -> Tensor:
    """Adds tensors up."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def suffix(x: Value, y: Value, closings: Sequence[Value], shape: Sequence[int], like: Tensor) -> Tensor:
    """Computes the gradient of a log-decay, [B, T, H, G, *dims] = ``shape``: sum_{s >= t} x_s - sum_{t <= s < T} y_s + closing.

    x: what reads give it, y: what writes give it, per token; closings: of the final states.
    """
    reads, writes = (sum_to(z, shape, like).double() for z in (x, y))
    total = torch.cat((reads[:, :-1] - writes[:, :-1], reads[:, -1:]), 1).flip(1).cumsum(1).flip(1)
    for closing in closings:
        total = total + sum_to(closing, (shape[0], 1, *shape[2:]), like)
    return total.to(like.dtype)
