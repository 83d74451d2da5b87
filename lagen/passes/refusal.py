"""Refusals: why a typed spec has no canonical form, told at its place in the file, in the words of spec/mistakes."""

from __future__ import annotations

from lagen.ir.expr import Expr, contract
from lagen.ir.variant import OutputLine, Span, StateLine, Variant
from lagen.spec.mistakes import Mistake, SpecErrors
from lagen.spec.read import read_places

Line = StateLine | OutputLine


class Refused(SpecErrors):
    """A rule of the language that a spec breaks. ``code`` names the rule, ``span`` the place, ``help`` what to write instead."""

    @property
    def mistake(self) -> Mistake:
        """Returns the one mistake."""
        return self.mistakes[0]

    @property
    def code(self) -> str:
        """Returns the mistake's code."""
        return self.mistake.code

    @property
    def message(self) -> str:
        """Returns what is wrong."""
        return self.mistake.message

    @property
    def span(self) -> Span:
        """Returns where it is wrong."""
        return self.mistake.span

    @property
    def help(self) -> str:
        """Returns what to write instead."""
        return self.mistake.help

    @classmethod
    def at(
        cls, variant: Variant, line: StateLine | OutputLine, code: str, message: str, help: str = "", term: Expr | None = None
    ) -> Refused:
        """Makes the refusal at a line of ``variant``, narrowed to ``term`` where the file holds it."""
        return cls((Mistake(code, place(variant, line, term), message, help),), variant.source, variant.path)

    def __reduce__(self) -> tuple[type[SpecErrors], tuple[tuple[Mistake, ...], str, str]]:
        return type(self), (self.mistakes, self.source, self.path)


def place(variant: Variant, line: Line, term: Expr | None) -> Span:
    """Returns the place of ``term`` in a line, that of the line where it does not stand there as it is."""
    if term is None or not variant.source:
        return line.span
    _, places = read_places(variant.source, variant.path)
    found = places.get(line.name, {})
    for spelling in (term, contract(*reversed(term.args)) if term.op == "contract" else term):
        if spelling in found:
            return found[spelling]
    return _search(variant.source, line.span, str(term))


def _search(source: str, span: Span, text: str) -> Span:
    lines = source.split("\n")
    for number in range(span.line, min(span.line + 3, len(lines) + 1)):
        start = lines[number - 1].find(text, span.col - 1 if number == span.line else 0)
        if start >= 0:
            return Span(number, start + 1, len(text))
    return span
