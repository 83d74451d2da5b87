"""Scans in C++: states with a decay for every element, whose log is computed where it is used, forward and backward.

A dense state lies as [block of lanes][row][lane]. What of its log-decay no token changes (exp(A_log)) is computed once and lies
likewise, as a vector of the made-up dim "lanes|rows"; the rest is printed into the innermost loop. Backward a tile is walked twice:
forward from the state that was kept before it, to know what every token found and by what it was multiplied, then in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lagen.ir import expr as E
from lagen.ir.expr import Expr, walk
from lagen.ir.scalar import FUNCTIONS

NUMBERS = ("const", "size", "scale")
MATRIX_OPS = (*FUNCTIONS, "param", "outer", "pow", "expand")


@dataclass(frozen=True)
class Elements:
    """Values with a number for every element: ``roots``, and ``flats``, which pairs what no token changes with what lies like the state."""

    roots: tuple[Expr, ...]
    flats: tuple[tuple[Expr, Expr], ...]

    @property
    def inside(self) -> tuple[Expr, ...]:
        """Lists what is computed element by element, operands first."""
        flat = dict(self.flats)
        seen: set[Expr] = set()
        out: list[Expr] = []

        def visit(n: Expr) -> None:
            if n in seen or n in flat or n.op == "readout" or len(n.dims) < 2:
                return
            seen.add(n)
            for a in n.args:
                visit(a)
            out.append(n)

        for root in self.roots:
            visit(root)
        return tuple(out)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Lists the arrays that it takes: numbers and vectors of a token, and what lies like the state."""
        flat, inside = dict(self.flats), set(self.inside)
        taken = [a for n in inside for a in n.args] + [r for r in self.roots if r not in inside]
        arrays = [flat.get(a, a) for a in taken if a not in inside and not (a.op == "readout" and len(a.dims) > 1)]
        return tuple(dict.fromkeys(a for a in arrays if a.op not in NUMBERS))


def unprinted(g: Expr) -> str:
    """This function says what in a value with two dims has no form element by element; "" where all has."""
    for n in walk(g):
        if len(n.dims) > 1 and n.op not in MATRIX_OPS and not (n.op == "readout" and not n.attr("dim")):
            return f"{n} has two dims a token"
    return ""


def log_of(g: Expr) -> Expr:
    """This function returns a log-decay without its clamp, which is left to the exponential."""
    return g.args[0] if g.op == "logdecay" else g


def elements(roots: Iterable[Expr], lanes: str, rows: str) -> Elements:
    """This function splits values with two dims into what no token changes and the rest."""
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

    whole = tuple(roots)
    for root in whole:
        visit(root)
    return Elements(whole, tuple(pairs.items()))


@dataclass
class _Lines:
    """The text of one walk as it grows: ``before`` the rows of a token, and the ``body`` for each of them."""

    lanes: str
    rows: str
    row: Callable[[Expr], str]
    formula: Callable[[Expr, list[str]], str]
    flats: dict[Expr, Expr]
    stem: str = "x"
    known: dict[Expr, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def of(self, n: Expr) -> str:
        """Names a value in the innermost loop, after a line that loads or computes it."""
        if n.op == "const":
            return f"splat({n.value!r}f)" if "e" in repr(n.value) or "." in repr(n.value) else f"splat({n.value!r}.0f)"
        if n.op == "size":
            return f"splat((float)z.full_{n.name})"
        if n.op == "scale":
            return "splat(z.scale)"
        if n in self.known:
            return self.known[n]
        args = [] if n in self.flats or len(n.dims) < 2 else [self.of(a) for a in n.args]
        name = self.known[n] = f"{self.stem}{len(self.known)}"
        if n in self.flats:
            self.body.append(f"const vf {name} = at({self.row(self.flats[n])} + (lane / LANES * z.size_{self.rows} + r) * LANES);")
        elif n.dims == (self.lanes,):
            self.before.append(f"const vf {name} = at({self.row(n)} + lane);")
        elif n.dims == (self.rows,):
            self.body.append(f"const vf {name} = splat(({self.row(n)})[r]);")
        elif not n.dims:
            self.before.append(f"const vf {name} = splat(*({self.row(n)}));")
        elif n.op == "outer":
            self.body.append(f"const vf {name} = {args[0]} * {args[1]};")
        elif n.op == "expand":
            self.body.append(f"const vf {name} = {args[0]};")
        else:
            self.body.append(f"const vf {name} = {self.formula(n, args)};")
        return name

    def put(self, lines: list[str], indent: int, head: str) -> list[str]:
        """Returns the lines of one token: ``lines`` after what comes before the rows, then the rows."""
        return [
            *(" " * indent + x for x in (*self.before, *lines)),
            " " * indent + head,
            *(" " * (indent + 2) + x for x in self.body),
            " " * indent + "}",
        ]


Row = Callable[[Expr], str]
Formula = Callable[[Expr, list[str]], str]
Pair = tuple[Expr, Expr]


def dense_sweep(
    e: Elements, label: str, dims: tuple[str, str], writes: Sequence[Pair], reads: Sequence[Expr], row: Row, formula: Formula
) -> list[str]:
    """This function prints a forward walk of a dense state: ``dims`` are (lanes, rows), ``writes`` (on rows, on lanes).

    ``reads`` are readouts over the rows; ``row`` gives a value's row, where it has tokens that of token i.
    """
    lanes, rows = dims
    x = _Lines(lanes, rows, row, formula, dict(e.flats))
    log = x.of(e.roots[0])
    x.body.append("vf y = at(s + r * LANES);")

    def read(at: str) -> None:
        for i, r in enumerate(reads):
            if r.attr("at") == at:
                x.body.append(f"o{i} += y * {x.of(r.args[0])};")

    read("previous")
    x.body.append(f"y *= exp_of_decay({log});")
    read("decayed")
    for on_row, on_lane in writes:
        x.body.append(f"y += {x.of(on_lane)} * {x.of(on_row)};")
    read("now")
    x.body.append("put(s + r * LANES, y);")
    return [
        f"for (long lane = 0; lane < z.pad_{lanes}; lane += LANES) {{",
        f"  float* s = w.{label}.s + lane * z.size_{rows};",
        "  for (long i = 0; i < n; ++i) {",
        *x.put([f"vf o{i}{{}};" for i in range(len(reads))], 4, f"for (long r = 0; r < z.size_{rows}; ++r) {{"),
        *(f"    put({row(r)} + lane, o{i});" for i, r in enumerate(reads)),
        "  }",
        "}",
    ]


@dataclass(frozen=True)
class Walk:
    """A reverse walk of a dense state's gradient: names, what both states write (on rows, on lanes) and read, what is summed.

    ``own`` reads the gradient state, ``found`` the state itself; ``sums`` pairs a reduction (sum or contract) with the value that it
    makes, ``gathers`` the array that adds up a param's gradient with its addend.
    """

    labels: tuple[str, str]
    dims: tuple[str, str]
    writes: tuple[tuple[Pair, ...], tuple[tuple[Pair, bool], ...]]
    own: tuple[Expr, ...]
    found: tuple[Expr, ...]
    sums: tuple[Pair, ...]
    gathers: tuple[tuple[str, Expr], ...]


def dense_back(e: Elements, walk: Walk, row: Row, formula: Formula) -> list[str]:
    """This function prints a tile's walk: forward from what the state was before it, then the gradient in reverse.

    ``e``'s first root is the log-decay. A sum over lanes is kept as a vector for every token and row until all lanes were there.
    """
    (state, back), (lanes, rows) = walk.labels, walk.dims
    there = _Lines(lanes, rows, row, formula, dict(e.flats), "f")
    log = there.of(e.roots[0])
    there.body += ["vf y = at(s + r * LANES);", "put(w.was + (i * z.size_ROWS + r) * LANES, y);".replace("ROWS", rows)]
    there.body += [
        f"const vf d = exp_of_decay({log});",
        f"put(w.decays + (i * z.size_{rows} + r) * LANES, d);",
        "y *= d;",
    ]
    there.body += [f"y += {there.of(on_lane)} * {there.of(on_row)};" for on_row, on_lane in walk.writes[0]]
    there.body.append("put(s + r * LANES, y);")

    x = _Lines(lanes, rows, row, formula, dict(e.flats))
    x.body += [
        f"const long cell = (i * z.size_{rows} + r) * LANES;",
        "const vf d = at(w.decays + cell), was = at(w.was + cell), decayed = was * d;",
        "const vf later = at(s + r * LANES);",
    ]
    if any(r.attr("at") == "now" for r in walk.found):
        x.body.append("vf now = decayed;")
        x.body += [f"now += {x.of(on_lane)} * {x.of(on_row)};" for on_row, on_lane in walk.writes[0]]
    x.body.append("vf since = later;")
    x.body += [f"since += {x.of(on_lane)} * {x.of(on_row)};" for (on_row, on_lane), decayed in walk.writes[1] if decayed]
    moment = {"previous": "was", "decayed": "decayed", "now": "now", "later": "later", "since": "since"}
    for r in (n for root in e.roots for n in E.walk(root) if n.op == "readout" and len(n.dims) > 1):
        x.known[r] = moment[r.attr("at")]
    over_lanes, over_rows = list[Expr](), list[Expr]()

    def add(made: Expr, over: str, term: str) -> None:
        if over == rows:
            x.body.append(f"o{len(over_rows)} += {term};")
            over_rows.append(made)
        else:
            place = f"w.part + ({len(over_lanes)} * TILE * z.size_{rows} + i * z.size_{rows} + r) * LANES"
            x.body.append(f"put({place}, at({place}) + keep({term}, z.size_{lanes} - lane));")
            over_lanes.append(made)

    for r in (*walk.own, *walk.found):
        add(r, r.attr("dim"), f"{moment[r.attr('at')]} * {x.of(r.args[0])}")
    for reduction, made in walk.sums:
        add(made, reduction.attr("dim"), " * ".join(x.of(a) for a in reduction.args))
    for name, addend in walk.gathers:
        place = f"{name} + (lane * z.size_{rows} + r * LANES)"
        x.body.append(f"put({place}, at({place}) + {x.of(addend)});")
    x.body.append("vf y = since * d;")
    x.body += [f"y += {x.of(on_lane)} * {x.of(on_row)};" for (on_row, on_lane), decayed in walk.writes[1] if not decayed]
    x.body.append("put(s + r * LANES, y);")

    each_row = f"for (long r = 0; r < z.size_{rows}; ++r) {{"
    lines = [f"memset(w.part, 0, 4 * {len(over_lanes)} * TILE * z.size_{rows} * LANES);"] if over_lanes else []
    lines += [f"for (long lane = 0; lane < z.pad_{lanes}; lane += LANES) {{", f"  float* s = w.{state}.s + lane * z.size_{rows};"]
    lines += ["  for (long i = 0; i < n; ++i) {", *there.put([], 4, each_row), "  }", f"  s = w.{back}.s + lane * z.size_{rows};"]
    lines += ["  for (long i = n - 1; i >= 0; --i) {", *x.put([f"vf o{i}{{}};" for i in range(len(over_rows))], 4, each_row)]
    lines += [*(f"    put({row(r)} + lane, o{i});" for i, r in enumerate(over_rows)), "  }", "}"]
    if over_lanes:
        lines += ["for (long i = 0; i < n; ++i)", f"  for (long r = 0; r < z.size_{rows}; ++r) {{"]
        for k, r in enumerate(over_lanes):
            place = f"w.part + ({k} * TILE * z.size_{rows} + i * z.size_{rows} + r) * LANES"
            lines.append(f"    ({row(r)})[r] = total(at({place}));")
        lines.append("  }")
    return lines
