"""Mistakes in a spec: what is wrong, where, and what to write instead; all of a file's mistakes are raised together.

A mistake's ``code`` is stable: tests, editors and scripts may rely on it. CODES lists them all with the rule of the language they
belong to. Who makes mistakes: spec/ while reading, passes/canonicalise where a rule needs algebra.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lagen.ir.variant import Span, Variant

MAX_MISTAKES = 200
MAX_SHOWN = 100

CODES: dict[str, str] = {
    # the file
    "file-too-large": "a spec is a page of text",
    "not-utf8": "a spec is UTF-8 text",
    "yaml": "the file is not YAML",
    "tag": "YAML tags are refused",
    "anchor": "YAML anchors and aliases are refused",
    "many-documents": "one file holds one spec",
    "duplicate-key": "a key stands twice in one mapping",
    "flow-style": "define and recurrence hold plain lines or block scalars",
    "nested-too-deep": "the file nests deeper than a spec does",
    "shape": "a key holds the wrong kind of value",
    "unknown-key": "no such key",
    "missing-key": "a key is missing",
    "value": "a value is out of its range",
    # expressions
    "character": "a character that no expression holds",
    "syntax": "not an expression",
    "too-long": "an expression, or what it stands for, is too long",
    "too-deep": "an expression nests too deep",
    "ambiguous-product": "a @ b * c and a @ b / c need parentheses",
    "exponent": "** takes a constant exponent",
    "comparison": "a comparison outside where(...) and assume",
    "arguments": "a function has other arguments",
    "time": "t is an index, not a number; only S[t] and S[t-1] exist",
    "no-past": "only states have a past",
    "dims": "dims do not fit",
    "dim-unnamed": "a dim whose size changes is named by '-> F'",
    "dim-size": "every '-> F' gives one size",
    "dim": "not the name of a dim",
    "layout": "a state's layout cannot be told",
    "scale": "scale needs a dim K",
    "init": "init names a state and a number",
    "assumption": "an assumption is a comparison of token-wise values",
    # the rules of the language
    "nonlinear-state": "rule 1: a state is linear in its own past, on one side",
    "not-an-outer": "rule 1: what is written to a matrix state is a sum of outer products",
    "term-dims": "rule 1: every term of a state line has all of the state's dims",
    "circle": "rules 2 and 8: states form stages and never write each other",
    "stage-order": "rule 2: a state reads states written above it",
    "matrix-read": "rule 2: a matrix state is read linearly, by @ with a vector",
    "matrix-output": "rule 2: no output has both dims of a matrix state",
    "decay-grows": "rule 3: a decay never grows a state",
    "unused": "rule 4: every input, param and state is used",
    "twice": "rule 4: every name is defined once",
    "undefined": "rule 4: every name is defined before its use",
    "shadows": "rule 4: a name shadows nothing",
    "name": "rule 4: not a name",
    "no-state": "rule 4: an output reads a state",
    "no-output": "rule 5: a spec has an output",
    "abbreviation": "rule 5: an underscore line is put in where it is used",
    "peak": "rule 7: a peak line is max(m[t-1] + a, b)",
    "out-of-reach": "rule 8: not expressible as linear recurrences",
    # warnings (rule 6)
    "denominator": "rule 6: a denominator may be 0",
    "domain": "rule 6: log, sqrt, rsqrt or a power of what may be negative",
    "write-weight": "rule 6: exp of an unbounded write weight",
    "delta-gain": "rule 6: a delta rule whose gain may exceed 2",
}


@dataclass(frozen=True)
class Mistake:
    """One mistake: its code, its place, what is wrong, and what to write instead."""

    code: str
    span: Span
    message: str
    help: str = ""
    warning: bool = False

    def __post_init__(self) -> None:
        assert self.code in CODES, self.code

    def render(self, source: str, path: str) -> str:
        """Renders as ``file:line:col: error[code]: message``, the source line, a caret underline and the help."""
        kind = "warning" if self.warning else "error"
        lines = source.split("\n")
        line = lines[self.span.line - 1] if self.span.line <= len(lines) else ""
        first = max(0, self.span.col - 100) if len(line) > 160 else 0
        shown = "".join(c if c.isprintable() else " " for c in line[first : first + 160])
        number = str(self.span.line)
        length = max(1, min(self.span.length, first + len(shown) + 1 - self.span.col))
        out = [
            f"{path}:{self.span.line}:{self.span.col}: {kind}[{self.code}]: {self.message}",
            f"  {number} | {shown}",
            f"  {' ' * len(number)} | {' ' * (self.span.col - 1 - first)}{'^' * length}",
        ]
        return "\n".join(out + ([f"  help: {self.help}"] if self.help else []))


class SpecErrors(Exception):
    """Says everything that is wrong with one spec. ``mistakes`` are in the order of the file."""

    def __init__(self, mistakes: Iterable[Mistake], source: str, path: str) -> None:
        self.mistakes = tuple(sorted(dict.fromkeys(mistakes), key=lambda m: (m.span.line, m.span.col)))
        self.source = source
        self.path = path
        super().__init__(path)

    def __str__(self) -> str:
        shown = [m.render(self.source, self.path) for m in self.mistakes[:MAX_SHOWN]]
        more = len(self.mistakes) - len(shown)
        return "\n\n".join([*shown, f"{self.path}: and {more} more mistakes"] if more else shown)

    def __reduce__(self) -> tuple[type[SpecErrors], tuple[tuple[Mistake, ...], str, str]]:
        return SpecErrors, (self.mistakes, self.source, self.path)

    @staticmethod
    def of(variant: Variant, *mistakes: Mistake) -> SpecErrors:
        """Makes the error that later passes raise about a variant already read."""
        return SpecErrors(mistakes, variant.source, variant.path)


class TooMany(Exception):
    """Ends the reading of a file that has MAX_MISTAKES mistakes."""


@dataclass
class Report:
    """The mistakes found so far in one file."""

    mistakes: list[Mistake] = field(default_factory=list)

    def add(self, code: str, span: Span, message: str, help: str = "") -> None:
        """Adds a mistake; raises TooMany where it is one too many."""
        if len(self.mistakes) >= MAX_MISTAKES:
            raise TooMany
        self.mistakes.append(Mistake(code, span, message, help))
