"""The lines of a recurrence: which are states, abbreviations and outputs, and whether they can run in their order.

A line that reads its own past, underscore lines put in, is a state (in a spec that is not causal: a line that others read as X[t]).
States form stages: each reads states written above it, never in a circle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lagen.ir.variant import Span
from lagen.spec.elaborate import Scope
from lagen.spec.mistakes import Report
from lagen.spec.syntax import Formula, Node


@dataclass(frozen=True)
class Line:
    """One line of the recurrence; ``at`` is its place among the lines."""

    name: str
    span: Span
    formula: Formula
    at: int

    @property
    def abbreviates(self) -> bool:
        """Tells whether the line is put in where it is used."""
        return self.name.startswith("_")


def nodes(node: Node) -> Iterator[Node]:
    """Yields a node and everything below it, in the order of the text."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.args))


def terms(node: Node, abbreviations: dict[str, Formula], seen: set[str] | None = None) -> Iterator[Node]:
    """Yields the terms of a sum, every abbreviation put in once."""
    seen = set() if seen is None else seen
    if node.kind == "negate" or (node.kind == "binary" and node.text in "+-"):
        for a in node.args:
            yield from terms(a, abbreviations, seen)
    elif node.kind == "name" and node.text in abbreviations:
        if node.text not in seen:
            seen.add(node.text)
            yield from terms(abbreviations[node.text].body, abbreviations, seen)
    else:
        yield node


class Order:
    """The lines with their reads. ``states`` and ``outputs`` in the order of the file; ``broken`` lines cannot be typed."""

    def __init__(self, lines: list[Line], causal: bool, scope: Scope, report: Report) -> None:
        self.lines, self.causal, self.scope, self.report = lines, causal, scope, report
        self.by_name = {line.name: line for line in lines}
        self.broken: set[str] = set()
        self._check_abbreviations()
        self._reads: dict[str, dict[tuple[str, float], Node]] = {}
        self._closed: dict[str, set[str]] = {}
        if causal:
            self.states = [x for x in lines if not x.abbreviates and (x.name, -1.0) in self.reads(x)]
        else:
            read = {n.text for x in lines for n in nodes(x.formula.body) if n.kind == "index" and n.text != x.name}
            self.states = [x for x in lines if not x.abbreviates and x.name in read]
        names = {x.name for x in self.states}
        self.outputs = [x for x in lines if not x.abbreviates and x.name not in names]
        indices = [(node, line) for line in lines for node in nodes(line.formula.body) if node.kind == "index"]
        for node, line in sorted(indices, key=lambda x: x[0].text != x[1].name):  # a line that misreads itself says so first
            self._check_index(node, line, names)
        for line in self.states:
            self._check_stage(line, names)

    def reads(self, line: Line) -> dict[tuple[str, float], Node]:
        """Returns what a line reads of states, as (name, 0 or -1), underscore lines put in, and where it first does."""
        if line.name not in self._reads:
            found: dict[tuple[str, float], Node] = {}
            for node in nodes(line.formula.body):
                if node.kind == "index":
                    found.setdefault((node.text, node.value), node)
                elif node.kind == "name" and node.text in self.by_name and node.text not in self.broken:
                    inner = self.by_name[node.text]
                    if inner.abbreviates and inner.at < line.at:
                        for key, at in self.reads(inner).items():
                            found.setdefault(key, at)
            self._reads[line.name] = found
        return self._reads[line.name]

    def _check_abbreviations(self) -> None:
        for line in self.lines:
            for node in nodes(line.formula.body):
                if node.kind != "name" or node.text not in self.by_name:
                    continue
                if node.text == line.name and not line.abbreviates:
                    self.refuse(line, "circle", node, f"'{line.name}' is what this line defines", f"write {line.name}[t-1] for its past")
                    continue
                other = self.by_name[node.text]
                if other.abbreviates and other.at >= line.at:
                    what = "reads itself" if other is line else f"is read above its line {other.span.line}"
                    self.report.add("undefined", node.span, f"'{node.text}' {what}", "define a name before its use")
                    self.broken.add(line.name)

    def _check_index(self, node: Node, line: Line, states: set[str]) -> None:
        name, scope = node.text, self.scope
        spelled = f"{name}[{'t-1' if node.value else 't'}]"
        if name in states:
            state = self.by_name[name]
            if not self.causal and node.value:
                self.refuse(line, "no-past", node, f"'{spelled}': a sum over all tokens has no past", f"write {name}[t], or causal: true")
            elif name == line.name and not node.value:
                self.refuse(line, "circle", node, f"'{spelled}' is what this line defines", f"write {name}[t-1]")
            elif not node.value and state.at > line.at:
                self.refuse(line, "stage-order", node, f"'{spelled}' is read above its line {state.span.line}", "move this line below it")
            return
        if name in self.by_name and self.by_name[name].abbreviates:
            help = f"write {name}, or give the state a name"
            self.refuse(line, "abbreviation", node, f"'{name}' is put in where it is used and has no past", help)
        elif name in self.broken and name != line.name:
            self.broken.add(line.name)  # reported at the line that it reads
        elif name == line.name:
            self.refuse(line, "circle", node, f"'{spelled}' is what this line defines", f"write {name}[t-1] for its past")
        elif name in self.by_name:
            message = f"'{name}' does not read its own past, so it is an output, which no line reads"
            help = f"a state reads {name}[t-1] on its line; an abbreviation is called _{name}"
            self.refuse(line, "undefined", node, message, help)
        elif name in scope.tensors or name in scope.names or name in scope.functions:
            help = f"write {name}" if not node.value else "shift tokens in the layer and give the result as an input"
            self.refuse(line, "no-past", node, f"'{spelled}': only states have a past, and '{name}' is none", help)
        else:
            self.refuse(line, "undefined", node, f"no line is called '{name}'", f"write the line `{name}: {name}[t-1] + ...`")

    def _check_stage(self, line: Line, states: set[str]) -> None:
        for (name, _), node in self.reads(line).items():
            if name == line.name or name not in states:
                continue
            if line.name in self._below(name, states):
                self.refuse(
                    line,
                    "circle",
                    node,
                    f"states '{line.name}' and '{name}' write each other",
                    "out of reach (momentum delta rule, Titans): states form stages, each reading those above it",
                )
                return
            if self.by_name[name].at > line.at and node.value:
                message = f"a state reads states above it; '{name}' is on line {self.by_name[name].span.line}"
                self.refuse(line, "stage-order", node, message, f"move the line of {name} up")

    def _below(self, start: str, states: set[str]) -> set[str]:
        """Returns the states that a state reads, directly or through others."""
        if start not in self._closed:
            seen: set[str] = set()
            stack = [start]
            while stack:
                for name, _ in self.reads(self.by_name[stack.pop()]):
                    if name in states and name not in seen:
                        seen.add(name)
                        stack.append(name)
            self._closed[start] = seen
        return self._closed[start]

    def refuse(self, line: Line, code: str, node: Node, message: str, help: str) -> None:
        self.report.add(code, node.span, message, help)
        self.broken.add(line.name)
