"""Runs generated C++ on CPU tensors: compiled once with the user's compiler, cached, called through a plain C interface.

Stands alone (torch, the standard library, filelock and platformdirs): it is copied into every built package as ``_cpp.py``.

The shared object is found by the digest of its source, the flags, the compiler and the processor; twenty processes that start at
once build it once. Where there is no compiler, one warning says so and the torch evaluation serves.
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lagen.runtime.choice import NOTHING, Choice, processor
from lagen.runtime.pool import by_slots
from lagen.runtime.repeats import Repeats, StepPlan
from lagen.runtime.signature import Argument, OperatorSpec, is_dense, measure

Tensors = tuple[Tensor, ...]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BASE = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
GCC = ("-fno-ipa-cp-clone",)  # templates are specialised as it is: clones make a build a tenth longer and no call shorter
EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
PARTS = (1, 2)  # of a generated file: forward, step and some of the backward's passes; the others
INCLUDE = '#include "_sweeps.h"\n'
SMALL = 1 << 18  # state entries of a step that one thread takes alone
SLOTS = 7  # among the words of a call
NO_TENSOR = (0, 0, 0, 0, 0, 1, 0)
LANES = 16  # slices are whole vectors of the widest machine
LARGE, PAGE, HUGEPAGE = 1 << 22, 1 << 12, 14  # bytes from which a tensor's memory comes anew, of a page; what madvise calls a huge one


@dataclass(frozen=True)
class Missing:
    """Says why there is no shared object."""

    reason: str


# ---- building -------------------------------------------------------------------------------------------------------------------


def compilers() -> list[str]:
    """Returns the C++ compilers to try: $CXX alone where it is set, else g++, clang++ and c++ as far as they are there."""
    named = os.environ.get("CXX")
    found = [shutil.which(c) for c in ([named] if named else ["g++", "clang++", "c++"])]
    return [c for c in found if c]


def cache() -> Path:
    """Returns the folder of the shared objects; LAGEN_CACHE_DIR names another than the user's cache."""
    import platformdirs

    return Path(os.environ.get("LAGEN_CACHE_DIR") or platformdirs.user_cache_dir("lagen")) / "cpp"


def features() -> str:
    """Returns what -march=native depends on: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def trimmed(source: str) -> str:
    """Returns a source without blank lines around it, so that a module's literal and the printed file are one."""
    return source.strip() + "\n"


def defines(config: Mapping[str, int]) -> tuple[str, ...]:
    """Returns what the compiler is told of a config: sizes that the C++ has as macros. The number of threads is no affair of its."""
    return tuple(f"-DLG_{name.upper()}={value}" for name, value in sorted(config.items()) if name != "threads")


def build(source: str, name: str, told: tuple[str, ...] = ()) -> Path | Missing:
    """Returns the shared object of ``source``, compiled where the cache lacks it; ``told`` are ``defines``."""
    from filelock import FileLock

    found = compilers()
    if not found:
        named = os.environ.get("CXX")
        return Missing(f"$CXX names {named}, which is not there" if named else "no C++ compiler (g++ or clang++) is on the PATH; set CXX")
    complaint = ""
    for compiler in found:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        for extra in EXTRAS:
            flags = (*BASE, *(() if "clang" in version else GCC), *extra, *told)
            key = hashlib.sha256("\0".join([source, *flags, compiler, version, features()]).encode()).hexdigest()[:24]
            path = cache() / f"{name}_{key}.so"
            if path.is_file():
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                complaint = "" if path.is_file() else _compile(compiler, flags, source, path)
            if not complaint:
                return path
    return Missing(f"{found[-1]} refuses the generated file: {complaint}")


def _compile(compiler: str, flags: Sequence[str], source: str, path: Path) -> str:
    """Compiles into ``path``, whole or not at all; returns the compiler's complaint, "" where it had none.

    A file in parts is compiled by one process a part.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, made = Path(folder) / f"{path.stem}.cpp", Path(folder) / path.name
        text.write_text(source, encoding="utf-8")
        parts = {str(Path(folder) / f"{i}.o"): f"-DLG_PART={i}" for i in (PARTS if "LG_PART" in source else (0,))}
        alone = [f for f in flags if f != "-shared"]
        commands = [[compiler, *alone, told, "-c", "-o", part, str(text)] for part, told in parts.items()]
        running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
        ends = [(process.communicate()[1], process.returncode) for process in running]
        if not any(code for _, code in ends):
            linked = subprocess.run([compiler, *flags, "-o", str(made), *parts], capture_output=True, text=True, check=False)
            ends.append((linked.stderr, linked.returncode))
        words = next((said for said, code in ends if code), None)
        if words is not None:
            return next((line for line in words.splitlines() if "error" in line), words.strip()[:400] or "no reason given")
        os.replace(made, path)
    return ""


def _libc() -> Callable[[int, int, int], int] | None:
    """Returns the system's madvise, where it knows huge pages."""
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


_madvise = _libc()


def roomy(x: Tensor) -> Tensor:
    """Asks for huge pages under a tensor that was just made: where memory comes anew, each page of 4 KB costs as much as copying it."""
    size = x.numel() * x.element_size()
    if _madvise is not None and size >= LARGE:
        start = -(-x.data_ptr() // PAGE) * PAGE
        _madvise(start, x.data_ptr() + size - start, HUGEPAGE)
    return x


# ---- calling --------------------------------------------------------------------------------------------------------------------

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def threads(most: int = 0) -> int:
    """Returns how many threads a call takes: torch's number, but one in a forked child, where OpenMP's pool did not come along.

    ``most`` limits them, where it is not 0.
    """
    count = 1 if _forked else torch.get_num_threads()
    return min(count, most) if most else count


@dataclass(frozen=True)
class Split:
    """Slices of one dim that are computed each by itself: how many, and how wide."""

    dim: str
    parts: int
    width: int

    def stride(self, a: Argument, sizes: dict[str, int]) -> int:
        """Returns the stride from slice to slice of a tensor that is shared by all of them where it lacks the dim."""
        if self.dim not in a.dims:
            return 0
        return self.width * math.prod(sizes[d] for d in a.dims[a.dims.index(self.dim) + 1 :])

    def once(self, a: Argument, sizes: dict[str, int]) -> int:
        """Returns the same for a tensor that only the first slice may touch where it lacks the dim."""
        return self.stride(a, sizes) or -1

    def lead(self, a: Argument) -> tuple[int, ...]:
        """Returns the dims in front of a gradient: one row a slice where it lacks the dim."""
        return (self.parts,) if self.parts > 1 and self.dim not in a.dims else ()


class CppBackend:
    """One variant's generated C++: forward, backward and step over tuples of tensors, as the operator calls them.

    The shared object is built at the first call. ``fallback`` holds the torch functions that serve without a compiler.
    """

    def __init__(self, spec: OperatorSpec, source: str, fallback: tuple[Callable[..., object], ...], choice: Choice | None = None) -> None:
        header = Path(__file__).with_name("_sweeps.h")  # beside this file in a built package
        included = header.read_text(encoding="utf-8") if INCLUDE in source else ""
        self.spec, self.source, self.fallback = spec, trimmed(source).replace(INCLUDE, included), fallback
        self.loaded: ctypes.CDLL | Missing | None = None
        self.choice = choice or Choice({})
        self.tuned: dict[tuple[str, ...], ctypes.CDLL] = {}
        self.plans: dict[object, StepPlan] = {}
        self.entry: Callable[[int], int] | None = None  # of the step that writes in place
        self.repeats = Repeats(spec.name)
        self.again = self.repeats.again
        self.heads = spec.outputs[0].head
        self.dims = tuple(dict.fromkeys(d for a in spec.inputs + spec.params for d in a.dims if d not in dict(spec.sizes)))

    def library(self) -> ctypes.CDLL | None:
        """Returns the loaded shared object, built where needed; None, with one warning, where that cannot be."""
        if self.loaded is None:
            built = build(self.source, self.spec.name)
            self.loaded = built if isinstance(built, Missing) else ctypes.CDLL(str(built))
            if not isinstance(self.loaded, Missing) and hasattr(self.loaded, "lagen_step"):
                step, repeated = self.loaded.lagen_step, self.loaded.lagen_step_again
                step.argtypes, repeated.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_char_p]
                self.entry, self.repeats.entry = step, repeated
            if isinstance(self.loaded, Missing):
                warnings.warn(f"{self.spec.name} runs as torch code on the CPU, many times slower: {self.loaded.reason}", stacklevel=2)
        return None if isinstance(self.loaded, Missing) else self.loaded

    def choose(self, of: str, dtype: torch.dtype, sizes: dict[str, int], tokens: int, tasks: int) -> Mapping[str, int]:
        """Returns the tuned config of a call, empty where none was tuned, and where bits may not depend on the batch."""
        if not self.choice.rows or torch.are_deterministic_algorithms_enabled():
            return NOTHING
        return self.choice.find(processor(), of, NAMES[dtype], tuple([(d, sizes[d]) for d in self.dims]), tokens, tasks)[0]

    def library_of(self, config: Mapping[str, int]) -> ctypes.CDLL | None:
        """Returns the shared object of a tuned config, built where needed; None as ``library``."""
        told = defines(config) if config else ()
        if not told or isinstance(self.loaded, Missing):
            return self.library()
        found = self.tuned.get(told)
        if found is None:
            built = build(self.source, self.spec.name, told)
            if isinstance(built, Missing):
                return self.library()
            found = self.tuned[told] = ctypes.CDLL(str(built))
        return found

    def measure(self, inputs: Tensors, params: Tensors, lead: int) -> dict[str, int]:
        """Reads the sizes of all dims off the tensors; ``lead`` counts the dims before the head."""
        sizes: dict[str, int] = {}
        for a, x in zip(self.spec.inputs, inputs, strict=True):
            sizes.update(zip(a.shape(), x.shape[lead:], strict=True))
        for a, x in zip(self.spec.params, params, strict=True):
            sizes.update(zip(a.shape(), x.shape, strict=True))
        sizes.setdefault("H", sizes.get("HV", 1))
        sizes.setdefault("HV", sizes["H"])
        sizes[""] = 1
        for dim, formula in self.spec.sizes:
            sizes[dim] = measure(formula, sizes)
        return sizes

    def head_words(self, sizes: dict[str, int], batch: int, time: int, scale: float, bounds: int = 0, most: int = 0) -> list[int]:
        """Returns the words in front of a call: sizes, threads (at ``most``), addresses of packed ``bounds`` and of slots, scale."""
        bits = struct.unpack("q", struct.pack("d", scale))[0]
        return [batch, time, sizes[self.heads], threads(most), 1, 0, bounds, 0, bits, *(sizes[d] for d in self.dims)]

    def share(self, library: ctypes.CDLL, sizes: dict[str, int], batch: int, most: int = 0) -> Split:
        """Returns how threads share a head where there are fewer heads than threads."""
        index = ctypes.c_int64.in_dll(library, "lagen_split").value
        wanted = -(-threads(most) // max(1, batch * sizes[self.heads]))
        if index < 0 or wanted < 2 or torch.are_deterministic_algorithms_enabled():  # how many share a head depends on the batch
            return Split("", 1, 0)
        size = sizes[self.dims[index]]
        vectors = -(-size // LANES)
        width = -(-vectors // wanted) * LANES
        return Split(self.dims[index], -(-size // width), width)

    def run(self, library: ctypes.CDLL, name: str, words: Sequence[int]) -> None:
        """Calls into a shared object; raises MemoryError where it lacks memory."""
        packed = array.array("q", words)
        if library[name](ctypes.c_void_p(packed.buffer_info()[0])):
            raise MemoryError(f"{self.spec.name}: no memory for the scratch of {name}")

    def forward(
        self,
        inputs: Tensors,
        params: Tensors,
        scale: float,
        initial_states: Tensors | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensors, Tensors | None, Tensors]:
        """Computes outputs and final states."""
        first = inputs[0]
        spec, (batch, time) = self.spec, first.shape[:2]
        count, bounds, many = _sequences(batch, cu_seqlens)
        sizes = self.measure(inputs, params, 2)
        heads = sizes[self.heads]
        config = self.choose("forward", first.dtype, sizes, time, batch * heads)
        library, most = self.library_of(config) if first.is_cpu else None, config.get("threads", 0)
        if library is None:
            return self.fallback[0](inputs, params, scale, initial_states, output_final_state, cu_seqlens)  # type: ignore[return-value]
        held: list[Tensor] = []
        words = self.head_words(sizes, count, time, scale, bounds.data_ptr() if many else 0, most)
        split = self.share(library, sizes, count, most)
        words[4:6] = (split.parts, split.width)
        for a, x in zip(spec.inputs, inputs, strict=True):
            words += _words(a, x, heads, sizes, 2, held, split.stride(a, sizes), many=many)
        for a, x in zip(spec.params, params, strict=True):
            words += _words(a, x, heads, sizes, 0, held, split.stride(a, sizes))
        outputs = tuple(roomy(first.new_empty(batch, time, *(sizes[d] for d in o.shape()))) for o in spec.outputs)
        for a, x in zip(spec.outputs, outputs, strict=True):
            words += _words(a, x, heads, sizes, 2, held, split.stride(a, sizes), many=many)
        finals = (
            tuple(first.new_empty(count, *(sizes[d] for d in s.shape()), dtype=torch.float32) for s in spec.states)
            if output_final_state
            else None
        )
        for i, a in enumerate(spec.states):
            words += (
                NO_TENSOR
                if initial_states is None
                else _words(a, initial_states[i].contiguous(), heads, sizes, 1, held, split.stride(a, sizes))
            )
            words += NO_TENSOR if finals is None else _words(a, finals[i], heads, sizes, 1, held, split.once(a, sizes))
        self.run(library, "lagen_forward", words)
        return outputs, finals, ()

    def backward(
        self,
        inputs: Tensors,
        params: Tensors,
        scale: float,
        initial_states: Tensors | None,
        saved: Tensors,
        outputs: Tensors,
        final_states: Tensors | None,
        d_outputs: Tensors,
        d_final_states: Tensors | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensors, Tensors, Tensors | None]:
        """Computes the gradients of inputs, params and initial states."""
        first = inputs[0]
        spec, (batch, time) = self.spec, first.shape[:2]
        sizes = self.measure(inputs, params, 2)
        heads = sizes[self.heads]
        config = self.choose("backward", first.dtype, sizes, time, batch * heads)
        library, most = self.library_of(config) if first.is_cpu else None, config.get("threads", 0)
        if library is None:
            return self.fallback[1](  # type: ignore[return-value]
                inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states, cu_seqlens
            )
        count, bounds, many = _sequences(batch, cu_seqlens)
        held: list[Tensor] = []
        absent = ctypes.c_int64.in_dll(library, "lagen_absent").value
        words = self.head_words(sizes, count, time, scale, bounds.data_ptr() if many else 0, most)
        split = self.share(library, sizes, count, most)
        words[4:6] = (split.parts, split.width)
        gradients: list[Tensor | None] = []
        for i, (a, x) in enumerate(zip(spec.inputs + spec.params, inputs + params, strict=True)):
            token = i < len(inputs)
            words += _words(a, x, heads, sizes, 2 if token else 0, held, split.stride(a, sizes), many=many)
            if absent >> i & 1:
                gradients.append(None)
                words += NO_TENSOR
                continue
            lead = (batch, time) if token else (count,)
            front = split.lead(a)
            shared = sizes[a.head] != heads or not token or bool(front)
            shape = (*front, *lead, *((heads,) if shared else (sizes[a.head],) if a.head else ()), *(sizes[d] for d in a.dims))
            d = roomy(x.new_empty(shape, dtype=torch.float32 if shared else x.dtype))
            gradients.append(d)
            one, stride = (d[0], d[0].numel()) if front else (d, split.stride(a, sizes))
            words += _words(a, one, heads, sizes, len(lead), held, stride, wide=shared, many=many)
        for a, x in zip(spec.outputs, d_outputs, strict=True):
            words += _words(a, x, heads, sizes, 2, held, split.stride(a, sizes), many=many)
        d_initial: list[Tensor] = []
        for i, a in enumerate(spec.states):
            if initial_states is None:
                words += (*NO_TENSOR, *NO_TENSOR)
            else:
                words += _words(a, initial_states[i].contiguous(), heads, sizes, 1, held, split.stride(a, sizes))
                front = split.lead(a)
                d = first.new_empty((*front, count, heads, *(sizes[d] for d in a.dims)), dtype=torch.float32)
                d_initial.append(d)
                one, stride = (d[0], d[0].numel()) if front else (d, split.stride(a, sizes))
                words += _words(a, one, heads, sizes, 1, held, stride, wide=True)
            words += (
                NO_TENSOR
                if d_final_states is None
                else _words(a, d_final_states[i].contiguous(), heads, sizes, 1, held, split.once(a, sizes))
            )
        self.run(library, "lagen_backward", words)
        n = len(inputs)
        given = spec.inputs + spec.params
        gradients = [d.sum(0) if d is not None and split.lead(a) else d for a, d in zip(given, gradients, strict=True)]
        d_inputs = tuple(_share(a, x, d, sizes, 2) for a, x, d in zip(spec.inputs, inputs, gradients[:n], strict=True))
        d_params = tuple(
            _share(a, x, d if d is None else d.sum(0), sizes, 0) for a, x, d in zip(spec.params, params, gradients[n:], strict=True)
        )
        if initial_states is None:
            return d_inputs, d_params, None
        d_initial = [d.sum(0) if split.lead(a) else d for a, d in zip(spec.states, d_initial, strict=True)]
        return d_inputs, d_params, tuple(_share(a, x, d, sizes, 1) for a, x, d in zip(spec.states, initial_states, d_initial, strict=True))

    def step(self, inputs: Tensors, params: Tensors, scale: float, states: Tensors, slots: Tensor | None, outputs: Tensors) -> None:
        """Computes one token and writes outputs and states in place, of these those that ``slots`` names where it is given."""
        first = inputs[0]
        if self.loaded is None:
            self.library()
        if not first.is_cpu or isinstance(self.loaded, Missing):
            self.fallback[2](inputs, params, scale, states, slots, outputs)
            return
        if self.entry is None or not all([s.is_contiguous() for s in states]):
            by_slots(self.whole_step)(inputs, params, scale, states, slots, outputs)
            return
        tensors = (*inputs, *params)
        key = (scale, threads(), *[(x.dtype, x.shape, x.stride()) for x in (*tensors, *outputs)])
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.plan_step(inputs, params, scale, states, outputs)
        if plan.copied:
            tensors = tuple(x.contiguous() if i in plan.copied else x for i, x in enumerate(tensors))
        words = plan.words[:]
        if slots is not None:
            slots = slots.to(torch.int64).contiguous()
            words[SLOTS] = slots.data_ptr()
            for o in outputs:  # padding rows stay so
                o.zero_()
        for place, x in zip(plan.places, (*tensors, *outputs, *states), strict=True):
            words[place] = x.data_ptr()
        if self.entry(words.buffer_info()[0]):
            raise MemoryError(f"{self.spec.name}: no memory for the scratch of a step")

    def noted(self, tensors: Tensors, scale: float, states: Tensors, outputs: Tensors | None) -> None:
        """Remembers a step that went, where one like it can be taken past the dispatcher."""
        if self.entry is None or _is_watched() or not all([x.is_cpu for x in (*tensors, *states, *(outputs or ()))]):
            return
        lanes = zip(self.spec.inputs + self.spec.params, tensors, strict=True)
        if all(is_dense(a, x) for a, x in lanes) and all(s.is_contiguous() for s in states):
            n = len(self.spec.inputs)
            self.repeats.note(self.plan_step(tensors[:n], tensors[n:], scale, states, outputs), tensors, states, outputs)

    def whole_step(self, inputs: Tensors, params: Tensors, scale: float, states: Tensors) -> Tensors:
        """Computes one token as a sequence of its own, and copies the states behind it."""
        outputs, finals, _ = self.forward(tuple(x.unsqueeze(1) for x in inputs), params, scale, states, True)
        for s, f in zip(states, finals or (), strict=True):
            s.copy_(f)
        return tuple(o.squeeze(1) for o in outputs)

    def plan_step(self, inputs: Tensors, params: Tensors, scale: float, states: Tensors, outputs: Tensors | None) -> StepPlan:
        """Lays out the words of a step for tensors of these shapes and strides; of outputs that are not given, contiguous ones."""
        spec, batch = self.spec, inputs[0].shape[0]
        sizes = self.measure(inputs, params, 1)
        heads = sizes[self.heads]
        if outputs is None:
            outputs = tuple(inputs[0].new_empty((batch, *(sizes[d] for d in o.shape()))) for o in spec.outputs)
        words, places, held = self.head_words(sizes, batch, 1, scale), list[int](), list[Tensor]()
        work = batch * sum(math.prod(s.shape[1:]) for s in states)
        words[3] = min(words[3], 1 + work // SMALL)
        for arguments, tensors, lead in ((spec.inputs, inputs, 1), (spec.params, params, 0), (spec.outputs, outputs, 1)):
            for a, x in zip(arguments, tensors, strict=True):
                places.append(len(words))
                own = _words(a, x, heads, sizes, lead, held)
                words += (*own[:3], lead, *own[4:])  # a token has time, which tells it from a state
        for a, x in zip(spec.states, states, strict=True):
            places.append(len(words))
            own = _words(a, x, heads, sizes, 1, held)
            words += (*own[:2], math.prod(x.shape[1:]), *own[3:], *NO_TENSOR)
        given = (*inputs, *params)
        like = {(x.dtype, x.shape): i for i, x in enumerate(given) if x.is_contiguous()}
        models = tuple(like.get((x.dtype, x.shape), tuple(x.shape)) for x in outputs)
        spans = tuple(_span(x) for x in (*given, *outputs, *states))
        copied = frozenset(i for i, x in enumerate(given) if held[i] is not x)
        return StepPlan(array.array("q", words), tuple(places), models, spans, copied)


def _is_watched() -> bool:
    """Tells whether a mode, a transform or autocast has something to do with each call."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    return bool(modes) or torch.is_autocast_enabled("cpu")


def _span(x: Tensor) -> int:
    """Returns how many bytes lie from a tensor's first number to behind its last."""
    return x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) if x.numel() else 0


def _sequences(batch: int, cu_seqlens: Tensor | None) -> tuple[int, Tensor, bool]:
    """Returns how many sequences there are, where packed ones begin, and whether they are packed."""
    if cu_seqlens is None:
        return batch, torch.empty(0), False
    return cu_seqlens.shape[0] - 1, cu_seqlens.to(torch.int64).contiguous(), True


def _words(
    a: Argument,
    x: Tensor,
    heads: int,
    sizes: dict[str, int],
    lead: int,
    held: list[Tensor],
    part: int = 0,
    wide: bool = False,
    many: bool = False,
) -> Sequence[int]:
    """Describes a tensor: address, dtype, strides of batch, time and head, heads of the loop that share one of its own, stride of slices.

    ``lead`` counts the dims before the head (batch and time, batch, none); ``wide`` tells that it has a row for every head of the loop,
    ``many`` that sequences are packed along time.
    """
    if not is_dense(a, x):
        x = x.contiguous()
    held.append(x)
    strides = x.stride()
    batch = strides[0] if lead and not (many and lead == 2) else 0
    time = strides[1] if lead == 2 else 0
    own = heads if wide else sizes[a.head]
    head = strides[lead] if wide or a.head else 0
    return (x.data_ptr(), CODES[x.dtype], batch, time, head, heads // own if own else 1, part)


def _share(a: Argument, x: Tensor, d: Tensor | None, sizes: dict[str, int], lead: int) -> Tensor:
    """Sums a gradient over the heads that share one of ``x``'s, and gives it its dtype; None is zero."""
    if d is None:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    if d.shape != x.shape:
        own = sizes[a.head]
        d = d.view(*d.shape[:lead], own, d.shape[lead] // own if own else 1, *d.shape[lead + 1 :]).sum(lead + 1)
        d = d.view(x.shape)
    return d.to(x.dtype)
