"""Compiles the C++ of a variant into the cache, ahead of its first call."""

from __future__ import annotations

from pathlib import Path

from lagen.emit.cpp import render_cpp, whole
from lagen.emit.cpp_plan import Fallback
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.runtime.cpp import Missing, build, trimmed


def prebuild(variant: Variant) -> Path | Missing:
    """Returns the shared object that the operator of ``variant`` will load, or why there is none; raises canonicalise's refusals."""
    recurrence = canonicalise(variant)
    text = render_cpp(recurrence, differentiate(recurrence))
    return Missing(text.reason) if isinstance(text, Fallback) else build(trimmed(whole(text)), variant.name)
