"""Prints one direction of a variant in C++, forward, backward or step: its arrays, and the loops and sweeps of its passes.

What comes in is a Program of emit/cpp_plan; emit/cpp puts the text into a file. The printer is closed: an op it does not know raises
and names itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lagen.emit.cpp_fit import REDUCTIONS
from lagen.emit.cpp_plan import POST, Back, Loop, Pass, Program, Resize, Step, Suffix, Sweep
from lagen.emit.cpp_scan import Walk, dense_back, dense_sweep
from lagen.ir import expr as E
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Recurrence, Solve
from lagen.ir.scalar import FUNCTIONS

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_POWERS = {
    2.0: "{0} * {0}",
    3.0: "{0} * {0} * {0}",
    -1.0: "1.0f / {0}",
    -2.0: "1.0f / ({0} * {0})",
    0.5: "lg_sqrt({0})",
    -0.5: "1.0f / lg_sqrt({0})",
}
_START = {"rowmax": "splat(-INFINITY)"}


@dataclass(frozen=True)
class PrintedPass:
    """The text of one pass: what comes before its tokens, each tile's body, what comes after."""

    reverse: bool
    alone: str  # condition under which the last token has a tile of its own
    before: list[str]
    ahead: list[str]
    body: list[str]
    after: list[str]


@dataclass(frozen=True)
class PrintedDirection:
    """The text of forward or backward."""

    name: str
    members: list[str]
    built: list[str]  # from memory of a head's own, a, or of one tile, t
    swept: list[str]  # floats of each state
    start: list[str]
    passes: list[PrintedPass]
    finish: list[str]


def print_direction(recurrence: Recurrence, program: Program, direction: str) -> PrintedDirection:
    """Prints ``program``, which is the ``direction`` of ``recurrence``."""
    return _Printer(recurrence, program, direction).printed()


def _literal(value: float) -> str:
    if value in (float("inf"), float("-inf")):
        return "splat(INFINITY)" if value > 0 else "splat(-INFINITY)"
    return f"splat({value!r}f)" if "e" in repr(value) or "." in repr(value) else f"splat({value!r}.0f)"


def _size(dim: str) -> str:
    return f"z.size_{dim}" if dim else "1"


def _step(s: Sweep) -> str:
    """Prints the stride of a matrix state's first dim in memory."""
    return f"z.full_{s.state.dims[1]}"


def _pad(dim: str) -> str:
    lanes, _, rows = dim.partition("|")  # of a param that lies like a dense state
    return (f"z.pad_{lanes} * z.size_{rows}" if rows else f"z.pad_{dim}") if dim else "1"


def _cells(s: Sweep) -> str:
    """Prints how many floats the state of a sweep takes."""
    return f"{_size(s.rows)} * {_pad(s.lanes)}" if s.rows else _pad(s.lanes)


def _on(gate: Expr, row: tuple[str, ...]) -> str:
    """Prints where a decay stands on a sweep's state."""
    return "NUMBER" if not gate.dims else "ROW" if gate.dims == row else "LANE"


@dataclass
class _Printer:
    """The text of one direction as it grows."""

    recurrence: Recurrence
    program: Program
    direction: str
    names: dict[Expr, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    stored: set[Expr] = field(default_factory=set)
    standing: set[Expr] = field(default_factory=set)  # in this pass: rows that may be the caller's own memory

    def printed(self) -> PrintedDirection:
        """Prints the whole direction."""
        program = self.program
        self.name_all()
        self.stored = self.find_stored()
        kept = set(program.kept)
        members, built, start = list[str](), list[str](), list[str]()
        for node in self.arrays():
            dim = (node.dims or ("",))[0]
            rows = "(z.T + 2 * TILE)" if node in kept else "TILE" if node.token else "1"
            length = f"{rows} * {_pad(dim)}" if dim else ("TILE" if rows == "1" else rows)
            members.append(f"float* {self.names[node]};  // {node}" if len(str(node)) < 90 else f"float* {self.names[node]};")
            built.append(f"{self.names[node]} = {'t' if node.token and node not in kept else 'a'}.floats({length});")
        seen: set[str] = set()
        for p in program.passes:
            for s in p.steps:
                if isinstance(s, Sweep) and s.label not in seen:
                    seen.add(s.label)
                    self.declare(s, members, built)
        lengths = {n: _pad((e.dims or ("",))[0]) for n, e in self.sums().items()}
        members += [f"double* {name};" for name in lengths]
        built += [f"{name} = a.doubles({length});" for name, length in lengths.items()]
        for name, length in self.matrices().items():
            members.append(f"float* sum_d{name}_;")
            built.append(f"sum_d{name}_ = a.floats({length});")
            start.append(f"memset(w.sum_d{name}_, 0, 4 * {length});")
        for s in self.backs():
            self.declare_back(s, members, built, start)
        for s in dict.fromkeys([*(m.first for m in program.meetings), *(s.back.first for s in self.backs() if s.back)]):
            members.append(f"float* kept_{s.label};  // what {s.label} is before every KEPT-th token")
            built.append(f"kept_{s.label} = a.floats(keeps(z.T) * {_cells(s)});")
        met = {f"met_{self.names[m.suffix]}": (m.suffix.dims or ("",))[0] for m in program.meetings}
        members += [f"double* {name};" for name in met]
        built += [f"{name} = a.doubles(keeps(z.T) * {_pad(dim)});" for name, dim in met.items()]
        start += [f"memset(w.{name}, 0, 8 * {length});" for name, length in lengths.items()]
        start += [f"memset(w.{name}, 0, 8 * keeps(z.T) * {_pad(dim)});" for name, dim in met.items()]
        start += [self.load_param(n) for n in program.params]
        for step in program.once:
            start += self.step(step, once=True)
        passes = [self.one_pass(p) for p in program.passes]
        swept = [_cells(s) for s in {s.label: s for _, s in self.steps() if isinstance(s, Sweep)}.values()]
        return PrintedDirection(self.direction, members, built, swept, start, passes, self.finish())

    # ---- names and arrays

    def fresh(self, wanted: str) -> str:
        """Returns ``wanted`` with a trailing underscore, numbered where it is taken."""
        name, i = f"{wanted}_", 1
        while name in self.taken:
            i += 1
            name = f"{wanted}_{i}_"
        self.taken.add(name)
        return name

    def name_all(self) -> None:
        """Names every node: leaves as in the spec, readouts after their state, definitions by their name, the rest x."""
        known = {e: n for n, e in self.recurrence.names}
        every = [n for p in self.program.passes for n in p.loads] + list(self.program.params)
        for step in [*self.program.once, *(s for p in self.program.passes for s in p.steps)]:
            every += step.nodes if isinstance(step, Loop) else step.makes if isinstance(step, Sweep) else (step.node,)
        for n in every:
            if n in self.names:
                continue
            if n.op in ("input", "param", "solved"):
                self.names[n] = self.fresh(n.name)
            elif n.op == "readout":
                self.names[n] = self.fresh(f"{n.name}_{n.attr('at')}")
            elif n.op == "lead" and n.args[0].op == "input":
                self.names[n] = self.fresh(f"{n.args[0].name}_next")
            else:
                self.names[n] = self.fresh(known.get(n, "x"))

    def steps(self) -> list[tuple[int, Step]]:
        """Lists all steps with the pass they belong to; -1 is before the tokens."""
        return [(-1, s) for s in self.program.once] + [(i, s) for i, p in enumerate(self.program.passes) for s in p.steps]

    def find_stored(self) -> set[Expr]:
        """Returns the nodes that need an array: used outside of the loop that computes them."""
        out = {n for _, s in self.steps() if isinstance(s, Sweep) for r in s.makes for n in (r, *r.args)}
        out |= {x for _, s in self.steps() if isinstance(s, Sweep) for x in s.operands}
        out |= {e for _, e in self.program.sinks} | set(self.program.kept)
        out |= {x for p in self.program.passes for _, *pair in p.outers for x in pair}
        for _, s in self.steps():
            if isinstance(s, Loop):
                inner = set(s.nodes)
                out |= {a for n in s.nodes for a in n.args if a not in inner} | {n for n in s.nodes if n.op in REDUCTIONS}
            elif not isinstance(s, Sweep):
                out |= {s.node, *s.node.args}
        return {n for n in out if n.op not in ("const", "size", "scale")}

    def arrays(self) -> list[Expr]:
        """Lists the nodes with arrays in the order of their names' making."""
        return [n for n in self.names if n in self.stored]

    def declare(self, s: Sweep, members: list[str], built: list[str]) -> None:
        """Declares the state of a sweep."""
        if s.rows and self.direction == "step" and not s.elements:
            return
        if s.elements:
            members.append(f"Dense {s.label};  // rows {s.rows}, lanes {s.lanes}")
            built.append(f"{s.label} = Dense(a, {_size(s.rows)}, {_size(s.lanes)});")
        elif s.rows:
            same = [t for _, t in self.steps() if isinstance(t, Sweep) and t.label == s.label]
            operands = max(2 * len(t.writes) + len(t.reads) + 2 * sum(len(u.reads) for u in t.solves) for t in same)
            members.append(f"Matrix {s.label};  // rows {s.rows}, lanes {s.lanes}")
            built.append(f"{s.label} = Matrix(a, t, {_size(s.rows)}, {_size(s.lanes)}, {operands});")
        else:
            members.append(f"Vector {s.label};")
            built.append(f"{s.label} = Vector(a, {_size(s.lanes)}, {'false' if s.lanes else 'true'});")

    def backs(self) -> list[Sweep]:
        """Lists the sweeps of the gradients of dense states."""
        return [s for _, s in self.steps() if isinstance(s, Sweep) and s.back]

    def declare_back(self, s: Sweep, members: list[str], built: list[str], start: list[str]) -> None:
        """Declares what such a sweep finds in a tile, and the gradients of params that it adds up."""
        assert s.back
        part = sum(n.attr("dim") == s.lanes for n in (*s.reads, *s.back.found, *(n.args[0] for n in s.back.sums)))
        members.append("float *was, *decays, *part;  // the state before every token of a tile, its decays, sums over lanes")
        built += [f"{name} = t.floats(TILE * {_size(s.rows)} * LANES);" for name in ("was", "decays")]
        built.append(f"part = t.floats({part} * TILE * {_size(s.rows)} * LANES);")
        for name, _ in s.back.gathers:
            members.append(f"float* sum_d{name}_;")
            built.append(f"sum_d{name}_ = a.floats({_cells(s)});")
            start.append(f"memset(w.sum_d{name}_, 0, 4 * {_cells(s)});")

    def sums(self) -> dict[str, Expr]:
        """Lists the running sums: of suffixes and of the gradients of params."""
        out = {f"sum_{self.names[s.node]}": s.node for _, s in self.steps() if isinstance(s, Suffix)}
        params = {t.name for t in self.recurrence.params}
        if self.direction == "backward":
            out |= {f"sum_d{n}_": e for n, e in self.program.sinks if n in params}
        return out

    def matrices(self) -> dict[str, str]:
        """Pairs the params with two dims that get a gradient with how many floats it takes in memory: rows, and lanes rounded up."""
        found = {o[0]: o for p in self.program.passes for o in p.outers}
        return {name: f"{_size(row.dims[0])} * {_pad(lane.dims[0])}" for name, row, lane in found.values()}

    def where(self, node: Expr) -> str:
        """Prints the pointer to a node's array in this tile."""
        dim = (node.dims or ("",))[0]
        base = f"w.{self.names[node]}"
        return f"({base} + t0 * {_pad(dim)})" if node in self.program.kept else base

    def row(self, node: Expr, i: str) -> str:
        """Prints the pointer to a node's row for token ``i`` of this tile."""
        if node in self.standing:
            return f"{self.names[node]}rows.of({i})"
        dim = (node.dims or ("",))[0]
        return f"{self.where(node)} + {i} * {_pad(dim)}" if dim else f"{self.where(node)} + {i}"

    def own_row(self, node: Expr) -> str:
        """Prints the pointer to a node's row for token i, or to what all tokens share."""
        return self.row(node, "i") if node.token else self.where(node)

    def operand(self, node: Expr) -> str:
        """Prints a node's array with its stride from token to token."""
        if node in self.standing:
            return f"{self.names[node]}rows"
        return f"{{{self.where(node)}, {_pad((node.dims or ('',))[0]) if node.token else '0'}}}"

    # ---- loading and storing

    def load_param(self, node: Expr) -> str:
        dim = (node.dims or ("",))[0]
        lanes, _, rows = dim.partition("|")
        if rows:
            dims = next(t.dims for t in self.recurrence.params if t.name == node.name)
            first = f"{'true' if dims[0] == rows else 'false'}, z.full_{dims[1]}"
            return f"load_elements(w.{self.names[node]}, c.{node.name}_, h, {_size(rows)}, {_size(lanes)}, {first});"
        if dim:
            return f"load(w.{self.names[node]}, c.{node.name}_, 0, 0, h, 1, {_size(dim)}, {_pad(dim)});"
        return f"load_number(w.{self.names[node]}, c.{node.name}_, h);"

    def one_pass(self, p: Pass) -> PrintedPass:
        """Prints a pass."""
        before, after, body = [], [], []
        params = {t.name for t in self.recurrence.params}
        targets = self.targets(p)
        self.standing = {n for n in p.loads if n.op == "input" and n.dims} | set(targets)
        sweeps = [s for s in p.steps if isinstance(s, Sweep)]
        for s in sweeps:
            if not s.whole and (self.direction != "step" or not s.rows or s.elements):
                before.append(self.load_state(s))
        for s in self.program.ends:
            if s in sweeps:
                after.append(self.store_state(s))
        body += [self.load(n) for n in p.loads]
        for e, name in targets.items():
            rows = f"{self.where(e)}, {name}, b, t0, h, {_size(e.dims[0])}, {_pad(e.dims[0])}"
            body.append(f"const Operand {self.names[e]}rows = target({rows});")
        for step in p.steps:
            body += self.step(step, closings=p.closings)
        outputs = []
        for name, e in p.stores:
            dim = (e.dims or ("",))[0]
            if self.direction == "backward" and name in params:
                body.append(f"gather(w.sum_d{name}_, {self.operand(e)}, n, {_pad(dim)});")
            else:
                outputs.append((self.sink(name), dim))
                body.append(f"store({self.sink(name)}, b, t0, h, {self.operand(e)}, n, {_size(dim)});")
        for name, first, second in p.outers:
            pair = f"{self.operand(first)}, {self.operand(second)}"
            body.append(f"gather_outer(w.sum_d{name}_, {pair}, n, {_size(first.dims[0])}, {_pad(second.dims[0])});")
        ahead = [f"ahead.add(c.{n.name}_, b, next, h, more, {_size((n.dims or ('',))[0])});" for n in p.loads if n.op == "input"]
        ahead += [f"ahead.add({target}, b, next, h, more, {_size(dim)});" for target, dim in outputs]
        closed = list(dict.fromkeys(s.state.name for _, s, _ in p.closings))
        alone = " || ".join(f"c.d_final_{name}.given()" for name in closed)
        return PrintedPass(p.reverse, alone, before, ahead, body, after)

    def sink(self, name: str) -> str:
        """Prints the caller's tensor of an output or a gradient."""
        return f"c.d{name}_" if self.direction == "backward" else f"c.{name}_"

    def targets(self, p: Pass) -> dict[Expr, str]:
        """Pairs what a pass stores and may compute where it is stored with the caller's tensor."""
        params = {t.name for t in self.recurrence.params} if self.direction == "backward" else set[str]()
        made = {
            n for s in p.steps for n in (s.nodes if isinstance(s, Loop) else s.reads if isinstance(s, Sweep) and not s.elements else ())
        }
        fit = [(e, name) for name, e in p.stores if name not in params and e in made and e.dims and e not in self.program.kept]
        return {e: self.sink(name) for e, name in reversed(fit)}

    def load(self, n: Expr) -> str:
        """Prints how a tile of an input comes in, of what the tokens after have, or of which tokens have one after them."""
        dim = (n.dims or ("",))[0]
        if n.op == "follows":
            return f"follows({self.where(n)}, n, t0 + n == z.T);"
        if n.op == "lead" and n.args[0].op != "input":
            return f"lead({self.where(n)}, {self.where(n.args[0])}, n, {_pad(dim)}, t0 + n == z.T);"
        if n.op == "lead":
            return f"load_next({self.where(n)}, c.{n.args[0].name}_, b, t0, h, n, {_size(dim)}, {_pad(dim)}, z.T);"
        rows = f"{self.where(n)}, c.{n.name}_, b, t0, h, n, {_size(dim)}, {_pad(dim)}"
        return f"const Operand {self.names[n]}rows = rows({rows});" if n in self.standing else f"load({rows});"

    def is_first(self, s: Sweep) -> str:
        """Prints whether the rows of a sweep are its state's first dim."""
        return "true" if s.rows == s.state.dims[0] else "false"

    def load_state(self, s: Sweep) -> str:
        name = s.state.name
        given = f"c.d_final_{s.state.of}.own_state(b, h)" if self.is_adjoint(s) else f"c.initial_{name}.state(b, h)"
        given = given if s.state.causal else "nullptr"
        init = f"{s.state.init!r}f"
        return f"w.{s.label}.load({given}, {init}, {self.is_first(s)}, {_step(s)});" if s.rows else f"w.{s.label}.load({given}, {init});"

    def is_adjoint(self, s: Sweep) -> bool:
        """Tells whether a sweep walks a state of the adjoint."""
        return s.state.name not in {x.name for x in self.recurrence.states}

    def store_state(self, s: Sweep) -> str:
        if not s.state.causal or (self.direction == "step" and s.rows and not s.elements):
            return ""
        if self.direction == "step":
            first = f", {self.is_first(s)}, {_step(s)}" if s.rows else ""
            return f"w.{s.label}.store(c.initial_{s.state.name}.state(b, h){first});"
        target = f"c.d_initial_{s.state.of}" if self.direction == "backward" else f"c.final_{s.state.name}"
        first = f", {self.is_first(s)}, {_step(s)}" if s.rows else ""
        return f"if (float* to = {target}.own_state(b, h)) w.{s.label}.store(to{first});"

    def finish(self) -> list[str]:
        """Prints what comes after all passes: the gradients of params."""
        if self.direction != "backward":
            return []
        params = {t.name for t in self.recurrence.params}
        out = []
        for name, e in self.program.sinks:
            if name in params:
                out.append(f"store_sum(c.d{name}_, b, h, w.sum_d{name}_, {_size((e.dims or ('',))[0])});")
        for s in self.backs():
            for name, _ in s.back.gathers if s.back else ():
                dims = next(t.dims for t in self.recurrence.params if t.name == name)
                first = f"{'true' if dims[0] == s.rows else 'false'}, z.full_{dims[1]}"
                out.append(f"store_elements(c.d{name}_, b, h, w.sum_d{name}_, {_size(s.rows)}, {_size(s.lanes)}, {first});")
        for t in self.recurrence.params:
            if t.name in self.matrices():
                sizes = f"{_size(t.dims[0])}, {_size(t.dims[1])}, {_pad(t.dims[1])}"
                out.append(f"store_outer(c.d{t.name}_, b, h, w.sum_d{t.name}_, {sizes});")
        return out

    # ---- steps

    def step(self, step: Step, once: bool = False, closings: tuple[tuple[Expr, Sweep, int], ...] = ()) -> list[str]:
        """Prints one step."""
        if isinstance(step, Loop):
            return self.vector_loop(step, once) if step.dim else self.number_loop(step, once)
        if isinstance(step, Sweep):
            return self.sweep(step, closings)
        if isinstance(step, Suffix):
            n = step.node
            pad = _pad((n.dims or ("",))[0])
            x, y, decay, *fours = (self.operand(a) for a in n.args)
            anew = any(m.suffix == n for m in self.program.meetings)
            met = f"is_kept(t0) ? w.met_{self.names[n]} + t0 / KEPT * {pad} : nullptr" if anew else "nullptr"
            call = f"w.sum_{self.names[n]}, {self.where(n)}, {x}, {y}, {decay}"
            if not fours:
                return [f"suffix({call}, n, {pad}, t0 + n == z.T, {met});"]
            each = ", ".join("{" + ", ".join(four) + "}" for four in zip(*(fours[i::4] for i in range(4)), strict=True))
            row, col = (_size(a.dims[0]) for a in n.args[3:5])
            call = f"suffix_of_pairs({call}, pairs, {row}, {col}, n, t0 + n == z.T, {met});"
            return ["{", f"  const Pair pairs[] = {{{each}}};", f"  {call}", "}"]
        return self.resize(step, once)

    def value(self, node: Expr, dim: str, inside: set[Expr], preamble: dict[str, str], body: list[str]) -> str:
        """Prints an operand: a local, or loaded from its array first; numbers in a vector loop are splat before it."""
        if node.op == "const":
            return _literal(node.value)
        if node.op == "size":
            return f"splat((float)z.full_{node.name})"
        if node.op == "scale":
            return "splat(z.scale)"
        name = self.names[node]
        if node in inside:
            return name
        inside.add(node)
        if dim and not node.dims:
            preamble[name] = f"const vf {name} = splat({self.where(node)}[{'i' if node.token else '0'}]);"
        elif dim:
            body.append(f"const vf {name} = at({self.own_row(node)} + lane);")
        else:
            body.append(f"const vf {name} = at({self.where(node)}{' + i' if node.token else ''});")
        return name

    def formula(self, node: Expr, args: list[str]) -> str:
        """Prints one element-wise node."""
        if node.op == "expand":
            return args[0]
        if node.op == "pow":
            form = _POWERS.get(node.value, f"lg_pow({{0}}, {node.value!r}f)")
        elif node.op in FUNCTIONS:
            form = FUNCTIONS[node.op].cpp
            form = f"lg_true({form})" if node.op in _COMPARISONS else form
        else:
            raise AssertionError(f"no C++ form of {node.op!r} in {node}")
        return form.format(*args)

    def vector_loop(self, loop: Loop, once: bool) -> list[str]:
        """Prints a loop over tokens and lanes; its reductions are numbers after it."""
        dim, inside, preamble, body, ends = loop.dim, set[Expr](), dict[str, str](), list[str](), list[str]()
        for n in loop.nodes:
            args = [self.value(a, dim, inside, preamble, body) for a in n.args]
            name = self.names[n]
            if n.op in REDUCTIONS:
                preamble[name] = f"vf {name} = {_START.get(n.op, 'vf{}')};"
                left = f"{_size(dim)} - lane"
                if n.op == "rowmax":
                    body.append(f"{name} = lg_max({name}, keep_low({args[0]}, {left}));")
                else:
                    body.append(f"{name} += keep({' * '.join(args)}, {left});")
                end = f"{'largest' if n.op == 'rowmax' else 'total'}({name})"
                ends.append(f"put({self.where(n)}, splat({end}));" if once else f"{self.where(n)}[i] = {end};")
                continue
            body.append(f"const vf {name} = {self.formula(n, args)};")
            inside.add(n)
            if n in self.stored:
                body.append(f"put({self.where(n) if once else self.row(n, 'i')} + lane, {name});")
        head = "for (long i = 0; i < 1; ++i) {" if once else "for (long i = 0; i < n; ++i) {"
        lines = [head, *(f"  {p}" for p in preamble.values()), f"  for (long lane = 0; lane < {_pad(dim)}; lane += LANES) {{"]
        return [*lines, *(f"    {b}" for b in body), "  }", *(f"  {e}" for e in ends), "}"]

    def number_loop(self, loop: Loop, once: bool) -> list[str]:
        """Prints a loop over tokens, one a lane."""
        inside, body = set[Expr](), list[str]()
        for n in loop.nodes:
            args = [self.value(a, "", inside, {}, body) for a in n.args]
            body.append(f"const vf {self.names[n]} = {self.formula(n, args)};")
            inside.add(n)
            if n in self.stored:
                body.append(f"put({self.where(n)}{'' if once else ' + i'}, {self.names[n]});")
        if once:
            return ["{", *(f"  {b}" for b in body), "}"]
        return ["for (long i = 0; i < n; i += LANES) {", *(f"  {b}" for b in body), "}"]

    def resize(self, step: Resize, once: bool) -> list[str]:
        """Prints a value whose lanes are not its operands'."""
        n = step.node
        dim = n.dims[0]
        to, *rows = map(self.own_row, (n, *n.args))
        sizes = [_size(a.dims[0]) for a in n.args]
        if n.op == "concat":
            call = f"concat({to}, {_pad(dim)}, {rows[0]}, {sizes[0]}, {rows[1]}, {sizes[1]});"
        elif n.op == "part":
            offset = "0" if n.attr("index") == "0" else sizes[1]
            call = f"part({to}, {_pad(dim)}, {rows[0]} + {offset}, {_size(dim)});"
        elif n.op == "rename":
            call = f"part({to}, {_pad(dim)}, {rows[0]}, {_size(dim)});"
        elif n.op in ("taylor2", "quad"):
            call = f"{n.op}({to}, {_pad(dim)}, {_size(dim)}, {rows[0]}, {sizes[0]});"
        elif n.op == "product":
            x, w = n.args
            return [f"product({self.operand(n)}, {self.operand(x)}, {self.where(w)}, {'1' if once else 'n'}, {sizes[0]}, {_pad(dim)});"]
        else:
            call = f"{n.op}({to}, {_pad(dim)}, {rows[0]}, {rows[1]}, {sizes[1]});"
        return [f"for (long i = 0; i < {'1' if once else 'n'}; ++i) {call}"]

    def sweep(self, s: Sweep, closings: tuple[tuple[Expr, Sweep, int], ...]) -> list[str]:
        """Prints a sweep: its decay, writes and readouts, and the closings that it feeds."""
        if s.back:
            return self.walk_back(s, s.back)
        if s.elements:
            dims, writes = (s.lanes, s.rows), [w[:2] for w in s.writes]
            kept = f"if (is_kept(t0)) w.{s.label}.keep(w.kept_{s.label} + t0 / KEPT * {_cells(s)});"
            lines = [kept] if any(b.back and b.back.first == s for b in self.backs()) else []
            return lines + dense_sweep(s.elements, s.label, dims, writes, s.reads, self.own_row, self.formula)
        by_dims = {d.dims: d for d in s.decay}
        row = (s.rows,) if s.rows else ("no row",)
        lane = (s.lanes,) if s.lanes else ("no lane",)
        decay = ", ".join(self.operand(by_dims[k]) if k in by_dims else "{}" for k in ((), row, lane))
        reads = sorted(s.reads, key=lambda r: r.attr("at") in POST)
        strict = sum(r.attr("at") not in POST for r in reads)
        solved = ", ".join(self.solved(u, r) for u in s.solves for r in u.reads)
        count = sum(len(u.reads) for u in s.solves)
        shape = f"<{len(s.writes)}, {strict}, {len(reads) - strict}{f', {count}' if count else ''}>"
        lines = ["{", f"  const Decay decay{{{decay}}};"]
        if s.writes:
            lines.append("  const Written writes[] = {" + ", ".join(self.written(s, w) for w in s.writes) + "};")
        if reads:
            lines.append("  const Readout reads[] = {" + ", ".join(self.read(s, r) for r in reads) + "};")
        if solved:
            lines += [self.based(u, s.lanes) for u in s.solves] + [f"  const Solved solved[] = {{{solved}}};"]
        between = self.between(s, row)
        lines += [] if s.state.reverse else between
        if s.state.peak:
            reads_text = f"{'reads' if reads else 'nullptr'}, {len(reads)}"
            return [*lines, f"  peak(w.{s.label}, n, decay, writes[0].lane, {reads_text});", "}"]
        for node, swept, index in closings:
            if swept == s:
                on = _on(node, row)
                name = s.state.name
                first = f" {self.is_first(s)}, {_step(s)}," if s.rows else ""
                assert s.decay[index].dims == node.dims, f"{node} closes another decay of {name}"
                lines.append("  if (t0 + 1 == z.T)")
                given = f"if (const float* d = c.d_final_{name}.own_state(b, h))"
                lines.append(f"    {given} w.{s.label}.close(w.sum_{self.names[node]}, {on}, d,{first} decay, 0);")
        operands = f"{'writes' if s.writes else 'nullptr'}, {'reads' if reads else 'nullptr'}"
        way = "-1" if s.state.reverse else "1"
        if s.rows and self.direction == "step":
            state = f"c.initial_{s.state.name}.state(b, h), {_size(s.rows)}, {_size(s.lanes)}"
            lines += [f"  step_solve<{count}, {self.is_first(s)}>({state}, decay, solved);"] * bool(count)
            plain = f"{len(s.writes)}, {strict}, {len(reads) - strict}"
            lines.append(f"  step_matrix<{plain}, {self.is_first(s)}>({state}, decay, {operands});")
        elif s.rows:
            lines.append(f"  Sweep{shape}(w.{s.label}, decay, {operands}, ahead{', solved' if solved else ''}).tile(n, {way});")
        else:
            lines.append(f"  sweep{shape}(w.{s.label}, n, {way}, decay, {operands});")
        return [*lines, *(between if s.state.reverse else []), "}"]

    def walk_back(self, s: Sweep, back: Back) -> list[str]:
        """Prints the reverse sweep of a dense state's gradient, after the state as it was before the tile."""
        assert s.elements
        first = back.first
        gathers = tuple((f"w.sum_d{name}_", e) for name, e in back.gathers)
        writes = tuple(w[:2] for w in first.writes), tuple((w[:2], w[2]) for w in s.writes)
        sums = tuple((n.args[0], n) for n in back.sums)
        walk = Walk((first.label, s.label), (s.lanes, s.rows), writes, s.reads, back.found, sums, gathers)
        kept = f"w.kept_{first.label} + t0 / KEPT * {_cells(s)}"
        there = [f"if (is_kept(t0)) memcpy(w.{first.label}.s, {kept}, 4 * {_cells(s)});", f"else {self.load_state(first)}"]
        return [*there, *dense_back(s.elements, walk, self.own_row, self.formula)]

    def between(self, s: Sweep, row: tuple[str, ...]) -> list[str]:
        """Prints what a sweep's state is kept for, and what it meets, where it stands before the tile's first token."""
        meetings, lines = self.program.meetings, list[str]()
        if any(m.first == s for m in meetings):
            lines.append(f"  if (is_kept(t0)) w.{s.label}.keep(w.kept_{s.label} + t0 / KEPT * {_cells(s)});")
        for m in meetings:
            if m.second == s:
                met = f"w.met_{self.names[m.suffix]} + t0 / KEPT * {_pad((m.suffix.dims or ('',))[0])}"
                turned = f", {'true' if m.first.rows != s.rows else 'false'}" if s.rows else ""
                kept = f"w.kept_{m.first.label} + t0 / KEPT * {_cells(m.first)}"
                lines.append(f"  if (is_kept(t0)) w.{s.label}.meet({met}, {_on(m.suffix, row)}, {kept}{turned});")
        return lines

    def written(self, s: Sweep, w: tuple[Expr, Expr, bool]) -> str:
        before = "true" if s.state.reverse and w[2] else "false"
        row = self.operand(w[0]) if s.rows else "{}"
        return f"{{{row}, {self.operand(w[1])}, {before}}}"

    def based(self, u: Solve, lanes: str) -> str:
        """Prints what a solved value is before its state is read."""
        if u.base == E.ZERO:
            return f"  memset({self.where(u.leaf)}, 0, 4 * n * {_pad(lanes)});"
        return f"  copy_rows({self.where(u.leaf)}, {self.operand(u.base)}, n, {_pad(lanes)});"

    def solved(self, u: Solve, r: Expr) -> str:
        before = "false" if r.attr("at") == "decayed" else "true"
        return f"{{{self.operand(r.args[0])}, {self.where(u.leaf)}, {before}}}"

    def read(self, s: Sweep, r: Expr) -> str:
        before = "true" if r.attr("at") in ("previous", "later", "since") else "false"
        row = self.operand(r.args[0]) if s.rows else "{}"
        return f"{{{row}, {self.operand(r)}, {before}}}"
