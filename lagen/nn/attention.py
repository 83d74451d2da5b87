"""LinearAttention: the token mixer of a model, for any spec: projections, the operator, norm, gate and the way back.

Everything is derived from the spec's tensors, their dims and what it assumes of them: nn/feed has the rules for inputs, nn/start those for
params. No rule asks which variant it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lagen import parallel
from lagen.ir.variant import Variant
from lagen.nn.cache import Cache, LayerCache
from lagen.nn.convolution import ShortConvolution
from lagen.nn.feed import Feed, is_gate, is_position, projection
from lagen.nn.start import Bound, Start, bound_of, start_of
from lagen.runtime.dispatch import as_tuple
from lagen.runtime.load import load
from lagen.runtime.operator import Operator
from lagen.runtime.signature import OperatorSpec, measure
from lagen.spec.read import read_text

Reach = Callable[[Tensor, int], Tensor]  # from what a convolution takes, and how many tokens back: those tokens

HEADLESS = 16
"""Size of a dim that nobody gave, on a spec without heads and apart from its outputs' (Mamba's N)."""


class LinearAttention(nn.Module):
    """Mixes tokens by the operator of a spec: x [B, T, dim] to [B, T, dim].

    ``spec``: a file, the name of a shipped spec, a Variant or an Operator. ``heads``: the size of H; HV is the same, or a multiple given
    as ``HV=``. Sizes of other dims are given by name, ``K=64, V=128``; a dim that is not is ``dim`` over its heads.

    ``convolution``: the width of a causal convolution over every vector input, 0 for none. ``norm``: RMS norm of every head's output;
    ``gate``: silu of a projection on it. ``layer``: the layer's place in the model, under which a Cache holds its states.
    ``length``: the longest sequence, for a spec that asks for positions. ``inputs``: modules of your own in place of the
    projections, by input ([.., dim] to [.., *head, *dims]). ``init``: starts of your own, by param: a function of a tensor of the
    param's shape to its first values. A param that the spec bounds is trained in front of the map into its interval.

    Raises ValueError for sizes, inputs or params that the spec does not have.
    """

    def __init__(
        self,
        spec: str | Path | Variant | Operator,
        dim: int,
        heads: int = 1,
        *,
        convolution: int = 0,
        norm: bool = True,
        gate: bool = True,
        layer: int = 0,
        length: int = 2048,
        eps: float = 1e-5,
        inputs: Mapping[str, nn.Module] | None = None,
        init: Mapping[str, Start] | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.operator = load(spec) if isinstance(spec, (str, Path, Variant)) else spec  # a built package's has a class of its own
        self.variant = read_text(self.operator.spec.source, self.operator.spec.name)
        self.dim, self.layer, self.length, self.eps = dim, layer, length, eps
        described, variant = self.operator.spec, self.variant
        self.sizes = sizes_of(described, dim, heads, sizes)
        _know("inputs", inputs, [a.name for a in described.inputs], described.name)
        _know("init", init, [a.name for a in described.params], described.name)
        if convolution and not described.causal:
            raise ValueError(f"{described.name} is not causal, and the short convolution is: leave convolution at 0")

        shapes = {a.name: tuple(self.sizes[d] for d in a.shape()) for a in described.inputs + described.params}
        self.feeds = nn.ModuleDict()
        self.convolutions = nn.ModuleDict()
        for t in variant.inputs:
            if inputs and t.name in inputs:
                self.feeds[t.name] = inputs[t.name]
            elif not is_position(variant, t):
                self.feeds[t.name] = Feed(variant, t, shapes[t.name], dim)
                if convolution and not is_gate(variant, t):
                    self.convolutions[t.name] = ShortConvolution(math.prod(shapes[t.name]), convolution)
        self.bounds: dict[str, Bound] = {}
        self.params = nn.ParameterDict()
        for t in variant.params:
            start = (init or {}).get(t.name) or start_of(variant, t)
            self.bounds[t.name] = bound_of(variant, t.name)
            self.params[t.name] = nn.Parameter(self.bounds[t.name].invert(start(torch.empty(shapes[t.name])).clone()))
        ends = {o.name: [self.sizes[d] for d in o.shape()] for o in described.outputs}
        self.norms = nn.ModuleDict({name: nn.RMSNorm(end[-1], eps=eps) for name, end in ends.items() if norm and end})
        self.widths = {name: math.prod(end) for name, end in ends.items()}
        total = sum(self.widths.values())
        self.gate = projection(dim, total) if gate else None
        self.write = projection(total, dim)

    def extra_repr(self) -> str:
        """Returns what is printed in the module's parentheses."""
        named = {d for a in self.operator.spec.inputs + self.operator.spec.params for d in a.shape()}
        return ", ".join([self.operator.spec.name, f"dim={self.dim}", *(f"{d}={n}" for d, n in self.sizes.items() if d in named)])

    # -- calls --

    def forward(
        self, x: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Mixes whole sequences; with a cache, those that follow on what it holds, and moves it on.

        ``cu_seqlens`` [N + 1]: x is [1, T, dim], N sequences side by side, and a cache holds N of everything. One token after others
        goes by the decode step where no gradient is asked for. ``group``: x is this rank's stretch of sequences that the ranks hold in
        order (lagen.parallel); parameters' gradients are this rank's share.
        """
        if group is not None:
            return self._stretch(x, group, alone=cache is None and cu_seqlens is None)
        held = self._held(cache)
        if held is not None and held.states is not None and x.shape[1] == 1 and cu_seqlens is None and not self._wants_gradient(x):
            return self._token(x[:, 0], held)[:, None]
        more: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        tensors = self._tensors(x, held, cu_seqlens)
        if held is not None:
            more |= {"initial_state": held.states, "output_final_state": True}
        made: Any = self.operator(*tensors, **more)
        if held is None:
            return self._join(x, as_tuple(made))
        outputs, states = made
        held.states = as_tuple(states)
        held.seen += x.shape[1]
        return self._join(x, as_tuple(outputs))

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Mixes one token [B, dim], writing the cache in place; raises ArgumentError where a gradient is asked for."""
        held = self._held(cache)
        assert held is not None
        return self._token(x, held)

    def _stretch(self, x: Tensor, group: dist.ProcessGroup, alone: bool) -> Tensor:
        """Mixes this rank's stretch of sequences: the windows and states of the ranks before come in as a cache that nobody keeps."""
        if not alone:
            raise ValueError(f"{self.operator.spec.name}: a group of ranks goes without cache and cu_seqlens")
        stretches = parallel.lengths(x.shape[1], x.device, group)
        held = LayerCache(seen=sum(stretches[: dist.get_rank(group)]))
        tensors = self._tensors(x, held, None, partial(parallel.tokens_before, stretches=stretches, group=group))
        return self._join(x, as_tuple(parallel.context_parallel(self.operator, *tensors, group=group)))

    def _held(self, cache: Cache | None) -> LayerCache | None:
        if cache is not None and not self.operator.spec.causal:
            raise ValueError(f"{self.operator.spec.name} is not causal: it has no decode step, and nothing for a cache to hold")
        return None if cache is None else cache[self.layer]

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _token(self, x: Tensor, held: LayerCache) -> Tensor:
        tensors = self._tensors(x, held, None)
        outputs, states = self.operator.step(*tensors, state=held.states)
        held.states = as_tuple(states)
        held.seen += 1
        return self._join(x, as_tuple(outputs))

    # -- tensors --

    def param(self, name: str) -> Tensor:
        """Returns a param as the operator takes it: inside its bounds, in float32."""
        stored = self.params[name]
        return self.bounds[name].apply(stored if stored.dtype == torch.float64 else stored.float())

    def _tensors(self, x: Tensor, held: LayerCache | None, cu_seqlens: Tensor | None, reach: Reach | None = None) -> tuple[Tensor, ...]:
        """Makes the operator's tensors of x [B, T, dim] or [B, dim], and moves the windows on; ``reach`` finds windows elsewhere."""
        made = [self._input(t.name, x, held, cu_seqlens, reach) for t in self.variant.inputs]
        return (*made, *(self.param(t.name) for t in self.variant.params))

    def _input(self, name: str, x: Tensor, held: LayerCache | None, cu_seqlens: Tensor | None, reach: Reach | None) -> Tensor:
        if name not in self.feeds:
            return self._positions(name, x, 0 if held is None else held.seen, cu_seqlens)
        feed = self.feeds[name]
        if name not in self.convolutions:
            made: Tensor = feed(x)
            return made
        convolution = self.convolutions[name]
        assert isinstance(feed, Feed) and isinstance(convolution, ShortConvolution)
        projected = feed.before(x)
        window = None if held is None else held.windows.get(name)
        if reach is not None:
            window = reach(projected, convolution.width - 1)
        if x.ndim == 2:
            if window is None:
                window = projected.new_zeros(len(x), convolution.width - 1, convolution.channels)
            mixed = convolution.step(projected, window)
        else:
            mixed, window = convolution(projected, window, cu_seqlens)
        if held is not None:
            held.windows[name] = window
        return feed.after(mixed)

    def _positions(self, name: str, x: Tensor, seen: int, cu_seqlens: Tensor | None) -> Tensor:
        """Counts tokens from ``seen``; as a part of the longest length where the spec bounds positions."""
        tokens = 1 if x.ndim == 2 else x.shape[1]
        place = torch.arange(seen, seen + tokens, device=x.device)
        if cu_seqlens is not None:
            if seen:
                raise ValueError(f"{self.operator.spec.name} asks for positions: sequences side by side cannot follow on a cache")
            place = place - cu_seqlens[torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)]
        position = place.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        bound = bound_of(self.variant, name)
        if math.isfinite(bound.high):
            position = (position * (bound.high / self.length)).clamp(max=bound.high)
        return position.expand(len(x)) if x.ndim == 2 else position.expand(len(x), tokens)

    def _join(self, x: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
        """Norms every head, joins heads and outputs, gates and projects back to [.., dim]."""
        rows = []
        for o, out in zip(self.operator.spec.outputs, outputs, strict=True):
            normed = self.norms[o.name](out.to(x.dtype)) if o.name in self.norms else out.to(x.dtype)
            rows.append(normed.reshape(*x.shape[:-1], self.widths[o.name]))
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, -1)
        if self.gate is not None:
            joined = joined * functional.silu(self.gate(x))
        written: Tensor = self.write(joined)
        return written


# ---- sizes ----------------------------------------------------------------------------------------------------------------------


def sizes_of(spec: OperatorSpec, dim: int, heads: int, given: Mapping[str, int]) -> dict[str, int]:
    """Returns the size of every dim of a spec; raises ValueError where a given one is not of the spec or a default does not divide."""
    tensors = spec.inputs + spec.params
    derived = {d for d, _ in spec.sizes}
    named = list(dict.fromkeys(d for a in tensors for d in a.shape() if d not in derived))
    for name in given:
        if name not in named or name == "H":
            listed = ", ".join(d for d in named if d != "H")
            raise ValueError(f"{spec.name} has no dim {name!r} to give a size; it has {listed}")
    headed = [a for a in tensors if a.head]
    if not headed and heads != 1:
        raise ValueError(f"{spec.name} has no heads; leave heads at 1, not {heads}")
    known = {"H": heads, "HV": given.get("HV", heads)}
    if known["HV"] % heads:
        raise ValueError(f"HV = {known['HV']} wants to be a multiple of heads = {heads}")
    ends = {d for o in spec.outputs for d in o.dims}
    for d in (d for d in named if d not in known):
        if d in given:
            known[d] = given[d]
        elif not headed:
            known[d] = dim if d in ends else HEADLESS
        else:
            over = known[next((a.head for a in headed if d in a.dims), "H")]
            if dim % over:
                raise ValueError(f"{spec.name}: dim = {dim} is not a multiple of {over} heads; give {d}= a size")
            known[d] = dim // over
    for d, formula in spec.sizes:
        known[d] = measure(formula, known)
    return known


def _know(what: str, given: Mapping[str, object] | None, names: list[str], spec: str) -> None:
    """Raises ValueError where something is given by a name that the spec does not have."""
    for name in given or ():
        if name not in names:
            raise ValueError(f"{what} names {name!r}, which {spec} does not have; it has {', '.join(names) or 'none'}")
