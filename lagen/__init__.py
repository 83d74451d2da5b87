"""lagen: a compiler for linear attention. ``lagen.load("specs/gla.yaml")`` gives the operator of a spec.

Importing lagen costs nothing: what it offers is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lagen.runtime.load import load as load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports a public name on first use; raises AttributeError for any other."""
    if name == "load":
        from lagen.runtime.load import load

        return load
    raise AttributeError(f"module 'lagen' has no attribute {name!r}")
