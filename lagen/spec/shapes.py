"""The dims of a state, found from its line while its past is unknown.

Every value gets the dims that it has at least: the past of the line's own state adds none, so what the other terms have is what the
state has. Mistakes are not reported here; the line is typed again once the state's dims are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lagen.ir.expr import HEADS, Expr
from lagen.spec.elaborate import Scope
from lagen.spec.syntax import Formula, Node
from lagen.spec.vocabulary import RESIZES


@dataclass(frozen=True)
class Shape:
    """Dims and head of a value: all of them where ``exact``, else the least."""

    dims: frozenset[str] = frozenset()
    head: str = ""
    exact: bool = True


def _of(e: Expr | None) -> Shape:
    return Shape() if e is None else Shape(frozenset(e.dims), e.head)


def _widest(*shapes: Shape) -> str:
    return max((s.head for s in shapes), key=HEADS.index, default="")


class _Walk:
    """One line, or one call of a function in it."""

    def __init__(self, scope: Scope, variables: dict[str, Shape]) -> None:
        self.scope, self.variables, self.makes = scope, variables, ""

    def formula(self, formula: Formula) -> Shape:
        self.makes = formula.makes
        shape = self.node(formula.body)
        if formula.makes and formula.makes not in shape.dims and len(shape.dims) == 1:
            return Shape(frozenset({formula.makes}), shape.head, shape.exact)
        return shape

    def node(self, node: Node) -> Shape:
        if self.scope.exhausted(node.span):
            return Shape()
        if node.kind == "name":
            return self.name(node.text)
        if node.kind == "index":
            state = self.scope.states.get(node.text)
            return Shape(exact=False) if state is None or state.dims is None else Shape(frozenset(state.dims), state.head)
        if node.kind == "call":
            return self.call(node)
        args = [self.node(a) for a in node.args]
        return self.contract(*args) if node.text == "@" else self.together(*args)

    def together(self, *args: Shape) -> Shape:
        return Shape(frozenset().union(*(a.dims for a in args)), _widest(*args), all(a.exact for a in args))

    def contract(self, *args: Shape) -> Shape:
        if not all(a.exact for a in args):
            return Shape(frozenset(), _widest(*args), False)
        out: frozenset[str] = frozenset()
        for a in args:
            out ^= a.dims
        return Shape(out, _widest(*args))

    def name(self, name: str) -> Shape:
        scope = self.scope
        if name in self.variables:
            return self.variables[name]
        if name in scope.tensors:
            return _of(scope.tensors[name])
        if name in scope.names:
            return _of(scope.names[name])
        if name in scope.abbreviations:
            return _Walk(scope, {}).formula(scope.abbreviations[name])
        return Shape()

    def call(self, node: Node) -> Shape:
        name, makes = node.text, self.makes
        function = self.scope.functions.get(name)
        if name in RESIZES or (function is not None and function.formula.makes):
            self.makes = ""
        args = [self.node(a) for a in node.args]
        self.makes = makes
        if function is not None:
            return _Walk(self.scope, dict(zip(function.parameters, args, strict=False))).formula(function.formula)
        head, exact = _widest(*args), all(a.exact for a in args)
        if name in RESIZES:
            dim = makes or "_".join([name, *(d for a in args for d in sorted(a.dims))])
            return Shape(frozenset({dim}), head, exact)
        if name == "dot":
            return self.contract(*args)
        if name in ("sum", "mean") or (name == "max" and len(args) == 1):
            return Shape(frozenset(), head, exact)
        return self.together(*args)


def least(scope: Scope, formula: Formula) -> tuple[frozenset[str], str]:
    """Returns the dims and the head that a line's value has at least."""
    shape = _Walk(scope, {}).formula(formula)
    return shape.dims, shape.head


def _first_outer(e: Expr, dims: frozenset[str]) -> Iterator[tuple[str, str]]:
    if e.op == "outer" and frozenset(e.dims) == dims:
        yield e.args[0].dims[0], e.args[1].dims[0]
    for a in e.args:
        yield from _first_outer(a, dims)


def layout(e: Expr, stored: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Returns the dims of a line's value in storage order: those of its first outer, else of its first tensor with both; None
    where neither tells. ``stored`` has every tensor's dims in storage order."""
    if len(e.dims) < 2:
        return e.dims
    dims = frozenset(e.dims)
    outer = next(_first_outer(e, dims), None)
    return outer if outer is not None else _first_tensor(e, dims, stored)


def _first_tensor(e: Expr, dims: frozenset[str], stored: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    if e.op in ("input", "param") and frozenset(e.dims) == dims:
        return stored[e.name]
    return next((found for a in e.args if (found := _first_tensor(a, dims, stored)) is not None), None)
