"""A sanitizer for kernels run by Triton's interpreter: out-of-bounds accesses, and races between the programs of one launch.

Every load and store of the interpreter goes through one function each; here they are watched. A launch's tensors are moved into
buffers of their own with a wide margin, so that a stray pointer meets the margin and not a neighbour; a shadow array per storage
remembers for every element which program wrote it last and which read it. Programs of a launch run in any order on a device, so
an element that one program writes and another touches is a race, whatever the interpreter's order made of it; atomics among
themselves are none. Fresh tensors are filled with NaN, so that what a kernel leaves unwritten is seen in its result.

What it is not: it sees what the given data makes the kernels do. Nothing here runs without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

from lagen.verify.interpret import faithful

Indices = NDArray[np.int64]
Program = tuple[int, int, int]

_MARGIN = 1 << 20
"""Bytes on either side of a storage, and as much again as the storage is long: untouched, they cost nothing."""
_NONE, _SEVERAL = 0, -1
"""In a shadow array: touched by no program, by more than one. Else the program's number, from 1."""


@dataclass
class Finding:
    """One fault at one line of one kernel; ``count`` elements of ``argument`` in all, ``program`` and ``index`` of the first."""

    kind: str  # "out of bounds" or "race"
    access: str  # load, store or atomic
    kernel: str
    argument: str
    file: str
    line: int
    program: Program
    index: int  # the element, counted from the tensor's first
    other: str = ""  # of a race: what the other program did
    count: int = 0

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        what = f"{self.access} of {self.argument}[{self.index}] by program {self.program}"
        what += f" meets {self.other}" if self.other else ", outside the tensor"
        return f"{self.file}:{self.line}: {self.kind} in {self.kernel}: {what} ({self.count} elements)\n    {text}"


@dataclass
class _Storage:
    """One storage of a launch: where its copy lies, which elements the arguments cover, and who touched them."""

    buffer: torch.Tensor
    base: int
    bytes: int
    unit: int  # bytes of an element
    arguments: dict[str, tuple[int, int]] = field(default_factory=dict)  # first element and one past the last
    covered: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    touched: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    places: dict[str, NDArray[np.int32]] = field(default_factory=dict)  # the line of the last touch

    def open(self) -> None:
        """Makes the shadow arrays, once all arguments are known."""
        size = -(-self.bytes // self.unit)
        self.covered = np.zeros(size, bool)
        for first, end in self.arguments.values():
            self.covered[first:end] = True
        for access in ("load", "store", "atomic"):
            self.touched[access] = np.zeros(size, np.int32)
            self.places[access] = np.zeros(size, np.int32)

    def reach(self) -> tuple[int, int]:
        """Returns the addresses between which a pointer is taken as meant for this storage."""
        margin = _MARGIN + self.bytes
        return self.base - margin, self.base + self.bytes + margin

    def name(self, index: int) -> tuple[str, int]:
        """Returns the argument that an element belongs to, or lies nearest to, and its index there."""
        spans = self.arguments.items()
        argument, (first, _) = min(spans, key=lambda item: max(item[1][0] - index, index - (item[1][1] - 1), 0))
        return argument, index - first


# Which earlier touches, by another program, make an access a race.
_CLASHES = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}


class _Watch:
    """Watches one launch at a time and gathers findings over all of them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.known: dict[tuple[str, str, str, str, int], Finding] = {}
        self.kernel = ""
        self.storages: list[_Storage] = []

    # ---- arguments --------------------------------------------------------------------------------------------------------------

    def host(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Moves the tensors of a launch into buffers with margins; stands in for GridExecutor._init_args_hst."""
        self.kernel = executor.fn.__name__
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        found: dict[int, _Storage] = {}
        for tensor in (x for x in named.values() if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            known = found.get(storage.data_ptr())
            if known is None:
                buffer, base = _margined(storage)
                found[storage.data_ptr()] = _Storage(buffer, base, storage.nbytes(), tensor.element_size())
            else:
                known.unit = min(known.unit, tensor.element_size())

        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                assert not hasattr(value, "data_ptr"), f"{self.kernel}: argument {name} is a {type(value).__name__}"
                return value
            home = found[value.untyped_storage().data_ptr()]
            scale = value.element_size() // home.unit
            first = int(value.storage_offset()) * scale
            extent = 1 + sum((int(n) - 1) * int(s) for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
            home.arguments[name] = (first, first + extent * scale)
            offset = (home.base - home.buffer.data_ptr()) // value.element_size() + value.storage_offset()
            return value.new_empty(0, device="cpu").set_(home.buffer.untyped_storage(), offset, value.shape, value.stride())

        out = {name: moved(name, value) for name, value in named.items()}
        self.storages = sorted(found.values(), key=lambda s: s.base)
        for home in self.storages:
            home.open()
        positional = [out[name] for name, _ in zip(executor.arg_names, args, strict=False)]
        return positional, {name: out[name] for name in kwargs}

    def restore(self, args: tuple[Any, ...], args_host: list[Any], kwargs: dict[str, Any], kwargs_host: dict[str, Any]) -> None:
        """Copies the buffers back; stands in for GridExecutor._restore_args_dev."""
        pairs = [*zip(args, args_host, strict=True), *((v, kwargs_host[k]) for k, v in kwargs.items())]
        for mine, host in pairs:
            if isinstance(mine, torch.Tensor):
                buffer = next(s for s in self.storages if s.buffer.untyped_storage().data_ptr() == host.untyped_storage().data_ptr())
                inner = buffer.buffer[buffer.base - buffer.buffer.data_ptr() :][: buffer.bytes]
                target = torch.empty(0, dtype=torch.uint8, device=mine.device)
                target.set_(mine.untyped_storage(), 0, (buffer.bytes,), (1,)).copy_(inner)
        self.storages = []

    # ---- accesses ---------------------------------------------------------------------------------------------------------------

    def see(self, pointers: Any, mask: Any, access: str) -> NDArray[np.bool_]:
        """Checks one access of the running program and returns the mask without what is out of bounds."""
        at, allowed = np.broadcast_arrays(pointers.data, mask.data)
        allowed = allowed.copy()
        addresses = at[allowed].astype(np.int64)
        if not addresses.size:
            return allowed
        good = np.zeros(addresses.size, bool)
        seen = np.zeros(addresses.size, bool)
        for storage in self.storages:
            low, high = storage.reach()
            mine = (addresses >= low) & (addresses < high) & ~seen
            if mine.any():
                seen |= mine
                good[mine] = self._touch(storage, (addresses[mine] - storage.base) // storage.unit, access)
        if not seen.all():
            stray = int(addresses[~seen][0])
            nearest = min(self.storages, key=lambda s: abs(stray - s.base))
            self._find("out of bounds", access, *nearest.name((stray - nearest.base) // nearest.unit), count=int((~seen).sum()))
        allowed[allowed] = good
        return allowed

    def _touch(self, storage: _Storage, index: Indices, access: str) -> NDArray[np.bool_]:
        inside = (index >= 0) & (index < storage.covered.size)
        inside[inside] = storage.covered[index[inside]]
        if not inside.all():
            strays = index[~inside]
            self._find("out of bounds", access, *storage.name(int(strays[0])), count=strays.size)
        index = index[inside]
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, height, depth = interpreter.interpreter_builder.grid_dim
        program = 1 + z + depth * (y + height * x)
        for earlier in _CLASHES[access]:
            touched = storage.touched[earlier]
            who = touched[index]
            clash = (who != _NONE) & (who != program)
            if clash.any():
                first = int(index[clash][0])
                by = "several programs" if touched[first] == _SEVERAL else f"program {_place(int(touched[first]), height, depth)}"
                other = f"the {earlier} by {by} at line {storage.places[earlier][first]}"
                self._find("race", access, *storage.name(first), other=other, count=int(clash.sum()))
        mine = storage.touched[access]
        who = mine[index]
        mine[index] = np.where((who == _NONE) | (who == program) | (access == "store"), program, _SEVERAL)
        storage.places[access][index] = _line()[1]
        return inside

    def _find(self, kind: str, access: str, argument: str, index: int, other: str = "", count: int = 0) -> None:
        file, line = _line()
        key = (kind, access, self.kernel, argument, line)
        if key not in self.known:
            program = interpreter.interpreter_builder.grid_idx
            self.known[key] = Finding(kind, access, self.kernel, argument, file, line, program, index, other)
            self.findings.append(self.known[key])
        self.known[key].count += count


def _place(number: int, height: int, depth: int) -> Program:
    rest, z = divmod(number - 1, depth)
    x, y = divmod(rest, height)
    return x, y, z


def _line() -> tuple[str, int]:
    """Returns the file and line of the kernel that is running: the innermost frame that is neither ours nor Triton's."""
    frame = sys._getframe(1)
    inner = ("triton", "lagen.verify.sanitize", "unittest")
    while frame.f_back is not None:
        # A kernel that the interpreter rewrote runs in its own module's globals, under its own file's name.
        module = frame.f_globals.get("__name__", "")
        if not (module == inner[1] or module.split(".")[0] in (inner[0], inner[2])):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _margined(storage: torch.UntypedStorage) -> tuple[torch.Tensor, int]:
    """Copies a storage into a buffer with margins; returns the buffer and the copy's address, aligned to 64 bytes."""
    size = storage.nbytes()
    margin = (_MARGIN + size + 63) // 64 * 64
    buffer = torch.from_numpy(np.empty(size + 2 * margin + 64, np.uint8))  # numpy's: torch's would be filled, margins and all
    start = margin - buffer.data_ptr() % 64
    if size:
        buffer[start : start + size].copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,)))
    return buffer, buffer.data_ptr() + start


def _poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **options: Any) -> torch.Tensor:
        x = make(*args, **options)
        if x.dtype.is_floating_point or x.dtype.is_complex:
            return x.fill_(math.nan)
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)

    return made


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch.empty and its kin make inside the block with NaN (the largest number, where integers).

    Not by torch's own switch, which needs use_deterministic_algorithms: under that an operator takes one form and no tuned config.
    """
    made = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty", "new_empty_strided")}
    with ExitStack() as stack:
        for where, names in made.items():
            for name in names:
                stack.enter_context(mock.patch.object(where, name, _poison(getattr(where, name))))
        yield


@contextmanager
def sanitize() -> Iterator[list[Finding]]:
    """Watches every interpreted launch inside the block; the list fills with one Finding a line and fault.

    An access out of bounds is left out (a load gives its ``other``, or 0), so that the process survives it.
    """
    watch = _Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def masked(pointers: Any, mask: Any, access: str) -> Any:
        return interpreter.TensorHandle(watch.see(pointers, mask, access), mask.dtype)

    def everywhere(pointers: Any) -> Any:
        return interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), interpreter.tl.int1)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, masked(pointers, mask, "load"), *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, masked(pointers, mask, "store"), *rest)

    def watched_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return rmw(self, op, pointers, value, masked(pointers, mask, "atomic"), *rest)

    def watched_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        if not watch.see(pointers, everywhere(pointers), "atomic").all():
            raise IndexError(f"{watch.kernel}: compare-and-swap outside its tensor, at line {_line()[1]}")
        return cas(self, pointers, *rest)

    def host(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return watch.host(self, args, kwargs)

    def restore(self: Any, *rest: Any) -> None:
        watch.restore(*rest)

    with (
        faithful(),
        poisoned(),
        mock.patch.multiple(
            builder,
            create_masked_load=watched_load,
            create_masked_store=watched_store,
            create_atomic_rmw=watched_rmw,
            create_atomic_cas=watched_cas,
        ),
        mock.patch.multiple(executor, _init_args_hst=host, _restore_args_dev=restore),
    ):
        yield watch.findings
