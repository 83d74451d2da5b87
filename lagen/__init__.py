"""lagen: a compiler for linear attention. ``lagen.load("specs/gla.yaml")`` gives the operator of a spec.

Importing lagen costs nothing: what it offers is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lagen import compat as compat
    from lagen import nn as nn
    from lagen import parallel as parallel
    from lagen.runtime.load import load as load

__all__ = ["__version__", "compat", "load", "nn", "parallel"]
__version__ = "0.1.0"
ROOMS = ("compat", "nn", "parallel")


def __getattr__(name: str) -> object:
    """Imports a public name on first use; raises AttributeError for any other."""
    if name == "load":
        from lagen.runtime.load import load

        return load
    if name in ROOMS:
        return import_module(f"lagen.{name}")
    raise AttributeError(f"module 'lagen' has no attribute {name!r}")
