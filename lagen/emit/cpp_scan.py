"""Scans in C++: running maxima, and states with a decay for every element, whose log is computed where it is used.

A dense state lies as [block of lanes][row][lane]. What of its log-decay no token changes (exp(A_log)) is computed once and lies
likewise, as a vector of the made-up dim "lanes|rows"; the rest is printed into the sweep's innermost loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lagen.ir import expr as E
from lagen.ir.expr import Expr, walk
from lagen.ir.scalar import FUNCTIONS

NUMBERS = ("const", "size", "scale")


@dataclass(frozen=True)
class Elements:
    """A log-decay with a number for every element: ``flats`` pairs what no token changes with what lies like the state."""

    log: Expr
    flats: tuple[tuple[Expr, Expr], ...]

    @property
    def inside(self) -> tuple[Expr, ...]:
        """Lists what is computed element by element, operands first."""
        flat = dict(self.flats)
        seen: set[Expr] = set()
        out: list[Expr] = []

        def visit(n: Expr) -> None:
            if n in seen or n in flat or len(n.dims) < 2:
                return
            seen.add(n)
            for a in n.args:
                visit(a)
            out.append(n)

        visit(self.log)
        return tuple(out)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Lists the arrays that it takes: numbers and vectors of a token, and what lies like the state."""
        flat, inside = dict(self.flats), set(self.inside)
        roots = [self.log] if not inside else [a for n in self.inside for a in n.args]
        taken = [flat.get(a, a) for a in roots if a not in inside]
        return tuple(dict.fromkeys(a for a in taken if a.op not in NUMBERS))


def unprinted(g: Expr) -> str:
    """This function says what in a log-decay has no form element by element; "" where all has."""
    for n in walk(g):
        if len(n.dims) > 1 and n.op not in (*FUNCTIONS, "param", "outer", "pow", "expand"):
            return f"{n} has two dims a token"
    return ""


def elements(g: Expr, lanes: str, rows: str) -> Elements:
    """This function splits a log-decay into what no token changes and the rest; the clamp is left to the exponential."""
    log = g.args[0] if g.op == "logdecay" else g
    made: dict[Expr, Expr | None] = {}

    def flat(n: Expr) -> Expr | None:
        if n not in made:
            made[n] = None
            if n.op == "param" and len(n.dims) > 1:
                made[n] = Expr("param", name=n.name, dims=(f"{lanes}|{rows}",), head=n.head)
            elif n.op in (*FUNCTIONS, "pow") and not n.token and len(n.dims) > 1:
                args = [a if a.op in NUMBERS else flat(a) for a in n.args]
                if all(a is not None for a in args):
                    made[n] = E.rebuild(n, tuple(a for a in args if a is not None))
        return made[n]

    pairs: dict[Expr, Expr] = {}

    def visit(n: Expr) -> None:
        found = flat(n) if len(n.dims) > 1 else None
        if found is not None:
            pairs[n] = found
            return
        for a in n.args:
            if len(n.dims) > 1:
                visit(a)

    visit(log)
    return Elements(log, tuple(pairs.items()))


def dense_sweep(
    e: Elements,
    label: str,
    dims: tuple[str, str],
    writes: list[tuple[Expr, Expr]],
    reads: Sequence[Expr],
    row: Callable[[Expr], str],
    formula: Callable[[Expr, list[str]], str],
) -> list[str]:
    """This function prints a forward walk of a dense state: ``dims`` are (lanes, rows), ``writes`` (on rows, on lanes).

    ``reads`` are readouts over the rows; ``row`` gives a value's row, where it has tokens that of token i.
    """
    lanes, rows = dims
    before: list[str] = []
    body: list[str] = []
    known: dict[Expr, str] = {}

    def fresh(stem: str) -> str:
        return f"{stem}{len(known)}"

    def value(n: Expr) -> str:
        """Names a value in the innermost loop, after a line that loads it where it is loaded."""
        if n.op == "const":
            return f"splat({n.value!r}f)" if "e" in repr(n.value) or "." in repr(n.value) else f"splat({n.value!r}.0f)"
        if n.op == "size":
            return f"splat((float)z.full_{n.name})"
        if n.op == "scale":
            return "splat(z.scale)"
        if n in known:
            return known[n]
        known[n] = fresh("x")
        if n.dims == (lanes,):
            before.append(f"const vf {known[n]} = at({row(n)} + lane);")
        elif n.dims == (rows,):
            body.append(f"const vf {known[n]} = splat(({row(n)})[r]);")
        elif not n.dims:
            before.append(f"const vf {known[n]} = splat(*({row(n)}));")
        else:
            body.append(f"const vf {known[n]} = at({row(n)} + (lane / LANES * z.size_{rows} + r) * LANES);")
        return known[n]

    flat = dict(e.flats)

    def operand(n: Expr) -> str:
        return known[n] if n in known else value(flat.get(n, n))

    for n in e.inside:
        args = [operand(a) for a in n.args]
        if n.op == "outer":
            text = f"{args[0]} * {args[1]}"
        elif n.op == "expand":
            text = args[0]
        else:
            text = formula(n, args)
        known[n] = fresh("x")
        body.append(f"const vf {known[n]} = {text};")
    log = operand(e.log)
    body.append("vf y = at(s + r * LANES);")

    def read(at: str) -> None:
        for i, r in enumerate(reads):
            if r.attr("at") == at:
                body.append(f"o{i} += y * {value(r.args[0])};")

    read("previous")
    body.append(f"y *= exp_of_decay({log});")
    read("decayed")
    for on_row, on_lane in writes:
        body.append(f"y += {value(on_lane)} * {value(on_row)};")
    read("now")
    body.append("put(s + r * LANES, y);")
    sums = [f"vf o{i}{{}};" for i in range(len(reads))]
    ends = [f"put({row(r)} + lane, o{i});" for i, r in enumerate(reads)]
    return [
        f"for (long lane = 0; lane < z.pad_{lanes}; lane += LANES) {{",
        f"  float* s = w.{label}.s + lane * z.size_{rows};",
        "  for (long i = 0; i < n; ++i) {",
        *(f"    {x}" for x in (*before, *sums)),
        f"    for (long r = 0; r < z.size_{rows}; ++r) {{",
        *(f"      {x}" for x in body),
        "    }",
        *(f"    {x}" for x in ends),
        "  }",
        "}",
    ]
