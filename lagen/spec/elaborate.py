"""From spelled expressions to typed ones: names and functions put in, dims followed, every built value with its place.

A scope knows what each name means; an Elaboration types one line in it, or one call of a function that the line makes. A value is
None where a mistake has been reported already. Work and size are bounded, so that functions which call each other twice, thirty deep,
end in a mistake.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lagen.ir import expr as E
from lagen.ir.expr import Expr, ExprTypeError
from lagen.ir.variant import Span
from lagen.spec.mistakes import Report
from lagen.spec.syntax import Formula, Node
from lagen.spec.vocabulary import ELEMENTWISE, INSTEAD, KNOWN, OUT_OF_REACH, PRODUCTS, RESIZES, ROWS

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "neg": "-", "pow": "**", "rowmax": "max", "contract": "@"}
SIGNS |= {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
"""How operations are spelled, where that is not their name."""

MAX_SIZE = 20_000
"""Nodes of one value, written out."""
MAX_LEVELS = 150
MAX_STEPS = 20_000
"""Nodes visited for one file."""


@dataclass(frozen=True)
class Function:
    """``phi(x): formula`` of define."""

    name: str
    parameters: tuple[str, ...]
    formula: Formula


@dataclass
class StateType:
    """What is known of a state while lines are typed; ``dims`` is None until its line is."""

    name: str
    line: int  # its place among the lines of the recurrence
    dims: tuple[str, ...] | None = None
    head: str = ""


@dataclass
class Scope:
    """What every name means, and the places of what was built. ``sizes`` collects the dims that lines make."""

    report: Report
    tensors: dict[str, Expr] = field(default_factory=dict)
    names: dict[str, Expr | None] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    dims: set[str] = field(default_factory=set)
    states: dict[str, StateType] = field(default_factory=dict)
    abbreviations: dict[str, Formula] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)  # names that the file defines further down
    sizes: dict[str, Expr] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    places: dict[Expr, Span] = field(default_factory=dict)
    put_in: dict[str, Expr | None] = field(default_factory=dict)  # abbreviations already typed
    extents: dict[Expr, tuple[int, int]] = field(default_factory=dict)
    steps: int = 0

    def exhausted(self, span: Span) -> bool:
        """Counts one step of work; tells whether it is too much for one file, and says so once."""
        self.steps += 1
        if self.steps == MAX_STEPS:
            self.report.add("too-long", span, "names and functions stand for too much here", "name under define what they share")
        return self.steps >= MAX_STEPS

    def extent(self, e: Expr) -> tuple[int, int]:
        """Returns how many nodes a value has when written out, and how many levels."""
        if e not in self.extents:
            below = [self.extent(a) for a in e.args]
            self.extents[e] = 1 + sum(n for n, _ in below), 1 + max((d for _, d in below), default=0)
        return self.extents[e]


def size_of(scope: Scope, dim: str) -> Expr:
    """Returns the size of a dim, in sizes of dims that tensors have."""
    return scope.sizes.get(dim, E.size(dim))


def constant(e: Expr) -> float | None:
    """Returns the value of an operation on numbers, or None. Operands have been folded before."""
    if e.op == "const":
        return e.value
    if not e.args or any(a.op != "const" for a in e.args):
        return None
    values = [a.value for a in e.args]
    if e.op == "neg":
        return -values[0]
    if e.op == "pow":
        return _power(values[0], e.value)
    if len(values) == 2 and e.op in _ARITHMETIC:
        return _arithmetic(e.op, *values)
    return None


def _power(base: float, exponent: float) -> float | None:
    try:
        value = base**exponent
    except (OverflowError, ZeroDivisionError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None


_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else math.nan,
}


def _arithmetic(op: str, a: float, b: float) -> float | None:
    value = _ARITHMETIC[op](a, b)
    return value if math.isfinite(value) else None


def folded(e: Expr) -> Expr:
    """Returns a number for an expression of numbers."""
    value = constant(e) if e.op != "const" else None
    return e if value is None else E.const(value)


_MAKERS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "+": lambda a, b: E.add(a, b),
    "-": E.sub,
    "*": lambda a, b: E.mul(a, b),
    "/": E.div,
    "@": E.contract,
}


class Elaboration:
    """One line being elaborated. ``inside`` is the call that is being expanded, "" in the line itself."""

    def __init__(
        self,
        scope: Scope,
        variables: dict[str, Expr | None] | None = None,
        inside: str = "",
        span: Span | None = None,
    ) -> None:
        self.scope = scope
        self.variables = variables or {}
        self.inside = inside
        self.call_span = span
        self.makes = ""

    # ---- reporting ----

    def refuse(self, code: str, span: Span, message: str, help: str = "") -> None:
        where = f"in {self.inside} (line {span.line}): " if self.inside else ""
        self.scope.report.add(code, self.call_span or span, where + message, help)

    def build(self, node: Node, make: Callable[[], Expr]) -> Expr | None:
        """Makes a value and keeps its place; a type that does not exist is a mistake at the node."""
        try:
            e = folded(make())
        except ExprTypeError as error:
            message, _, help = str(error).partition("; ")
            if help.startswith("{"):  # both halves say what is wrong
                message, help = f"{message}: {help}", ""
            for op, sign in SIGNS.items():
                message = message.replace(f"'{op}'", f"'{sign}'")
            self.refuse("dims", node.span, message, help)
            return None
        size, levels = self.scope.extent(e)
        if size > MAX_SIZE or levels > MAX_LEVELS:
            message = f"more than {MAX_SIZE} operations" if size > MAX_SIZE else f"more than {MAX_LEVELS} levels"
            code = "too-long" if size > MAX_SIZE else "too-deep"
            self.refuse(code, node.span, f"{message} once names and functions are put in", "is this a recurrence?")
            return None
        self.scope.places.setdefault(e, self.call_span or node.span)
        return e

    # ---- lines ----

    def formula(self, formula: Formula) -> Expr | None:
        """Types a whole line, with the dim that it makes."""
        self.makes = formula.makes
        e = self.typed(formula.body)
        if e is None:
            return None
        if not formula.makes or formula.makes in e.dims:
            return e
        if len(e.dims) != 1:
            dims = ", ".join(e.dims)
            self.refuse(
                "dim-unnamed",
                formula.makes_span,
                f"'-> {formula.makes}' names the dim of a vector, but the line has dims {{{dims}}}",
                "remove it, or name the vector under define",
            )
            return None
        node = Node("name", formula.makes_span)
        old = e.dims[0]
        if not self.measure(formula.makes, size_of(self.scope, old), node):
            return None
        vector = e
        return self.build(formula.body, lambda: E.resize("rename", vector, formula.makes))

    def measure(self, dim: str, size: Expr, node: Node) -> bool:
        """Notes the size of a dim that a line makes; two sizes for one name are a mistake."""
        known = self.scope.sizes.setdefault(dim, size)
        if known == size:
            return True
        self.refuse("dim-size", node.span, f"'-> {dim}' gives size {size} here and {known} before", "give the second one a name of its own")
        return False

    # ---- typed expressions ----

    def typed(self, node: Node) -> Expr | None:
        """Types one node."""
        if self.scope.exhausted(self.call_span or node.span):
            return None
        if node.kind == "number":
            return E.const(node.value)
        if node.kind == "name":
            return self.name(node)
        if node.kind == "index":
            return self.index(node)
        if node.kind == "call":
            return self.call(node)
        if node.kind == "compare":
            self.refuse("comparison", node.span, "a comparison stands in where(...) or under assume", "write where(a < b, x, y)")
            return None
        args = [self.typed(a) for a in node.args]
        if any(a is None for a in args):
            return None
        values = [a for a in args if a is not None]
        if node.kind == "negate":
            return self.build(node, lambda: E.neg(values[0]))
        if node.text == "**":
            return self.raised(node, *values)
        if node.text == "/" and values[1] == E.ZERO:
            self.refuse("value", node.args[1].span, "a division by 0", "")
            return None
        return self.build(node, lambda: _MAKERS[node.text](*values))

    def raised(self, node: Node, base: Expr, exponent: Expr) -> Expr | None:
        number = constant(exponent)
        if number is None:
            self.refuse(
                "exponent",
                node.args[1].span,
                f"'**' takes a number as its exponent, not {exponent}",
                "write exp(exponent * log(base)) where the base is positive",
            )
            return None
        return self.build(node, lambda: E.power(base, number))

    def name(self, node: Node) -> Expr | None:
        name, scope = node.text, self.scope
        scope.used.add(name)
        if name in self.variables:
            return self.variables[name]
        if name == "pi":
            return E.const(math.pi)
        if name == "scale":
            return self.build(node, E.scale)
        if name in scope.tensors:
            return self.build(node, lambda: scope.tensors[name])
        if name in scope.names:
            e = scope.names[name]
            return None if e is None else self.build(node, lambda: e)
        if name in scope.abbreviations:
            return self.abbreviation(name, node)
        if name in scope.dims:
            return self.build(node, lambda: E.size(name))
        self.refuse(*self.unknown(node))
        return None

    def abbreviation(self, name: str, node: Node) -> Expr | None:
        scope = self.scope
        if name not in scope.put_in:
            scope.put_in[name] = Elaboration(scope).formula(scope.abbreviations[name])
        e = scope.put_in[name]
        return None if e is None else self.build(node, lambda: e)

    def unknown(self, node: Node) -> tuple[str, Span, str, str]:
        """Words the mistake of a name that means nothing here."""
        name, scope = node.text, self.scope
        if name == "t":
            return "time", node.span, "t is an index, not a number", "give the positions as an input: `pos: []`"
        if name in scope.states:
            return "time", node.span, f"'{name}' is a state", f"write {name}[t] or {name}[t-1]"
        if name in scope.outputs:
            return "undefined", node.span, f"'{name}' is an output, which no line reads", f"name the shared part `_{name}: ...` above both"
        if name in scope.functions or name in KNOWN:
            return "arguments", node.span, f"'{name}' is a function", f"write {name}(...)"
        if name in scope.later:
            return "undefined", node.span, f"'{name}' is defined further down", "move its line above this one"
        if len(scope.report.mistakes) > 20:
            return "undefined", node.span, f"nothing is called '{name}'", ""
        words = [*scope.tensors, *scope.names, *scope.functions, *scope.abbreviations, *scope.dims, *self.variables, *KNOWN]
        near = difflib.get_close_matches(name, words, 1, 0.75)
        help = f"did you mean {near[0]}?" if near else "declare it under inputs or params, or name it under define"
        return "undefined", node.span, f"nothing is called '{name}'", help

    def index(self, node: Node) -> Expr | None:
        state = self.scope.states.get(node.text)
        if state is None or state.dims is None:
            return None  # reported where the lines were ordered, or where the state's line failed
        dims, head = state.dims, state.head
        self.scope.used.add(node.text)
        return self.build(node, lambda: E.leaf("past" if node.value else "now", state.name, dims, head, token=True))

    # ---- calls ----

    def arity(self, node: Node, least: int, most: int) -> bool:
        if least <= len(node.args) <= most:
            return True
        wanted = str(least) if least == most else f"{least} or {most}"
        some = "argument" if wanted == "1" else "arguments"
        self.refuse("arguments", node.span, f"{node.text} takes {wanted} {some}, got {len(node.args)}")
        return False

    def call(self, node: Node) -> Expr | None:
        name = node.text
        if name in self.scope.functions:
            return self.expand(node, self.scope.functions[name])
        if name not in KNOWN:
            self.refuse(*self.unknown_function(node))
            return None
        if name in RESIZES:
            return self.resized(node)
        condition = None
        nodes = node.args
        if name == "where" and len(nodes) == 3:
            condition = self.condition(nodes[0])
            if condition is None:
                return None
            nodes = nodes[1:]
        args = [self.typed(a) for a in nodes]
        if any(a is None for a in args):
            return None
        values = ([condition] if condition is not None else []) + [a for a in args if a is not None]
        if name == "max" and len(values) == 1:
            return self.build(node, lambda: E.reduce("rowmax", values[0]))
        if name in ELEMENTWISE:
            arity = ELEMENTWISE[name]
            return self.build(node, lambda: E.call(name, *values)) if self.arity(node, arity, arity) else None
        if name in PRODUCTS:
            if not self.arity(node, 2, 2):
                return None
            if name == "dot" and any(len(v.dims) != 1 for v in values):
                self.refuse("dims", node.span, "dot(a, b) takes two vectors", "write a @ b to read a matrix")
                return None
            return self.build(node, lambda: E.outer(*values) if name == "outer" else E.contract(*values))
        return self.row(node, values)

    def row(self, node: Node, values: list[Expr]) -> Expr | None:
        if not self.arity(node, *ROWS[node.text]):
            return None
        if node.text in ("sum", "mean"):
            return self.build(node, lambda: E.reduce(node.text, values[0]))
        eps = 1e-6 if node.text == "l2norm" else 0.0
        if len(values) == 2:
            number = constant(values[1])
            if number is None or number < 0:
                message = f"the eps of {node.text} is a number, at least 0"
                self.refuse("arguments", node.args[1].span, message, f"write {node.text}(x, 1e-6)")
                return None
            eps = number
        return self.build(node, lambda: E.row(node.text, values[0], eps))

    def condition(self, node: Node) -> Expr | None:
        """Types a comparison."""
        if node.kind != "compare":
            self.refuse("comparison", node.span, "a condition is a comparison", "write where(x > 0, a, b)")
            return None
        left, right = self.typed(node.args[0]), self.typed(node.args[1])
        if left is None or right is None:
            return None
        return self.build(node, lambda: E.call(node.text, left, right))

    def resized(self, node: Node) -> Expr | None:
        """Types concat, taylor2 and quad: the outermost of a line makes the dim that the line names."""
        if not self.arity(node, RESIZES[node.text], RESIZES[node.text]):
            return None
        makes, self.makes = self.makes, ""
        args = [self.typed(a) for a in node.args]
        self.makes = makes
        if any(a is None for a in args):
            return None
        values = [a for a in args if a is not None]
        if any(len(v.dims) != 1 for v in values):
            self.refuse("dims", node.span, f"'{node.text}' takes vectors")
            return None
        sizes = [size_of(self.scope, v.dims[0]) for v in values]
        dim = makes or "_".join([node.text, *(v.dims[0] for v in values)])
        if dim in [v.dims[0] for v in values]:
            self.refuse("dim-size", node.span, f"'-> {dim}' would change the size of {dim}", "give the new dim a name of its own")
            return None
        if not self.measure(dim, resized_size(node.text, *sizes), node):
            return None
        if node.text == "concat":
            return self.build(node, lambda: E.concat(values[0], values[1], dim))
        return self.build(node, lambda: E.resize(node.text, values[0], dim))

    def expand(self, node: Node, function: Function) -> Expr | None:
        """Puts a function of define in."""
        self.scope.used.add(function.name)
        if not self.arity(node, len(function.parameters), len(function.parameters)):
            return None
        makes = self.makes
        if function.formula.makes:
            self.makes = ""
        args = [self.typed(a) for a in node.args]
        self.makes = makes
        if any(a is None for a in args):
            return None
        variables = dict(zip(function.parameters, args, strict=True))
        inside = self.inside or f"{function.name}({', '.join(function.parameters)})"
        e = Elaboration(self.scope, variables, inside, self.call_span or node.span).formula(function.formula)
        if e is None:
            return None
        if unnamed(e):
            self.refuse(
                "dim-unnamed",
                node.span,
                f"the size of {function.name}'s dim changes and has no name",
                f"end the line of {function.name} with `-> F`",
            )
            return None
        return self.build(node, lambda: e)

    def unknown_function(self, node: Node) -> tuple[str, Span, str, str]:
        """Words the mistake of a call to what is no function."""
        name = node.text
        if name in OUT_OF_REACH:
            why = OUT_OF_REACH[name]
            if why:
                return "out-of-reach", node.span, f"'{name}': out of reach are {why}", "a variant is a chain of linear recurrences"
            help = "shift and convolve in the layer, before the operator"
            return "out-of-reach", node.span, f"'{name}' mixes tokens, which only states do", help
        if name in INSTEAD:
            return "undefined", node.span, f"there is no function '{name}'", f"write {INSTEAD[name]}"
        if name in self.scope.later:
            return "undefined", node.span, f"'{name}' is defined further down", "move its line above this one"
        if name in self.scope.states or name in self.scope.tensors or name in self.scope.names or name in self.variables:
            return "arguments", node.span, f"'{name}' is no function", "write * for a product"
        near = difflib.get_close_matches(name, [*KNOWN, *self.scope.functions], 1, 0.6)
        help = f"did you mean {near[0]}?" if near else f"define it: `{name}(x): ...` under define"
        return "undefined", node.span, f"there is no function '{name}'", help


def resized_size(op: str, *sizes: Expr) -> Expr:
    """Returns the size of the dim that concat, taylor2 or quad makes from dims of the given sizes."""
    k = sizes[0]
    if op == "concat":
        return E.add(k, sizes[1])
    pairs = E.div(E.mul(k, E.add(k, E.ONE)), E.const(2.0))
    return pairs if op == "quad" else E.add(E.ONE, k, pairs)


def unnamed(e: Expr) -> str:
    """Returns the made-up name of a dim of ``e`` that its line should have named, or ""."""
    made = {f"{op}_" for op in RESIZES}
    return next((d for d in e.dims if any(d.startswith(m) for m in made)), "")
