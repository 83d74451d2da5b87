"""Cross-compiles launches for a device that need not be here, and reports registers, spills and shared memory.

Each kernel is compiled in a worker process that is killed when it takes too long; what was compiled once is remembered on disk under
a key of everything that decides the machine code: the kernel's code (with what it uses of its file), types, constants, options,
target and versions. Comments, the kernel's name and where its file lies do not enter.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lagen import data
from lagen.targets.launch import FP_FUSION, Constant, Launch, describe
from lagen.targets.server import Stopped, server
from lagen.targets.target import Target

FORM = 5
"""Of the remembered reports; a change of what they hold makes the old ones unread."""


@dataclass(frozen=True)
class Report:
    """What one kernel's machine code needs. Counts are per thread (registers, spill_bytes) or per program (shared_bytes).

    ``spill_bytes`` is the thread's stack where instructions touch it; ``spill_instructions`` how many do. ``failure`` is empty, or
    says why there is no machine code. ``mix`` counts instructions by kind, ``nest`` is what one program does (targets/work, as JSON),
    ``code`` the digest of the instructions, ``short_offsets`` how often a pointer (not a tile of them) is moved by 32 bits.
    ``seconds`` is the compiler's time when it really ran, also where ``remembered``.
    """

    kernel: str
    target: str
    registers: int = 0
    spill_bytes: int = 0
    spill_instructions: int = 0
    shared_bytes: int = 0
    instructions: int = 0
    tensor_instructions: int = 0
    seconds: float = 0.0
    mix: Mapping[str, int] = field(default_factory=dict)
    nest: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    short_offsets: int = 0
    failure: str = ""
    remembered: bool = False

    def fits(self, target: Target) -> bool:
        """Tells whether the device could launch the kernel."""
        return not self.failure and self.shared_bytes <= target.shared_bytes


# ---- the key -------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _definitions(source: str) -> dict[str, ast.stmt]:
    """Returns the top-level statements of a file by the names they bind."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0]: node for a in node.names}
    return found


def _code(source: str, kernel: str) -> str:
    """Returns a kernel's syntax tree and those of everything it uses in its file, without places, doc strings and its own name."""
    definitions = _definitions(source)
    needed, queued = {kernel}, [kernel]
    while queued:
        for node in ast.walk(definitions[queued.pop()]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in needed:
                needed.add(node.id)
                queued.append(node.id)
    own = ast.parse(ast.unparse(definitions[kernel])).body[0]
    assert isinstance(own, ast.FunctionDef), kernel
    own.name = "kernel"
    if ast.get_docstring(own) is not None:
        own.body = own.body[1:]
    rest = sorted(ast.dump(definitions[n]) for n in needed - {kernel})
    return "\n".join([ast.dump(own), *rest])


@functools.cache
def _versions() -> str:
    return f"triton {importlib.metadata.version('triton')}, form {FORM}, fp fusion {FP_FUSION}"


def digest(launch: Launch) -> str:
    """Returns the key of a launch's machine code; raises KeyError where the file has no such kernel."""
    code = _code(Path(launch.module).read_text(), launch.kernel)
    promised = tuple(a for a in launch.attributes if a[1])
    rest = (launch.target.name, launch.signature, launch.constants, promised, launch.options, _versions())
    return hashlib.sha256(f"{code}\n{rest!r}".encode()).hexdigest()[:32]


# ---- what was compiled before --------------------------------------------------------------------------------------------------


def _recall(path: Path, launch: Launch) -> Report | None:
    """Reads a remembered report; one that is damaged or of another form counts as none."""
    try:
        found = json.loads(path.read_text())
        return Report(**{**found, "kernel": launch.kernel, "remembered": True})
    except (OSError, ValueError, TypeError):
        return None


def _remember(path: Path, report: Report) -> None:
    """Writes a report where others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(asdict(report), file, sort_keys=True)
    os.replace(file.name, path)


# ---- the workers ---------------------------------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-m", "lagen.targets.worker")


def _environment(fill: bool) -> dict[str, str]:
    """Returns what a compiling process is started with."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env if fill else env | {"TRITON_ALWAYS_COMPILE": "1"}


def _request(launch: Launch) -> str:
    return json.dumps(
        {
            "module": launch.module,
            "kernel": launch.kernel,
            "backend": launch.target.backend,
            "arch": launch.target.arch,
            "warp_size": launch.target.warp_size,
            "signature": dict(launch.signature),
            "constants": dict(launch.constants),
            "attributes": dict(launch.attributes),
            "options": dict(launch.options),
        }
    )


def _serve(todo: queue.SimpleQueue[Launch], done: Callable[[Launch, Report], None], timeout: float, fill: bool) -> None:
    """Compiles what is queued, one launch at a time, until the queue is empty."""
    numbers = {f.name for f in fields(Report)}
    while True:
        try:
            launch = todo.get_nowait()
        except queue.Empty:
            return
        report = Report(launch.kernel, launch.target.name)
        try:
            with server(COMMAND, _environment(fill), "" if fill else "TRITON_CACHE_DIR") as worker:
                answer = json.loads(worker.ask(_request(launch), timeout))
            assert set(answer) <= numbers, answer
            report = Report(**{**asdict(report), **answer})
        except Stopped as reason:
            report = replace(report, failure=str(reason), seconds=timeout)
        done(launch, report)


def compile_launches(
    launches: Sequence[Launch],
    *,
    workers: int | None = None,
    timeout: float = 180.0,
    progress: Callable[[Report], None] = lambda report: None,
    remember: bool = True,
    fill: bool = False,
) -> tuple[Report, ...]:
    """Compiles every launch, equal ones once, and returns one report a launch, in order.

    ``workers`` processes at a time (one a core), each kernel at most ``timeout`` seconds; ``progress`` is called once a report, from
    any thread. With ``remember=False`` nothing is read from the cache folder. With ``fill`` the machine code goes into Triton's own cache,
    where the first call on the device finds it. Raises KeyError where a file has no such kernel.
    """
    keys = [digest(launch) for launch in launches]
    found: dict[str, Report] = {}
    todo: queue.SimpleQueue[Launch] = queue.SimpleQueue()
    waiting = 0
    folder = data.cache() / "compiled"
    for key, launch in dict(zip(keys, launches, strict=True)).items():
        known = _recall(folder / f"{key}.json", launch) if remember and not fill else None
        if known is not None:
            found[key] = known
            progress(known)
        else:
            todo.put(launch)
            waiting += 1
    lock = threading.Lock()

    def done(launch: Launch, report: Report) -> None:
        key = digest(launch)
        with lock:
            found[key] = report
            # A failure may be the machine's (no memory, no time): it is told, never remembered.
            if not report.failure:
                _remember(folder / f"{key}.json", report)
            progress(report)

    count = min(workers or os.cpu_count() or 1, waiting)
    threads = [threading.Thread(target=_serve, args=(todo, done, timeout, fill), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tuple(replace(found[key], kernel=launch.kernel) for key, launch in zip(keys, launches, strict=True))


def compile_kernel(
    module: str | Path,
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
    target: Target,
    *,
    timeout: float = 180.0,
) -> Report:
    """Compiles one kernel of the file ``module``. Types as Triton writes them ("*bf16", "i32"); "i32:16" is a multiple of 16."""
    (report,) = compile_launches([describe(str(module), kernel, signature, constexprs, num_warps, num_stages, target)], timeout=timeout)
    return report
