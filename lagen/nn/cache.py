"""Cache: what the layers of a model remember between calls while it generates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """What one layer remembers.

    ``states`` [B, *head, *dims] in spec order, None before the first token; ``windows`` the last inputs of each convolution
    [B, width - 1, channels]; ``seen`` the number of tokens so far.
    """

    states: tuple[Tensor, ...] | None = None
    windows: dict[str, Tensor] = field(default_factory=dict)
    seen: int = 0


class Cache:
    """Holds a LayerCache for every layer, by its number. It does not grow with the tokens.

    Hand the same object to all layers of a model, call after call: ``model(prompt, cache)``, then ``model(token, cache)``.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}

    def __getitem__(self, layer: int) -> LayerCache:
        """Returns what a layer remembers, empty before its first call."""
        return self.layers.setdefault(layer, LayerCache())

    @property
    def seen(self) -> int:
        """Returns the number of tokens that every layer has seen."""
        return min((c.seen for c in self.layers.values()), default=0)

    def reorder(self, rows: Tensor) -> None:
        """Puts the sequences ``rows`` [B] in place of those held: beam search, or a batch that loses members."""
        for c in self.layers.values():
            c.states = None if c.states is None else tuple(s.index_select(0, rows) for s in c.states)
            c.windows = {name: w.index_select(0, rows) for name, w in c.windows.items()}

    def detach(self) -> None:
        """Cuts the graph behind what is held: truncated backpropagation through time."""
        for c in self.layers.values():
            c.states = None if c.states is None else tuple(s.detach() for s in c.states)
            c.windows = {name: w.detach() for name, w in c.windows.items()}

    def reset(self) -> None:
        """Forgets everything: the next token is the first."""
        self.layers.clear()

    def copy(self) -> Cache:
        """Returns a cache of its own that holds the same: to continue one prompt in several ways."""
        other = Cache()
        for layer, c in self.layers.items():
            states = None if c.states is None else tuple(s.clone(memory_format=torch.contiguous_format) for s in c.states)
            other.layers[layer] = LayerCache(states, {name: w.clone() for name, w in c.windows.items()}, c.seen)
        return other
