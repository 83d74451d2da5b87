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
from lagen.targets.orphan import die_with_parent
from lagen.targets.work import count

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


_MIX = {
    "tensor": r"[HIQ]G?MMA|UTC[A-Z]*MMA|v_mfma_\w+",
    "special": r"MUFU|v_(?:exp|log|rcp|sqrt|rsq|sin|cos)_\w+",
    "float": r"F(?:FMA|ADD|MUL|SEL|SETP|MNMX|SET)\d?|H(?:FMA|ADD|MUL|MNMX|SETP)2|F2FP?|I2FP?"
    r"|v_(?:fma|mul|add|sub|max|min|cvt|pk)_\w*f(?:16|32)\w*",
    "memory": r"LDG|STG|LDGSTS|UTMA\w+|UBLKCP|ATOMG?|RED|(?:global|buffer|flat)_\w+",
    "shared": r"LDS|STS|LDSM|STSM|ds_\w+",
    "local": r"LDL|STL|scratch_\w+",
    "between": r"SHFL|REDUX|BAR|SYNCS|WARPSYNC|DEPBAR|WARPGROUP|s_barrier|s_waitcnt",
}
"""Kinds of instructions by name; every other is a whole number's, a move or a branch."""


def _mix(names: list[str]) -> dict[str, int]:
    """Counts instructions by kind."""
    found: dict[str, int] = {}
    for name in names:
        kind = next((k for k, pattern in _MIX.items() if re.fullmatch(pattern, name)), "other")
        found[kind] = found.get(kind, 0) + 1
    return dict(sorted(found.items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cuda(cubin: bytes) -> dict[str, Any]:
    """Reads registers, stack and the instructions that touch it out of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_NVIDIA / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([_NVIDIA / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    touches = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.M)
    names = [m[1] for line in lines if (m := re.match(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line))]
    return {
        "mix": _mix(names),
        "code": _digest("\n".join(lines)),
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"] if touches else 0,
        "spill_instructions": touches,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "tensor_instructions": len(_TENSOR.findall(sass)),
    }


def _hip(assembly: str) -> dict[str, Any]:
    """Reads registers, scratch and the instructions that touch it out of amdgcn assembly."""

    def value(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:?\s+(\d+)", assembly, re.M)
        return int(found[1]) if found else 0

    touches = len(re.findall(r"^\s+(?:scratch|buffer)_(?:load|store)_\w+.*(?:offen|off|s32).*(?:Spill|Reload)", assembly, re.M))
    spilt = value("vgpr_spill_count")
    lines = re.findall(r"^\t([a-z]\w+ .*)$", assembly, re.M)
    return {
        "mix": _mix([line.split()[0] for line in lines]),
        "code": _digest("\n".join(lines)),
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
    return {
        **found,
        "nest": count(compiled.asm["ttir"]).to_json(),
        "short_offsets": len(re.findall(r"tt\.addptr [^:]*: !tt\.ptr<\w+>, i32", compiled.asm["ttir"])),
        "shared_bytes": int(compiled.metadata.shared),
        "seconds": round(seconds, 3),
    }


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
    die_with_parent()
    importlib.import_module("torch")  # generated modules import it: seconds that are no kernel's
    sys.dont_write_bytecode = True
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(answer(line), file=out, flush=True)


if __name__ == "__main__":
    main()
