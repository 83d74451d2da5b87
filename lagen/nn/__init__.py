"""Layers for PyTorch models on any operator of lagen: the mixer, its short convolution, and the cache of a model that generates."""

from lagen.nn.attention import LinearAttention
from lagen.nn.cache import Cache
from lagen.nn.convolution import ShortConvolution

__all__ = ["Cache", "LinearAttention", "ShortConvolution"]
