"""ShortConvolution: each channel's last few tokens, weighed and summed, with the window that decode carries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ShortConvolution(nn.Module):
    """Convolves every channel causally over ``width`` tokens, then SiLU: [B, T, channels] in and out."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-(width**-0.5), width**-0.5))

    def extra_repr(self) -> str:
        """Returns what is printed in the module's parentheses."""
        return f"{self.channels}, width={self.width}"

    def forward(self, x: Tensor, window: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves whole sequences; returns the result and the window behind them.

        ``window`` [B, width - 1, channels] holds the tokens before x, None stands for zeros. With ``cu_seqlens`` [N + 1] x is
        [1, T, channels], N sequences side by side, and windows are [N, width - 1, channels].
        """
        if cu_seqlens is not None:
            return self._packed(x, window, cu_seqlens)
        held = x.new_zeros(x.shape[0], self.width - 1, self.channels) if window is None else window.to(x.dtype)
        padded = torch.cat([held, x], 1)
        return self._convolve(padded), padded[:, x.shape[1] :]

    def step(self, x: Tensor, window: Tensor) -> Tensor:
        """Convolves one token [B, channels] and moves the window on in place."""
        padded = torch.cat([window.to(x.dtype), x[:, None]], 1)
        window.copy_(padded[:, 1:])
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32  # as a convolution sums
        return functional.silu((padded.to(kind) * self.weight[:, 0].mT.to(kind)).sum(1).to(x.dtype))

    def _convolve(self, padded: Tensor) -> Tensor:
        if padded.shape[1] < self.width:
            return padded[:, :0]  # no tokens
        convolved = functional.conv1d(padded.transpose(1, 2), self.weight, groups=self.channels)
        return functional.silu(convolved.transpose(1, 2))

    def _packed(self, x: Tensor, window: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves sequences that lie side by side: each is moved on to make room for its own window before it."""
        tokens, sequences, before = x.shape[1], len(cu_seqlens) - 1, self.width - 1
        bounds = cu_seqlens.long()
        place = torch.arange(tokens, device=x.device)
        moved = place + before * (1 + torch.searchsorted(bounds[1:], place, right=True))
        held = bounds[:-1, None] + before * torch.arange(sequences, device=x.device)[:, None] + torch.arange(before, device=x.device)
        padded = x.new_zeros(tokens + sequences * before, self.channels).index_copy(0, moved, x[0])
        if window is not None:
            padded = padded.index_copy(0, held.flatten(), window.to(x.dtype).flatten(0, 1))
        # the output at row r weighs rows r .. r + width - 1, of which the last is the token
        lengths = (bounds[1:] - bounds[:-1])[:, None]
        return self._convolve(padded[None])[:, moved - before], padded[held + lengths]
