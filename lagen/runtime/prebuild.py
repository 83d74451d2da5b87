"""Compiles the C++ of a variant into the cache, ahead of its first call."""

from __future__ import annotations

from pathlib import Path

from lagen.emit.cpp import render_cpp, whole
from lagen.emit.cpp_fit import Fallback
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.digest import digest
from lagen.runtime.choice import processor
from lagen.runtime.cpp import Missing, build, defines, trimmed
from lagen.targets.tuned import find


def prebuild(variant: Variant) -> Path | Missing:
    """Returns the shared object that the operator of ``variant`` will load, or why there is none; raises canonicalise's refusals.

    What calls of tuned sizes will load is compiled as well.
    """
    recurrence = canonicalise(variant)
    text = render_cpp(recurrence, differentiate(recurrence))
    if isinstance(text, Fallback):
        return Missing(text.reason)
    source = trimmed(whole(text))
    for entry in find(variant.name, digest(recurrence), processor()).entries:
        build(source, variant.name, defines(entry.config.table))
    return build(source, variant.name)
