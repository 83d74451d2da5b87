"""Launch: one start of one kernel as plain data, and the recorder that gathers the launches of a function without a device.

What it is: everything that decides the machine code (types, constants, divisibility, warps, stages) and the grid. What it is not:
it holds no tensor and no compiled code, so it can be printed, hashed and sent to another process.
Who makes it: ``record`` around launcher functions on meta tensors, or ``describe`` by hand. Who reads it: targets/compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

from lagen.targets.target import Target

Constant = int | float | bool | str | None

FP_FUSION = True
"""Whether a multiplication and an addition may become one instruction. Pinned, because Triton's default changes with 3.10."""


class NotRecordable(Exception):
    """Says why a launch cannot be written down as plain data."""


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel``, a function in the file ``module``, compiled for ``target``.

    ``signature`` has every argument in order with its Triton type ("*bf16", "i32", "fp32" or "constexpr"); ``constants`` the value
    of each constexpr, a Triton type written "tl.float32"; ``attributes`` what is promised of an argument (("tt.divisibility", 16)),
    nothing being a promise too where Triton's own cache keeps it in its key.
    """

    module: str
    kernel: str
    target: Target
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    attributes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Constant], ...]  # num_warps, num_stages and the like
    grid: tuple[int, int, int] = field(default=(1, 1, 1), compare=False)
    values: tuple[tuple[str, int], ...] = field(default=(), compare=False)  # of whole numbers that are no constants
    sizes: tuple[tuple[str, int], ...] = field(default=(), compare=False)  # bytes of each tensor

    @property
    def programs(self) -> int:
        """Returns how many programs the grid starts."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in (*self.constants, *self.options))
        return f"{self.kernel}[{' x '.join(map(str, self.grid))}]({given}) for {self.target.name}"


def describe(
    module: str,
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
    target: Target,
) -> Launch:
    """Writes down a launch by hand. Pointers are taken as aligned to 16 bytes; an integer is where its type ends in ":16"."""
    types: dict[str, str] = {}
    promised: list[str] = []
    for name, kind in signature.items():
        base, _, multiple = kind.partition(":")
        if multiple not in ("", "16"):
            raise NotRecordable(f"argument {name!r} of {kernel}: write {base!r} or '{base}:16', not {kind!r}")
        types[name] = base
        if base.startswith("*") or multiple:
            promised.append(name)
    types |= {name: "constexpr" for name in constexprs}
    return Launch(
        module,
        kernel,
        target,
        tuple(types.items()),
        tuple(constexprs.items()),
        tuple((n, (("tt.divisibility", 16),)) for n in promised),
        (("num_stages", num_stages), ("num_warps", num_warps)),
    )


def _constant(kernel: str, name: str, value: object) -> Constant:
    """Writes a constexpr as plain data; raises NotRecordable."""
    from triton import language as tl

    if isinstance(value, tl.constexpr):
        value = value.value
    if isinstance(value, tl.dtype):
        return f"tl.{DTYPES[str(value)]}"
    if value is None or isinstance(value, int | float | str):
        return value
    raise NotRecordable(f"constexpr {name!r} of {kernel} is {value!r}; only numbers, strings, types and None can be written down")


DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "int1": "int1"} | {
    f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def _write_down(function: Any, args: tuple[object, ...], kwargs: dict[str, Any], grid: Any, target: Target) -> Launch:
    """Writes down one call of a Triton kernel, specialised exactly as Triton would."""
    from triton.compiler.compiler import make_backend
    from triton.runtime import jit

    if not isinstance(function, jit.JITFunction):  # defined while interpreting: its binding rules are those of a compiled kernel
        function = jit.JITFunction(function.fn, **function.kwargs)
    backend = make_backend(_gpu(target))
    bind = jit.create_function_from_signature(function.signature, function.params, backend)
    given = {"enable_fp_fusion": FP_FUSION, **kwargs, "debug": False}
    bound, specialization, extra = bind(*args, **given)
    _, signature, constants, attributes = function._pack_args(backend, given, bound, specialization, extra)
    names = list(signature)
    sizes = tuple(grid(bound)) if callable(grid) else tuple(grid)
    sizes += (1,) * (3 - len(sizes))
    for path in constants:
        if len(path) != 1:
            raise NotRecordable(f"argument {names[path[0]]!r} of {function.__name__} is a tuple; pass its members one by one")
    return Launch(
        function.fn.__code__.co_filename,
        function.fn.__name__,
        target,
        tuple(signature.items()),
        tuple((names[p[0]], _constant(function.__name__, names[p[0]], v)) for p, v in constants.items()),
        tuple((names[p[0]], tuple((k, int(v)) for k, v in promises)) for p, promises in attributes.items()),
        tuple(sorted((k, v) for k, v in kwargs.items() if k not in names)),
        (int(sizes[0]), int(sizes[1]), int(sizes[2])),
        tuple((n, v) for n, v in bound.items() if isinstance(v, int) and not isinstance(v, bool)),
        tuple((n, v.numel() * v.element_size()) for n, v in bound.items() if hasattr(v, "element_size")),
    )


class _Absent:
    """Stands in for Triton's driver: says which device it would be, and can do nothing else."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """Returns the device as Triton's compiler names it."""
        return _gpu(self.target)

    def get_current_device(self) -> int:
        """Returns the number of the only device."""
        return 0

    @property
    def utils(self) -> _Absent:
        """Returns what answers for the device's properties."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Returns the number of processors, which decides how a scan is cut."""
        return {"multiprocessor_count": self.target.processors, "max_shared_mem": self.target.shared_bytes}


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, int(target.arch) if target.backend == "cuda" else target.arch, target.warp_size)


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Gathers every Triton launch made inside the block, in order, and starts none of them.

    Functions inside may run on meta tensors; they may touch only shapes, strides and pointers, and ask Triton's driver and knobs
    which device it is: ``target``. Works whether or not TRITON_INTERPRET is set. Empty grids are left out, as a driver would do
    nothing for them.
    """
    import triton
    from triton.runtime import driver, interpreter, jit

    launches: list[Launch] = []
    # Triton imports this when it first specialises an argument; it must see the knobs as they were when Triton was imported.
    import_module("triton.experimental.gluon.language")

    def note(function: Any, *args: object, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launch = _write_down(function, args, kwargs, grid, target)
        if launch.programs:
            launches.append(launch)

    with (
        triton.knobs.runtime.scope(),
        mock.patch.object(driver, "_active", _Absent(target)),
        mock.patch.object(jit.JITFunction, "run", note),
        mock.patch.object(interpreter.InterpretedFunction, "run", note),
    ):
        triton.knobs.runtime.interpret = False
        yield launches


def launches_of(function: Callable[[], object], target: Target) -> tuple[Launch, ...]:
    """Returns the launches that calling ``function`` would make on ``target``."""
    with record(target) as launches:
        function()
    return tuple(launches)
