"""Where the package's data lives: templates/, specs/ and tuned/, in a source tree and in an installed wheel alike.

Everything here is read-only at run time: whatever lagen writes goes to a folder the user names, or to ``cache``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["templates", "specs", "tuned"]

_PACKAGE = Path(__file__).resolve().parent


def folder(kind: Kind) -> Path:
    """Returns the folder of one kind of data; raises FileNotFoundError where the installation lacks it."""
    for root in (_PACKAGE / "_data", _PACKAGE.parent):
        if (root / kind).is_dir():
            return root / kind
    raise FileNotFoundError(f"this installation of lagen lacks its {kind}/ folder; install it again")


def templates() -> Path:
    """Returns the folder of the templates."""
    return folder("templates")


def specs() -> tuple[Path, ...]:
    """Returns the shipped specs, sorted by name."""
    return tuple(sorted(folder("specs").glob("*.yaml")))


def spec(name: str) -> Path:
    """Returns the shipped spec called ``name``; raises KeyError where there is none."""
    path = folder("specs") / f"{name}.yaml"
    if path not in specs():
        raise KeyError(f"no shipped spec is called {name!r}; `lagen list` shows them")
    return path


def cache() -> Path:
    """Returns the folder that lagen may write to and anyone may delete; LAGEN_CACHE_DIR names another."""
    import os

    import platformdirs

    named = os.environ.get("LAGEN_CACHE_DIR")
    return Path(named) if named else Path(platformdirs.user_cache_dir("lagen"))
