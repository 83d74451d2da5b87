"""The process that compiles: reads one launch a line as JSON, answers one report a line. Started, and killed, by targets/compile.

A process of its own, because a compiler that hangs or crashes must cost one kernel and not the caller, and because the caller may be
running Triton's interpreter, which a kernel's module decides on when it is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from lagen.targets.launch import FP_FUSION

_NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR = re.compile(r"\b(?:[HIQ]G?MMA|UTC[A-Z]*MMA)\b|\bv_mfma_", re.M)


def load(path: str) -> ModuleType:
    """Imports the file ``path`` under a name that its content decides, without its package's __init__; raises ImportError."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ImportError(f"no file {path}")
    package = f"lagen_compiled_{hashlib.sha256(bytes(file) + file.read_bytes()).hexdigest()[:16]}"
    if package not in sys.modules:  # what the file imports from its own folder is found there
        sys.modules[package] = module_from_spec(ModuleSpec(package, None, is_package=True))
        sys.modules[package].__path__ = [str(file.parent)]
    return importlib.import_module(f"{package}.{file.stem}")


def _constant(value: object) -> object:
    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def _cuda(cubin: bytes) -> dict[str, int]:
    """Reads registers, stack and the instructions that touch it out of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_NVIDIA / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([_NVIDIA / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    touches = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"] if touches else 0,
        "spill_instructions": touches,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "tensor_instructions": len(_TENSOR.findall(sass)),
    }


def _hip(assembly: str) -> dict[str, int]:
    """Reads registers, scratch and the instructions that touch it out of amdgcn assembly."""

    def value(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:?\s+(\d+)", assembly, re.M)
        return int(found[1]) if found else 0

    touches = len(re.findall(r"^\s+(?:scratch|buffer)_(?:load|store)_\w+.*(?:offen|off|s32).*(?:Spill|Reload)", assembly, re.M))
    spilt = value("vgpr_spill_count")
    return {
        "registers": value("vgpr_count"),
        "spill_bytes": value("private_segment_fixed_size") if spilt or touches else 0,
        "spill_instructions": touches,
        "instructions": len(re.findall(r"^\t[a-z]\w+ ", assembly, re.M)),
        "tensor_instructions": len(_TENSOR.findall(assembly)),
    }


def build(launch: dict[str, Any]) -> dict[str, Any]:
    """Compiles one launch (``Launch`` as JSON) and returns what the machine code needs."""
    kernel = getattr(load(launch["module"]), launch["kernel"])
    assert isinstance(kernel, JITFunction), f"{launch['kernel']} in {launch['module']} is not a compiled Triton kernel"
    backend_name, arch = launch["backend"], launch["arch"]
    target = GPUTarget(backend_name, int(arch) if backend_name == "cuda" else arch, launch["warp_size"])
    backend = make_backend(target)
    names = kernel.arg_names
    signature = {name: launch["signature"][name] for name in names}
    constants = {(names.index(k),): _constant(v) for k, v in launch["constants"].items()}
    attributes = {(names.index(k),): [list(p) for p in v] for k, v in launch["attributes"].items()}
    options = backend.parse_options({"enable_fp_fusion": FP_FUSION, **launch["options"], "debug": False})
    start = time.perf_counter()
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)
    seconds = time.perf_counter() - start
    found = _cuda(compiled.asm["cubin"]) if backend_name == "cuda" else _hip(compiled.asm["amdgcn"])
    return {**found, "shared_bytes": int(compiled.metadata.shared), "seconds": round(seconds, 3)}


def answer(line: str) -> str:
    """Answers one request; a kernel that does not compile is an answer too, with the compiler's words."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return json.dumps(build(json.loads(line)))
    # What a kernel can do wrong: its own errors, the compiler's, and those of the passes below it (RuntimeError). Anything else is
    # a mistake in this file, ends the process, and reaches the caller as the process's last words.
    except (CompilationError, PTXASError, OutOfResources, RuntimeError, SyntaxError, AttributeError, KeyError, ImportError) as error:
        return json.dumps({"failure": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serves until standard input ends. The compilers print: their words go to standard error, answers to the real output."""
    importlib.import_module("torch")  # generated modules import it: seconds that are no kernel's
    sys.dont_write_bytecode = True
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(answer(line), file=out, flush=True)


if __name__ == "__main__":
    main()
