"""Loads the operator of a spec in process: compiled into the cache, verified, then imported.

A cached file is imported only where its content is what the compiler would write now; anything else is written anew. No bytecode
is read or written there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType

from filelock import FileLock

from lagen import data
from lagen.emit.render import PRINTED, render_package
from lagen.ir.variant import Variant
from lagen.runtime import choice, chunked, dispatch, operator, packed, pool, repeats, scans, signature, vmapped
from lagen.runtime.build import digest_of, generate, write
from lagen.runtime.operator import Operator
from lagen.spec.read import read
from lagen.targets.tuned import Entry


class ForeignFile(ImportError):
    """Says that a file of the cache is not what lagen wrote into it."""


class _Verified(SourceFileLoader):
    """Imports a source file if its content has the expected digest; knows no bytecode."""

    def __init__(self, name: str, path: str, digest: str) -> None:
        super().__init__(name, path)
        self.digest = digest

    def get_code(self, fullname: str) -> CodeType:
        """Compiles the file; raises ForeignFile where its content is not the expected one."""
        content = Path(self.path).read_bytes()
        if digest_of(content) != self.digest:
            raise ForeignFile(f"{self.path} is not the file that lagen wrote")
        return self.source_to_code(content, self.path)


def load(spec: str | Path | Variant, printed: Sequence[str] = PRINTED, tuned: Sequence[Entry] | None = None) -> Operator:
    """Returns the operator of a spec: the path of a file, the name of a shipped spec, or a Variant.

    ``printed`` names the backends beside torch that it gets; ``tuned`` the configs that it carries, where not those found.
    Raises SpecErrors for mistakes in the file, the refusals of canonicalise,
    KeyError for an unknown name, OSError where the file or the cache cannot be used.
    """
    variant = spec if isinstance(spec, Variant) else read(_find(spec))
    files = render_package({variant.name: generate(variant, printed, tuned)})
    digest = digest_of("\0".join(f"{n}\0{t}" for n, t in sorted(files.items())).encode())[:16]
    package = f"lagen_cache_{variant.name}_{digest}"
    folder = data.cache() / "operators" / f"{variant.name}_{digest}"
    if package not in sys.modules:
        _store(folder, files)
        _import(package, folder, files)
    loaded: Operator = sys.modules[f"{package}.{variant.name}"].operator
    return loaded


def _find(spec: str | Path) -> Path:
    path = Path(spec)
    if isinstance(spec, Path) or path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    return data.spec(str(spec))


def _store(folder: Path, files: dict[str, str]) -> None:
    """Writes the files that are missing or not what they should be; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        for name, text in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write(path, text)


def _import(package: str, folder: Path, files: dict[str, str]) -> None:
    """Imports a package's modules from verified files; leaves nothing behind where that fails.

    Of what a package carries, the operator's own modules are this process's: an error it raises is the one that lagen exports.
    """
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, package, None)
        sys.modules[package] = module_from_spec(ModuleSpec(package, None, origin=str(folder), is_package=True))
        for own in (choice, signature, packed, pool, vmapped, dispatch, operator, chunked, scans, repeats):
            alias = f"{package}._{own.__name__.rpartition('.')[2]}"
            undo.callback(sys.modules.pop, alias, None)
            sys.modules[alias] = own
        modules = [f"{package}.{name.removesuffix('.py')}" for name in sorted(files) if name.endswith(".py") and name != "__init__.py"]
        for full in (m for m in modules if m not in sys.modules):
            name = f"{full.rpartition('.')[2]}.py"
            loader = _Verified(full, str(folder / name), digest_of(files[name].encode()))
            spec = ModuleSpec(full, loader, origin=str(folder / name))
            spec.has_location = True
            undo.callback(sys.modules.pop, full, None)
            sys.modules[full] = module_from_spec(spec)
            loader.exec_module(sys.modules[full])
        undo.pop_all()
