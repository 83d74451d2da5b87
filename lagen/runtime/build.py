"""Builds packages of operators: spec files in, a folder of standalone Python files out.

A folder that lagen wrote holds ``lagen.json``, its manifest: the digest of every file written. What stands there and is not in the
manifest, or no longer is what the manifest says, is never touched or exported silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lagen import __version__
from lagen.emit.render import PRINTED, render, render_package, support
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.digest import digest as algebra
from lagen.passes.dump import asked, dump
from lagen.passes.plan import plan
from lagen.targets.tuned import Entry, find

MANIFEST = "lagen.json"


class BuildRefused(Exception):
    """Says why a folder is not written to, and what to do."""


def generate(variant: Variant, printed: Sequence[str] = PRINTED, tuned: Sequence[Entry] | None = None) -> str:
    """Compiles a variant to the text of its module; raises the refusals of canonicalise. ``printed`` as for render.

    The module carries the configs ``tuned``: where not given, those of the user's cache over those shipped.
    """
    recurrence = canonicalise(variant)
    adjoint = differentiate(recurrence)
    chosen = find(variant.name, algebra(recurrence)).entries if tuned is None else tuned
    source = render(variant, recurrence, adjoint, printed, chosen)
    for stage, value in (("variant", variant), ("recurrence", recurrence), ("adjoint", adjoint), ("source", source)):
        dump(stage, value)
    if asked("plan"):
        dump("plan", plan(recurrence, adjoint))
    return source


def build(variants: Sequence[Variant], out: Path, force: bool = False, printed: Sequence[str] = PRINTED) -> list[Path]:
    """Writes an importable package with one operator a variant; returns the files written. ``printed`` as for render.

    Operators built there before stay. Raises BuildRefused where ``out`` is not a folder that lagen wrote, where a file in it was
    changed since, or where another lagen built what would stay; ``force`` writes all the same, and drops what cannot stay.
    """
    out = Path(out)
    if not out.name.isidentifier() and out.resolve().name:
        _refuse(
            not out.resolve().name.isidentifier(), f"{out} cannot be imported: {out.name!r} is not a Python name; choose another folder"
        )
    modules = {v.name: generate(v, printed) for v in variants}
    _refuse(len(modules) < len(variants), "two specs have one name; a package holds one operator a name")
    kept = _standing(out, {f"{name}.py" for name in modules}, force)
    files = render_package(kept | modules)
    files[MANIFEST] = _manifest(files)
    out.mkdir(parents=True, exist_ok=True)
    # The package's own file and the manifest go last: a build that is cut off leaves a folder that refuses to be imported.
    order = sorted(files, key=lambda name: (name == MANIFEST, name == "__init__.py", name))
    for name in order:
        write(out / name, files[name])
    return [out / name for name in order]


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def digest_of(content: bytes) -> str:
    """Returns the sha256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def _refuse(when: bool, why: str) -> None:
    if when:
        raise BuildRefused(why)


def _manifest(files: Mapping[str, str]) -> str:
    digests = {name: digest_of(text.encode()) for name, text in sorted(files.items())}
    return json.dumps({"lagen": __version__, "files": digests}, indent=2) + "\n"


def _standing(out: Path, replaced: set[str], force: bool) -> dict[str, str]:
    """Returns the modules that stand in ``out`` and stay, by operator name; raises BuildRefused as ``build`` says."""
    if not out.exists():
        return {}
    _refuse(not out.is_dir(), f"{out} is a file, not a folder")
    present = {p.name for p in out.iterdir()} - {"__pycache__"}
    if not present:
        return {}
    written = _read_manifest(out / MANIFEST)
    _refuse(written is None and not force, f"{out} is not a folder that lagen wrote (no {MANIFEST} of its own); --force writes into it")
    written = written or {}
    whole = {n for n in present & set(written) if digest_of((out / n).read_bytes()) == written[n]}
    changed = sorted((present & set(written)) - whole)
    _refuse(bool(changed) and not force, f"in {out}, {', '.join(changed)} changed since lagen wrote it; --force writes anew")
    carried = support()
    foreign = sorted((present - set(written)) & (replaced | set(carried)))
    _refuse(bool(foreign) and not force, f"in {out}, {', '.join(foreign)} is not lagen's; --force replaces it")
    own = set(carried) | {"__init__.py", MANIFEST}
    staying = sorted(n for n in whole - own - replaced if n.endswith(".py"))
    aged = any(written.get(n) != digest_of(text.encode()) for n, text in carried.items())
    _refuse(
        bool(staying) and aged and not force, f"in {out}, {', '.join(staying)} is of another lagen; build it along, or --force drops it"
    )
    return {} if aged else {n.removesuffix(".py"): (out / n).read_text(encoding="utf-8") for n in staying}


def _read_manifest(path: Path) -> dict[str, str] | None:
    """Returns the digests of a manifest by file, None where there is none that reads as one."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        return None
    return files
