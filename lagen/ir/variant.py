"""Variant: a spec file, typed. Inputs and params with named dims, states and outputs as expressions, assumptions as facts.

What it is: what the person wrote, with functions, names and underscore lines put in, every expression typed (ir/expr.py) and every
line's place in the file kept. What it is not: no algebra has been done; a state line may be spelled in any way.
Who makes it: spec/. Who reads it: passes/canonicalise, and verify/oracle, which evaluates it as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from lagen.ir.expr import Expr


@dataclass(frozen=True)
class Span:
    """A place in the spec's text: 1-based line and column, and a length in characters."""

    line: int
    col: int
    length: int = 1


@dataclass(frozen=True)
class Tensor:
    """An input ([B, T, *head, *dims]) or a param ([*head, *dims]) of the operator; ``dims`` in storage order."""

    name: str
    head: str  # "", "H" or "HV"
    dims: tuple[str, ...]
    token: bool  # has batch and time in front

    @property
    def shape(self) -> tuple[str, ...]:
        """Returns the names of all dims in storage order, as in ("B", "T", "H", "K")."""
        return (("B", "T") if self.token else ()) + ((self.head,) if self.head else ()) + self.dims


@dataclass(frozen=True)
class StateLine:
    """``S: expr``. ``dims`` in the order of the state's layout [B, head, *dims]; ``expr`` reads ``past`` leaves of itself."""

    name: str
    head: str
    dims: tuple[str, ...]
    expr: Expr
    span: Span
    init: float = 0.0  # value before the first token where no initial state is given
    peak: bool = False  # m: max(m[t-1] + a, b)


@dataclass(frozen=True)
class OutputLine:
    """``o: expr``, [B, T, head, *dims]; reads ``now`` and ``past`` leaves of states, inputs and params."""

    name: str
    head: str
    dims: tuple[str, ...]
    expr: Expr
    span: Span


@dataclass(frozen=True)
class Variant:
    """A typed spec. ``inputs`` and ``params`` in the operator's argument order, ``states`` in the order of their lines."""

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    states: tuple[StateLine, ...]
    outputs: tuple[OutputLine, ...]
    assumptions: tuple[Expr, ...]  # comparisons such as le(g, 0)
    chunk_sizes: tuple[int, ...]
    chunk_default: int
    causal: bool
    names: tuple[tuple[str, Expr], ...]  # what `define:` and underscore lines name, for readable print-outs
    sizes: tuple[tuple[str, Expr], ...]  # a dim made by `-> F`, and its size as an expression of other sizes
    source: str  # the file's text
    path: str
    spans: tuple[tuple[str, Span], ...]  # of every name that the file declares

    @property
    def scaled(self) -> bool:
        """Tells whether the spec mentions ``scale``."""
        from lagen.ir.expr import walk

        return any(n.op == "scale" for n in walk(*(s.expr for s in self.states), *(o.expr for o in self.outputs)))

    def tensor(self, name: str) -> Tensor:
        """Returns the input or param called ``name``; raises KeyError."""
        return {t.name: t for t in self.inputs + self.params}[name]

    def state(self, name: str) -> StateLine:
        """Returns the state called ``name``; raises KeyError."""
        return {s.name: s for s in self.states}[name]
