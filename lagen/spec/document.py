"""The outer shape of a spec file: YAML read as data only, every key and value with its place in the text.

YAML is taken as a stream of events, so that nesting, tags, anchors, aliases, duplicate keys and second documents are refused as they
come, and nothing is resolved (an input may be called ``n``). A scalar keeps its raw text, aligned with the file: what is at index i
of a value is at ``start + i`` of the file, also in block scalars and in plain scalars over several lines.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent, Event, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent
from ruamel.yaml.reader import ReaderError

from lagen.ir.variant import Span
from lagen.spec.mistakes import Report, SpecErrors

MAX_BYTES = 64 * 1024
"""A spec is a page; the pure Python YAML scanner reads this much in well under a second."""
MAX_DEPTH = 4
MAX_ITEMS = 100


_NESTED = re.compile(r"(?:[\[{]\s*){8}")
"""What would keep the scanner busy long before the depth is known."""


class Source:
    """The file's text and its lines."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self._starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def span(self, start: int, end: int) -> Span:
        """Returns the place of text[start:end], cut at the end of its first line."""
        start = min(start, len(self.text))
        line = bisect_right(self._starts, start) - 1
        newline = self.text.find("\n", start)
        end = min(end, len(self.text) if newline < 0 else newline)
        return Span(line + 1, start - self._starts[line] + 1, max(1, end - start))


@dataclass(frozen=True)
class Scalar:
    """A scalar's text, aligned with the file (line ends are spaces); ``start`` is its index in the file. ``refused`` tells that it was
    an alias or had a tag, which has been reported."""

    text: str
    start: int
    span: Span
    refused: bool = False


@dataclass(frozen=True)
class Sequence:
    """A list of values."""

    items: tuple[Value, ...]
    span: Span


@dataclass(frozen=True)
class Mapping:
    """Keys and values in order; no key twice. ``flow`` tells that it is written in braces."""

    items: tuple[tuple[Scalar, Value], ...]
    span: Span
    flow: bool


Value = Scalar | Sequence | Mapping


def _scalar(event: ScalarEvent, source: Source, report: Report) -> Scalar:
    """Makes a scalar from its raw text: quotes, block headers and comments of block scalars become blanks."""
    start, end = event.start_mark.index, event.end_mark.index
    raw = source.text[start:end]
    if event.style in ("|", ">"):
        header = raw.find("\n") + 1 or len(raw)
        raw = " " * header + re.sub(r"#[^\n]*", lambda m: " " * len(m.group()), raw[header:])
    elif event.style in ("'", '"'):
        inner = raw[1:-1]
        if "\\" in inner or (event.style == "'" and "'" in inner):
            inner = event.value if len(event.value) <= len(inner) else event.value[: len(inner)]
            inner = inner.ljust(len(raw) - 2)
        raw = f" {inner} "
    text = raw.replace("\n", " ")
    left = len(text) - len(text.lstrip())
    text = text.strip()
    return Scalar(text, start + left, source.span(start + left, start + left + len(text)))


class _Builder:
    """Builds values from a stream of events, refusing what a spec never holds."""

    def __init__(self, source: Source, report: Report, events: Iterator[Event]) -> None:
        self.source, self.report, self.events = source, report, events

    def value(self, event: Event, depth: int) -> Value:
        span = self.source.span(event.start_mark.index, max(event.end_mark.index, event.start_mark.index + 1))
        if isinstance(event, AliasEvent):
            self.report.add("anchor", span, f"'*{event.anchor}' is a YAML alias", "write the value out; use define for a shared expression")
            return Scalar("", event.start_mark.index, span, refused=True)
        assert isinstance(event, NodeEvent), event
        if event.anchor is not None:
            self.report.add("anchor", span, f"'&{event.anchor}' is a YAML anchor", "remove it; use define for a shared expression")
        tag = getattr(event, "ctag", None) or getattr(event, "tag", None)
        if tag is not None:
            self.report.add("tag", span, f"'{tag}' is a YAML tag", "remove it: a spec is plain data")
        if isinstance(event, ScalarEvent):
            if event.anchor is not None or tag is not None:
                return Scalar("", event.start_mark.index, span, refused=True)
            return _scalar(event, self.source, self.report)
        if depth >= MAX_DEPTH:
            self.report.add("nested-too-deep", span, "this nests deeper than any part of a spec", "see `lagen new` for the shape of a spec")
            raise SpecErrors(self.report.mistakes, self.source.text, self.source.path)
        if isinstance(event, SequenceStartEvent):
            return Sequence(tuple(self.value(e, depth + 1) for e in self.until("SequenceEndEvent")), span)
        assert isinstance(event, MappingStartEvent), event
        return self.mapping(event, depth, span)

    def until(self, end: str) -> Iterator[Event]:
        items = 0
        for event in self.events:
            if type(event).__name__ == end:
                return
            yield event
            items += 1
            if items > MAX_ITEMS:
                span = self.source.span(event.start_mark.index, event.end_mark.index)
                self.report.add("too-long", span, f"more than {MAX_ITEMS} entries in one list", "is this a spec?")
                raise SpecErrors(self.report.mistakes, self.source.text, self.source.path)

    def mapping(self, event: MappingStartEvent, depth: int, span: Span) -> Mapping:
        items: dict[str, tuple[Scalar, Value]] = {}
        for head in self.until("MappingEndEvent"):
            key = self.value(head, depth + 1)
            value = self.value(next(self.events), depth + 1)
            if not isinstance(key, Scalar):
                self.report.add("shape", key.span, "a key is a plain word", "write `key: value`")
            elif key.text in items:
                first = items[key.text][0].span
                self.report.add("duplicate-key", key.span, f"'{key.text}' stands twice; first on line {first.line}", "keep one of them")
            else:
                items[key.text] = (key, value)
        return Mapping(tuple(items.values()), span, bool(event.flow_style))


def compose(source: Source, report: Report) -> Mapping | None:
    """Composes the file's one mapping; what is wrong goes to the report. Raises SpecErrors where reading cannot go on."""
    nested = _NESTED.search(source.text)
    if nested is not None:
        report.add("nested-too-deep", source.span(*nested.span()), "this nests deeper than any part of a spec", "remove the brackets")
        return None
    try:
        root = None
        events = iter(YAML(typ="safe", pure=True).parse(source.text))
        build = _Builder(source, report, events)
        for event in events:
            if isinstance(event, NodeEvent):
                if root is not None:
                    continue
                root = build.value(event, 0)
            elif isinstance(event, DocumentStartEvent) and root is not None:
                span = source.span(event.start_mark.index, event.end_mark.index)
                report.add("many-documents", span, "a second document begins here", "write one spec per file")
                break
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = mark.index if mark is not None else 0
        report.add("yaml", source.span(at, at + 1), f"not YAML: {error.problem or error.context}", _yaml_help(str(error.problem)))
        return None
    except ReaderError as error:
        at = int(error.position)
        report.add("yaml", source.span(at, at + 1), f"not YAML: {error.reason}", "remove the character")
        return None
    except YAMLError as error:
        report.add("yaml", Span(1, 1), f"not YAML: {error}")
        return None
    if not isinstance(root, Mapping):
        report.add("shape", Span(1, 1) if root is None else root.span, "a spec is a mapping of keys", "begin with `name: my_variant`")
        return None
    return root


def _yaml_help(problem: str) -> str:
    if "mapping values" in problem:
        return "quote a doc that holds a colon; an expression holds none"
    if "tab" in problem or "\\t" in problem:
        return "indent with spaces"
    return "see `lagen new` for the shape of a spec"
