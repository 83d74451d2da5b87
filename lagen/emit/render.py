"""Renders the files of a built package: one module per variant, the operator and prelude they import, and the package's own.

Rendering is a function of its arguments alone: twice the same bytes, whatever was rendered before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lagen import __version__, data
from lagen.emit.cpp import fallback, render_cpp, render_sweeps
from lagen.emit.cpp_fit import Fallback
from lagen.emit.torch import render_torch
from lagen.emit.triton import render_triton
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Adjoint, Recurrence
from lagen.ir.roles import gate_inputs
from lagen.ir.variant import OutputLine, StateLine, Tensor, Variant
from lagen.passes.digest import identity
from lagen.targets.tuned import Entry

SUPPORT = ("choice", "signature", "packed", "pool", "vmapped", "dispatch", "operator", "chunked", "scans", "repeats", "cpp")
"""The files of lagen/runtime that every built package carries, with an underscore in front; in the order they import each other."""

PRINTED = ("cpp", "triton")
"""The backends beside torch."""

Formula = int | str | tuple[str, "Formula", "Formula"]


@dataclass(frozen=True)
class BackendText:
    """One entry of a module's table of backends, as text."""

    name: str
    text: str


def support() -> dict[str, str]:
    """Returns the text of the files that a built package carries beside its operators."""
    room = Path(__file__).resolve().parent.parent / "runtime"
    texts = {f"_{name}.py": (room / f"{name}.py").read_text(encoding="utf-8") for name in SUPPORT}
    own = {name: text.replace("from lagen.runtime.", "from ._") for name, text in texts.items()}
    return own | {"_sweeps.h": render_sweeps()}


def render(
    variant: Variant, recurrence: Recurrence, adjoint: Adjoint, printed: Sequence[str] = PRINTED, tuned: Sequence[Entry] = ()
) -> str:
    """Renders the module of one variant; it imports torch, triton where it has kernels, and the files of ``support``.

    ``printed`` names the backends beside torch to print where there is a printer for what the variant does; ``tuned`` are the configs
    that its calls look up.
    """
    kernels = kernels_of(recurrence, adjoint) if "triton" in printed else Fallback("not asked for")
    step = "torch_step" if variant.causal else "None"
    backends = [BackendText("torch", f"Backend(torch_forward, torch_backward, {step}, keeps_outputs=False, doubles=True, host=True)")]
    cpp = render_cpp(recurrence, adjoint) if "cpp" in printed else Fallback("not asked for")
    undone = "" if isinstance(cpp, Fallback) else fallback(recurrence, adjoint)[1]
    if not isinstance(cpp, Fallback):
        again = ", again=cpp.again, noted=cpp.noted" if variant.causal else ""
        functions = f"cpp.forward, {'torch_backward' if undone else 'cpp.backward'}, {step.replace('torch_', 'cpp.')}"
        backends.append(BackendText("cpp", f"Backend({functions}, keeps_outputs=False{again})"))
    if not isinstance(kernels, Fallback):
        functions = f"triton_forward, triton_backward, {step.replace('torch', 'triton')}"
        backends.append(BackendText("triton", f"Backend({functions}, saves=TRITON_SAVES, saved=triton_saved)"))
    values = {
        "name": variant.name,
        "doc": variant.doc,
        "title": _literal(f"{variant.name}: {variant.doc}" if variant.doc else variant.name)[1:-1],
        "version": __version__,
        "origin": _literal(Path(variant.path).name)[1:-1],
        "identity": f"recurrence {identity(recurrence)[:12]}",
        "formula": "\n".join(f"    {line}" for line in str(recurrence).splitlines()),
        "torch_functions": render_torch(recurrence, adjoint, variant.assumptions).strip(),
        "kernels": "" if isinstance(kernels, Fallback) else kernels,
        "absent": [(name, text.reason) for name, text in (("triton", kernels), ("cpp", cpp)) if isinstance(text, Fallback)],
        "undone": undone,
        "cpp": "" if isinstance(cpp, Fallback) else cpp.rstrip(),
        "torch_step": step,
        "source": _block(variant.source),
        "groups": [
            ("inputs", [_argument(t, t.name in gate_inputs(variant)) for t in variant.inputs]),
            ("params", [_argument(t) for t in variant.params]),
            ("states", [_argument(s) for s in variant.states] if variant.causal else []),
            ("outputs", [_argument(o) for o in variant.outputs]),
        ],
        "scaled": variant.scaled,
        "causal": variant.causal,
        "sizes": repr(tuple((dim, formula(size)) for dim, size in variant.sizes)),
        "backends": backends,
        "tuned": _rows(tuned),
        "digest": "",
    }
    whole = _fill("module.py.j2", values)
    digest = hashlib.sha256("\0".join([whole, *support().values()]).encode()).hexdigest()
    return _fill("module.py.j2", values | {"digest": digest[:12]})


def _rows(tuned: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Prints tuned entries as rows of the module's table, by device."""
    devices: dict[str, list[str]] = {}
    for e in sorted(tuned, key=lambda e: (e.device, e.key)):
        given = f'"{e.of}", "{e.dtype}", {e.dims!r}, {e.tokens}, {e.heads}, {e.config.table!r}'.replace("'", '"')
        devices.setdefault(e.device, []).append(f"Row({given}),  # {e.how}")
    return list(devices.items())


def render_package(modules: Mapping[str, str]) -> dict[str, str]:
    """Returns the texts of a package's files by name, from those of its modules by operator name."""
    files = support() | {f"{name}.py": modules[name] for name in sorted(modules)}
    digests = [(file, hashlib.sha256(text.encode()).hexdigest()) for file, text in sorted(files.items())]
    return files | {"__init__.py": render_init(sorted(modules), digests)}


def render_init(names: Sequence[str], digests: Sequence[tuple[str, str]]) -> str:
    """Renders a package's __init__, which compares its files with ``digests`` before it imports them."""
    return _fill("package.py.j2", {"version": __version__, "names": names, "files": digests})


def formula(size: Expr) -> Formula:
    """Turns the size of a derived dim into what the operator measures with; raises NotImplementedError naming the op."""
    if size.op == "const":
        return int(size.value)
    if size.op == "size":
        return size.name
    if size.op == "pow":
        return ("pow", formula(size.args[0]), int(size.value))
    if size.op not in ("add", "sub", "mul", "div"):
        raise NotImplementedError(f"no size rule for {size}")
    return (size.op, formula(size.args[0]), formula(size.args[1]))


def kernels_of(recurrence: Recurrence, adjoint: Adjoint) -> str | Fallback:
    """Returns the Triton kernels of a variant, or says why they cannot be printed."""
    try:
        return render_triton(recurrence, adjoint).strip()
    except NotImplementedError as missing:
        return Fallback(str(missing))


def _argument(t: Tensor | StateLine | OutputLine, gate: bool = False) -> str:
    dims = ", ".join(f'"{d}"' for d in t.dims) + ("," if len(t.dims) == 1 else "")
    init = f", init={t.init!r}" if isinstance(t, StateLine) and t.init else ""
    return f'Argument("{t.name}", "{t.head}", ({dims}){init}{", gate=True" if gate else ""})'


def _block(text: str) -> str:
    """Writes a text as a Python literal, over lines where nothing in it wants escaping."""
    if '"""' in text or "\\" in text or not text.endswith("\n") or not all(c == "\n" or c.isprintable() for c in text):
        return repr(text)
    return f'"""\\\n{text}"""'


def _literal(text: str) -> str:
    """Writes a text as a Python literal on one line."""
    return json.dumps(text, ensure_ascii=False)


def _fill(template: str, values: Mapping[str, object]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data.templates()), undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["string_literal"] = _literal
    return environment.get_template(template).render(values)
