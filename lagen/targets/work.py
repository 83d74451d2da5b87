"""Work: what one program of a kernel does, counted from Triton's own intermediate code (TTIR) before any device is chosen.

What it is: bytes loaded and stored by argument, multiply-adds by kind, and element operations, in a nest of loops whose trip counts are
formulas of the launch's scalars and of the program's number, and so are the conditions of its branches: a kernel whose programs have
different roles is counted role by role. What it is not: it does not know kinds of kernels or variants; whatever compiles can be counted.
Both branches of a condition that depends on data are counted, and a loop whose bounds do is taken once.

Who makes it: targets/worker, when a kernel is compiled. Who reads it: targets/model, which gives the scalars their values.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Formula = int | str | list[Any] | None
"""A whole number, the name of a scalar argument or PROGRAM, [op, formula, formula], or None where it depends on data."""

PROGRAM = "%pid"
"""In a formula: the number of the program in its launch."""

SAMPLE = 512
"""Programs of a launch that are evaluated, where there are more."""

_COMPARED = {"slt": "lt", "ult": "lt", "sle": "le", "ule": "le", "sgt": "gt", "ugt": "gt", "sge": "ge", "uge": "ge", "eq": "eq", "ne": "ne"}

_SCALARS = {
    "arith.addi": "add",
    "arith.subi": "sub",
    "arith.muli": "mul",
    "arith.divsi": "div",
    "arith.divui": "div",
    "arith.remsi": "rem",
    "arith.remui": "rem",
    "arith.minsi": "min",
    "arith.minui": "min",
    "arith.maxsi": "max",
    "arith.maxui": "max",
}
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": min,
    "max": max,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
_AMOUNTS = ("elements", "special", "reduced", "gathered")
_COPIES = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast")
_POINTERS = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "tt.trans", "ttg.convert_layout")
_SPECIAL = (
    "math.exp",
    "math.log",
    "math.sqrt",
    "math.rsqrt",
    "math.sin",
    "math.cos",
    "math.erf",
    "math.tanh",
    "arith.divf",
    "tt.precise_divf",
)
_FREE = ("tt.", "arith.constant", "scf.", "ttg.")
_LINE = re.compile(r"^(?:(%[\w#:-]+(?:, %[\w#:-]+)*) = )?\"?([a-z_]+\.[a-z_0-9.]+)\"?(.*)$")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)([^<>]*(?:<[^<>]*>)?)")
_NAME = re.compile(r"%[\w-]+")  # the constant -1 is %c-1_i32
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64}


@dataclass
class Nest:
    """A loop, a branch, or the whole program. ``trips``: how often it runs for one run of what is around it; amounts are of one trip."""

    trips: Formula = 1
    loop: bool = False
    loads: Counter[str] = field(default_factory=Counter)  # bytes, by argument
    stores: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)  # of tt.dot, by kind: half, tf32, float
    dots: int = 0
    elements: int = 0  # results of element operations on floats and integers
    special: int = 0  # results of exp, log, division and the like
    reduced: int = 0  # elements that reductions and scans take
    gathered: int = 0  # elements that are looked up in a tile, which goes through shared memory
    inner: list[Nest] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the nest as plain data, without what is zero."""
        whole = {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items() if k != "inner"}
        made = {k: v for k, v in whole.items() if v or k == "trips"}
        return made | ({"inner": [n.to_json() for n in self.inner]} if self.inner else {})


@dataclass(frozen=True)
class Work:
    """What a program of a launch does on the average, over all its loops.

    Of the program with most of them, ``chain`` counts loop trips one after the other and ``dots`` the matrix products in them.
    """

    loads: Mapping[str, float]
    stores: Mapping[str, float]
    flops: Mapping[str, float]
    elements: float
    special: float
    reduced: float
    gathered: float
    dots: float
    chain: float


def count(ttir: str) -> Nest:
    """Counts a kernel's TTIR."""
    top = Nest()
    stack = [top]
    closers: list[bool] = []  # for every open brace: whether it closes a nest
    known: dict[str, Formula] = {}
    bases: dict[str, str] = {}
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*$", "", raw).strip()
        if line.startswith("tt.func"):
            for name in re.findall(r"%(\w+): ", raw):
                known[f"%{name}"], bases[f"%{name}"] = name, name
        found = _LINE.match(line)
        reduced = re.match(r"\}\) : \(tensor<([\dx]+)x", line)  # the end of a reduction or scan says what it takes
        if reduced:
            stack[-1].reduced += math.prod(int(n) for n in reduced[1].split("x"))
        if found and found[2] == "scf.for":
            nest = _loop(line, known, bases)
            stack[-1].inner.append(nest)
            stack.append(nest)
            closers.append(True)
            continue
        if found and found[2] == "scf.if":
            _open(stack, closers, known.get(_NAME.findall(found[3])[0]))
            continue
        if line.startswith("} else {") and closers and closers[-1]:
            closers.pop()
            met = stack.pop().trips
            _open(stack, closers, None if met is None else ["sub", 1, met])
            continue
        if found and not line.startswith("tt.func"):
            _statement(stack[-1], found[1] or "", found[2], found[3], known, bases)
        opened, closed = line.count("{") - _inline(line), line.count("}") - _inline(line)
        for _ in range(max(0, closed)):
            if closers and closers.pop():
                stack.pop()
        closers += [False] * max(0, opened)
    return top


def _open(stack: list[Nest], closers: list[bool], trips: Formula) -> None:
    """Goes into a branch."""
    stack[-1].inner.append(Nest(trips))
    stack.append(stack[-1].inner[-1])
    closers.append(True)


def _inline(line: str) -> int:
    """Counts braces that open and close on the same line: attributes."""
    return len(re.findall(r"\{[^{}]*\}", line))


def _loop(line: str, known: dict[str, Formula], bases: dict[str, str]) -> Nest:
    """Opens a loop: its trips, and where its carried pointers come from."""
    variable, low, high, step = (_NAME.findall(line.partition("scf.for")[2])[i] for i in range(4))
    first, last, by = (known.get(n) for n in (low, high, step))
    known[variable] = None
    for inner, outer in re.findall(r"(%[\w-]+) = (%[\w-]+)", line.partition("iter_args")[2]):
        if outer in bases:
            bases[inner] = bases[outer]
    if first is None or last is None or by is None:
        return Nest(trips=1, loop=True)
    return Nest(trips=["max", 0, ["div", ["add", ["sub", last, first], ["sub", by, 1]], by]], loop=True)


def _statement(nest: Nest, result: str, op: str, rest: str, known: dict[str, Formula], bases: dict[str, str]) -> None:
    """Counts one statement, and remembers what it says of scalars and pointers."""
    operands = _NAME.findall(rest.partition(" : ")[0])
    tensors = [(math.prod(int(n) for n in shape.split("x") if n), kind) for shape, kind in _TENSOR.findall(rest)]
    if op in _POINTERS and operands and operands[0] in bases:
        bases[result] = bases[operands[0]]
    if op == "arith.constant" and not tensors:
        number = re.match(r"\s*(-?\d+) : i\d+", rest)
        known[result] = int(number[1]) if number else None
    elif op == "tt.get_program_id":
        known[result] = PROGRAM if rest.split()[0] == "x" else 0
    elif op == "arith.cmpi" and not tensors:
        how = _COMPARED[rest.split()[0].rstrip(",")]
        left, right = (known.get(n) for n in operands)
        known[result] = None if left is None or right is None else [how, left, right]
    elif op in _SCALARS and not tensors and len(operands) == 2:
        left, right = (known.get(n) for n in operands)
        known[result] = None if left is None or right is None else [_SCALARS[op], left, right]
    elif op in _COPIES and not tensors:
        known[result] = known.get(operands[0])
    elif op in ("tt.load", "tt.store"):
        kind = nest.loads if op == "tt.load" else nest.stores
        pointed = re.search(r"!tt\.ptr<(\w+)>", rest)
        assert pointed is not None, rest
        kind[bases.get(operands[0], "?")] += (tensors[0][0] if tensors else 1) * _BITS.get(pointed[1], 32) // 8
    elif op in ("tt.atomic_rmw", "tt.atomic_cas"):
        nest.stores[bases.get(next((n for n in operands if n in bases), ""), "?")] += 4 * (tensors[0][0] if tensors else 1)
    elif op == "tt.dot":
        _dot(nest, rest)
    elif op == "tt.gather":
        nest.gathered += tensors[-1][0]
    elif tensors and result and op in _SPECIAL:
        nest.special += tensors[-1][0]
    elif tensors and result and not op.startswith(_FREE):
        nest.elements += tensors[-1][0]


def _dot(nest: Nest, rest: str) -> None:
    """Counts a matrix product: its multiply-adds as two, three times where a float is taken as three tf32 products."""
    left, right, _ = re.findall(r"tensor<([\dx]+)x(\w+)>", rest)[-3:]
    rows, inner = (int(n) for n in left[0].split("x")[-2:])
    columns = int(right[0].split("x")[-1])
    precision = re.search(r"inputPrecision = (\w+)", rest)
    kind = "half" if left[1] in ("bf16", "f16") else "tf32" if precision and precision[1].startswith("tf32") else "float"
    times = 3 if precision and precision[1] == "tf32x3" and kind == "tf32" else 1
    nest.flops[kind] += 2 * rows * inner * columns * times
    nest.dots += times


def evaluate(formula: Formula, values: Mapping[str, int]) -> int:
    """Computes a formula; a scalar whose value is not known counts as 1."""
    if formula is None:
        return 1
    if isinstance(formula, int):
        return formula
    if isinstance(formula, str):
        return values.get(formula, 1)
    op, left, right = formula[0], evaluate(formula[1], values), evaluate(formula[2], values)
    if op in ("div", "rem"):
        return (left // right if op == "div" else left % right) if right else 0
    return int(_OPERATIONS[op](left, right))


def work(nest: Mapping[str, Any], values: Mapping[str, int], programs: int = 1) -> Work:
    """Adds up a nest (as JSON) for the scalars of a launch of so many programs: all of them, or a sample spread over them."""
    if not _mentions(nest, PROGRAM):
        programs = 1
    sample = range(programs) if programs <= SAMPLE else [int(i * 0.6180339887498949 % 1 * programs) for i in range(SAMPLE)]
    done = [_one(nest, {**values, PROGRAM: i}) for i in sample]
    longest = max(done, key=lambda w: (w.chain, w.dots))

    def mean(group: str) -> dict[str, float]:
        names = dict.fromkeys(name for w in done for name in getattr(w, group))
        return {name: sum(getattr(w, group).get(name, 0.0) for w in done) / len(done) for name in names}

    amounts = {name: sum(getattr(w, name) for w in done) / len(done) for name in _AMOUNTS}
    return Work(mean("loads"), mean("stores"), mean("flops"), **amounts, dots=longest.dots, chain=longest.chain)


def _mentions(value: Any, name: str) -> bool:
    """Tells whether a name stands in plain data."""
    if isinstance(value, Mapping):
        return any(_mentions(v, name) for v in value.values())
    return any(_mentions(v, name) for v in value) if isinstance(value, list) else bool(value == name)


def _one(nest: Mapping[str, Any], values: Mapping[str, int]) -> Work:
    """Adds up what one program does."""
    totals: dict[str, dict[str, float]] = {k: {} for k in ("loads", "stores", "flops")}
    plain: dict[str, float] = {}

    def descend(n: Mapping[str, Any], times: float) -> None:
        times *= evaluate(n.get("trips", 1), values)
        if not times:
            return
        for group, total in totals.items():
            for name, amount in n.get(group, {}).items():
                total[name] = total.get(name, 0.0) + times * amount
        for name in (*_AMOUNTS, "dots"):
            plain[name] = plain.get(name, 0.0) + times * n.get(name, 0)
        if n.get("loop"):
            plain["chain"] = plain.get("chain", 0.0) + times
        for inner in n.get("inner", ()):
            descend(inner, times)

    descend(nest, 1.0)
    return Work(totals["loads"], totals["stores"], totals["flops"], **{k: plain.get(k, 0.0) for k in (*_AMOUNTS, "dots", "chain")})
