"""Reading a spec: text to Variant. Every section in turn, all mistakes collected, one exception at the end.

text -> compose (YAML, places) -> sections -> parse (expressions) -> order of lines -> typed states -> typed outputs -> Variant
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from lagen.ir import expr as E
from lagen.ir.expr import Expr, walk
from lagen.ir.variant import OutputLine, Span, StateLine, Tensor, Variant
from lagen.spec.document import MAX_BYTES, Mapping, Scalar, Sequence, Source, Value, compose
from lagen.spec.elaborate import Elaboration, Function, Scope, StateType, unnamed
from lagen.spec.lines import Line, Order, nodes, terms
from lagen.spec.lint import lint
from lagen.spec.mistakes import Mistake, Report, SpecErrors, TooMany
from lagen.spec.rules import Rules, is_peak
from lagen.spec.shapes import layout, least
from lagen.spec.syntax import Formula, is_name, parse
from lagen.spec.vocabulary import HEAD_DIMS, RESIZES, reserved

KEYS = ("name", "doc", "inputs", "params", "define", "assume", "recurrence", "chunk", "causal", "init")
CHUNK_SIZES = (16, 32, 64, 128)
CHUNK_DEFAULT = 64
_FUNCTION = re.compile(r"(\w+)\s*\(([^()]*)\)\Z", re.ASCII)


@dataclass
class Reading:
    """One file being read: what its sections declared so far."""

    source: Source
    report: Report
    scope: Scope
    sections: dict[str, tuple[Scalar, Value]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)  # of declared names
    tensors: list[Tensor] = field(default_factory=list)
    assumptions: list[Expr] = field(default_factory=list)

    def declare(self, name: str, span: Span, what: str) -> bool:
        """Declares a name; returns whether it is a name, new, and free."""
        if not self._free(name, span, what):
            self.scope.names.setdefault(name, None)  # what reads it says nothing new
            return False
        self.spans[name] = span
        return True

    def _free(self, name: str, span: Span, what: str) -> bool:
        if not is_name(name):
            self.report.add("name", span, f"'{name}' is not a name", "write letters, digits and underscores, a letter first")
            return False
        means = reserved(name) or ("a dim" if name in self.scope.dims else "")
        if means:
            self.report.add("shadows", span, f"{what} '{name}' shadows {means}", "choose another name")
            return False
        if name in self.spans:
            first = self.spans[name].line
            self.report.add("twice", span, f"'{name}' is defined twice; first on line {first}", "choose another name")
            return False
        return True

    def section(self, key: str) -> Value | None:
        """Returns what stands under a key, None where it is absent."""
        return self.sections[key][1] if key in self.sections else None

    def mapping(self, key: str) -> Mapping | None:
        """Returns the mapping under a key; anything else is a mistake."""
        value = self.section(key)
        if value is None or isinstance(value, Mapping):
            return value
        if isinstance(value, Scalar) and not value.text:
            return None
        self.report.add("shape", value.span, f"{key} holds `name: value` lines", f"write them indented below `{key}:`")
        return None


# ---- sections -------------------------------------------------------------------------------------------------------------------


def _read_sections(root: Mapping, reading: Reading) -> None:
    for key, value in root.items:
        if key.text in KEYS:
            reading.sections[key.text] = (key, value)
        else:
            reading.report.add("unknown-key", key.span, f"'{key.text}' is no key of a spec", f"the keys are {', '.join(KEYS)}")
    for needed in ("name", "inputs", "recurrence"):
        if needed not in reading.sections:
            reading.report.add("missing-key", Span(1, 1), f"the key '{needed}' is missing", f"add `{needed}:`")


def _word(reading: Reading, key: str, default: str) -> str:
    value = reading.section(key)
    if value is None:
        return default
    if not isinstance(value, Scalar):
        reading.report.add("shape", value.span, f"{key} is one line of text", f"write `{key}: ...`")
        return default
    return value.text


def _read_name(reading: Reading) -> str:
    name = _word(reading, "name", "")
    value = reading.section("name")
    if isinstance(value, Scalar) and not value.refused:
        span = value.span
        if not is_name(name) or name.startswith("_"):
            reading.report.add("name", span, f"'{name}' is not the name of an operator", "write a Python identifier, such as my_variant")
        elif reserved(name) in ("a keyword", "a keyword of C++"):
            reading.report.add("shadows", span, f"the name '{name}' shadows {reserved(name)}", "choose another name")
    return name


def _read_causal(reading: Reading) -> bool:
    text = _word(reading, "causal", "true")
    if text not in ("true", "false", ""):
        reading.report.add("value", reading.sections["causal"][1].span, f"causal is true or false, not '{text}'", "write `causal: false`")
    return text != "false"


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) else None


def _chunk_size(value: Value, reading: Reading) -> int | None:
    size = _integer(value.text) if isinstance(value, Scalar) else None
    if size is None or not 16 <= size <= 256 or size & (size - 1):
        reading.report.add("value", value.span, "a chunk size is a power of two from 16 to 256", "write 16, 32, 64, 128 or 256")
        return None
    return size


def _read_chunk(reading: Reading) -> tuple[tuple[int, ...], int]:
    sizes: tuple[int, ...] = CHUNK_SIZES
    default = CHUNK_DEFAULT
    section = reading.mapping("chunk")
    if section is None:
        return sizes, default
    default_span = section.span
    for key, value in section.items:
        if key.text == "default":
            default, default_span = _chunk_size(value, reading) or default, value.span
        elif key.text == "sizes" and isinstance(value, Sequence) and value.items:
            read = [_chunk_size(x, reading) for x in value.items]
            sizes = tuple(sorted({x for x in read if x is not None})) or sizes
        elif key.text == "sizes":
            reading.report.add("shape", value.span, "sizes is a list of chunk sizes", "write `sizes: [32, 64]`")
        else:
            reading.report.add("unknown-key", key.span, f"'{key.text}' is no key of chunk", "the keys are default, sizes")
    if default not in sizes:
        reading.report.add("value", default_span, f"the default {default} is not among the sizes {list(sizes)}", "add it to sizes")
    return sizes, default


def _read_dims(key: Scalar, value: Value, reading: Reading) -> tuple[str, tuple[str, ...]] | None:
    """Reads ``[H, K]`` as a head dim and further dims; None where it is not that."""
    report = reading.report
    before = len(report.mistakes)
    if not isinstance(value, Sequence):
        report.add("shape", value.span, f"the dims of '{key.text}' are a list", f"write `{key.text}: [H, K]`; `[]` for one number a token")
        return None
    head = ""
    dims: list[str] = []
    for i, item in enumerate(value.items):
        name = item.text if isinstance(item, Scalar) else ""
        if not is_name(name) or name.startswith(tuple(f"{op}_" for op in (*RESIZES, ""))):
            report.add("dim", item.span, f"'{name or 'this'}' is not the name of a dim", "write a name such as K; sizes are the caller's")
        elif name in ("B", "T"):
            report.add("dim", item.span, f"'{name}' stands for {'batch' if name == 'B' else 'time'}, which is implied", "leave it out")
        elif reserved(name):
            report.add("shadows", item.span, f"the dim '{name}' shadows {reserved(name)}", "choose another name")
        elif name in HEAD_DIMS:
            if i > 0:
                report.add("dim", item.span, f"the head dim {name} comes first, once", f"write [{name}, ...]")
            head = name if i == 0 else head
        elif name in dims:
            report.add("dim", item.span, f"'{key.text}' names the dim {name} twice", "call the other side E (sizes may coincide)")
        else:
            dims.append(name)
    if len(dims) > 2:
        report.add("dim", value.span, f"'{key.text}' has {len(dims)} dims besides the head's", "a tensor has at most two")
    return (head, tuple(dims)) if len(report.mistakes) == before else None


def _read_tensors(reading: Reading) -> None:
    found: list[tuple[Scalar, str, tuple[str, ...], bool]] = []
    for section, token in (("inputs", True), ("params", False)):
        mapping = reading.mapping(section)
        for key, value in mapping.items if mapping is not None else ():
            shape = _read_dims(key, value, reading)
            if shape is not None:
                found.append((key, *shape, token))
            else:
                reading.scope.names[key.text] = None  # what reads it says nothing new
    reading.scope.dims |= {d for _, head, dims, _ in found for d in ((head,) if head else ()) + dims}
    for key, head, dims, token in found:
        if reading.declare(key.text, key.span, "the input" if token else "the param"):
            if key.text.startswith("_"):
                reading.report.add("name", key.span, f"'{key.text}' begins with an underscore, as abbreviations do", "choose another name")
            reading.tensors.append(Tensor(key.text, head, dims, token))
            reading.scope.tensors[key.text] = E.leaf("input" if token else "param", key.text, dims, head, token)


def _formulas(section: str, reading: Reading) -> list[tuple[Scalar, Formula | None]]:
    """Parses the lines of define or recurrence, and notes the dims that they make."""
    mapping = reading.mapping(section)
    if mapping is None:
        return []
    if mapping.flow:
        reading.report.add(
            "flow-style", mapping.span, f"{section} is written in braces, where YAML cuts at commas", "write one line each, indented"
        )
        return []
    out: list[tuple[Scalar, Formula | None]] = []
    for key, value in mapping.items:
        if not isinstance(value, Scalar):
            help = "write the expression plainly behind the colon; begin it with a parenthesis or a name"
            reading.report.add("flow-style", value.span, f"'{key.text}' holds a YAML list or mapping, not an expression", help)
            out.append((key, None))
            continue
        formula = parse(value, reading.source, reading.report, key.span)
        if formula is not None and formula.makes:
            taken = "a head dim" if formula.makes in HEAD_DIMS else reserved(formula.makes)
            if not taken and formula.makes in reading.spans:
                taken = "a name of this file"
            if taken or formula.makes in ("B", "T") or formula.makes.startswith("_"):
                what = f"is {taken}" if taken else "cannot be the name of a dim"
                reading.report.add("dim", formula.makes_span, f"'{formula.makes}' {what}", "write `-> F`, or another new name")
                formula = None
            else:
                reading.scope.dims.add(formula.makes)
        out.append((key, formula))
    return out


def _read_define(reading: Reading, lines: list[tuple[Scalar, Formula | None]]) -> None:
    scope = reading.scope
    heads = [key.text.split("(")[0].strip() for key, _ in lines]
    scope.later |= set(heads)
    for (key, formula), head in zip(lines, heads, strict=True):
        match = _FUNCTION.match(key.text)
        if match is None:
            if reading.declare(key.text, key.span, "the name"):
                scope.names[key.text] = None
                if formula is not None and _without_states(formula, reading):
                    scope.names[key.text] = _named(key, formula, reading)
        else:
            _read_function(key, match, formula, reading)
        scope.later.discard(head)


def _named(key: Scalar, formula: Formula, reading: Reading) -> Expr | None:
    e = Elaboration(reading.scope).formula(formula)
    if e is not None and unnamed(e):
        message = f"the size of the dim of '{key.text}' changes and has no name"
        reading.report.add("dim-unnamed", key.span, message, "end its line with `-> F`")
        return None
    return e


def _without_states(formula: Formula, reading: Reading) -> bool:
    found = [n for n in nodes(formula.body) if n.kind == "index"]
    for n in found:
        help = "read states in the recurrence; name the part `_x: ...` there"
        reading.report.add("no-past", n.span, f"'{n.text}[...]' is read in define", help)
    return not found


def _read_function(key: Scalar, match: re.Match[str], formula: Formula | None, reading: Reading) -> None:
    name, parameters = match.group(1), tuple(p.strip() for p in match.group(2).split(","))
    if not reading.declare(name, key.span, "the function"):
        return
    scope, ok = reading.scope, True
    for i, p in enumerate(parameters):
        taken = reserved(p) or ("a dim" if p in scope.dims else "") or ("a name of this file" if p in reading.spans else "")
        if not is_name(p):
            reading.report.add("name", key.span, f"'{p}' is not the name of a parameter", "write `phi(x): ...`")
        elif taken:
            reading.report.add("shadows", key.span, f"the parameter '{p}' shadows {taken}", "choose another name for it")
        elif p in parameters[:i]:
            reading.report.add("twice", key.span, f"the parameter '{p}' stands twice", "choose another name for it")
        else:
            continue
        ok = False
    if formula is None or not ok or not _without_states(formula, reading):
        scope.names[name] = None  # a call of it has been reported already
        return
    known = {*parameters, *scope.tensors, *scope.names, *scope.functions, *scope.dims, "pi", "scale"}
    probe = Elaboration(scope, dict.fromkeys(parameters))
    for node in nodes(formula.body):
        if node.kind == "name" and node.text not in known:
            reading.report.add(*probe.unknown(node))
            ok = False
    if ok:
        scope.functions[name] = Function(name, parameters, formula)
    else:
        scope.names[name] = None


def _read_assumptions(reading: Reading) -> None:
    value = reading.section("assume")
    if value is None or (isinstance(value, Scalar) and not value.text):
        return
    if not isinstance(value, Sequence):
        reading.report.add("shape", value.span, "assume is a list", "write `- g <= 0` on a line of its own")
        return
    for item in value.items:
        if not isinstance(item, Scalar):
            reading.report.add("assumption", item.span, "an assumption is one comparison", "write `- g <= 0`")
            continue
        formula = parse(item, reading.source, reading.report, item.span)
        if formula is None or not _without_states(formula, reading):
            continue
        node = formula.body
        if node.kind != "compare" or node.text == "ne" or formula.makes:
            reading.report.add("assumption", item.span, "an assumption is a comparison by <, <=, >, >= or ==", "write `- g <= 0`")
            continue
        e = Elaboration(reading.scope).condition(node)
        if e is not None:
            reading.assumptions.append(e)


def _read_init(reading: Reading, states: list[str], causal: bool) -> dict[str, float]:
    section = reading.mapping("init")
    values: dict[str, float] = {}
    for key, value in section.items if section is not None else ():
        text = value.text if isinstance(value, Scalar) else ""
        if key.text not in states:
            reading.report.add("init", key.span, f"'{key.text}' is no state", f"the states are {', '.join(states) or 'none'}")
        elif not causal:
            reading.report.add("init", key.span, "a sum over all tokens has no initial state", "remove it")
        elif re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?", text, re.ASCII) is None or abs(float(text)) > 3e38:
            reading.report.add("init", value.span, f"'{text[:20]}' is no number", f"write `{key.text}: -1.0e30`")
        else:
            values[key.text] = float(text)
    return values


# ---- the recurrence -------------------------------------------------------------------------------------------------------------


@dataclass
class Typed:
    """The typed lines of a recurrence, with the places of their terms."""

    states: list[StateLine] = field(default_factory=list)
    outputs: list[OutputLine] = field(default_factory=list)
    places: dict[str, dict[Expr, Span]] = field(default_factory=dict)
    names: list[tuple[str, Expr]] = field(default_factory=list)


def _see(scope: Scope, order: Order, line: Line) -> None:
    """Makes the abbreviations above a line visible to it."""
    scope.abbreviations = {x.name: x.formula for x in order.lines if x.abbreviates and x.at < line.at and x.name not in order.broken}


def _type_line(line: Line, reading: Reading, order: Order, typed: Typed) -> Expr | None:
    if line.name in order.broken:
        return None
    reading.scope.places = {}
    _see(reading.scope, order, line)
    e = Elaboration(reading.scope).formula(line.formula)
    typed.places[line.name] = reading.scope.places
    if e is not None and unnamed(e):
        message = f"the size of a dim of '{line.name}' changes and has no name"
        reading.report.add("dim-unnamed", line.span, message, "end its line with `-> F`")
        return None
    return e


def _type_state(line: Line, reading: Reading, order: Order, typed: Typed, init: dict[str, float]) -> None:
    scope, report = reading.scope, reading.report
    if line.name in order.broken or any(n.name in order.broken for n in order.states if (n.name, 0.0) in order.reads(line)):
        return
    state = scope.states[line.name]
    _see(scope, order, line)
    dims, head = least(scope, line.formula)
    if len(dims) > 2:
        listed = ", ".join(sorted(dims))
        report.add("layout", line.span, f"the terms of '{line.name}' have dims {{{listed}}} together", "a state has at most two dims")
        return
    state.dims, state.head = tuple(sorted(dims)), head
    e = _type_line(line, reading, order, typed)
    if e is None:
        state.dims = None
        return
    rules = Rules(report, typed.places[line.name], line.span)
    stored = layout(e, {t.name: t.dims for t in reading.tensors})
    if stored is None:
        report.add("layout", line.span, f"the order of the dims of '{line.name}' cannot be told", "write one of its terms as outer(a, b)")
        return
    state.dims = stored
    peak = is_peak(e, line.name)
    if not peak:
        rules.check_linear(e, line.name)
        _check_terms(line, e, scope, report)
    if rules.check_reads(e, line.name):
        report.add("matrix-read", line.span, f"'{line.name}' adds a whole matrix state", "read it by @ with a vector")
    typed.states.append(StateLine(line.name, e.head, stored, e, line.span, init.get(line.name, 0.0), peak))


def _check_terms(line: Line, e: Expr, scope: Scope, report: Report) -> None:
    """Reports terms of a state's line that lack one of its dims."""
    for term in terms(line.formula.body, scope.abbreviations):
        has, _ = least(scope, Formula(term, line.formula.makes, term.span))
        missing = ", ".join(sorted(set(e.dims) - has))
        if missing:
            listed = ", ".join(sorted(has))
            help = "every term of a state line has all of the state's dims; write outer(a, b)"
            report.add("term-dims", term.span, f"this term has dims {{{listed}}} and lacks {missing} of {line.name}", help)


def _type_output(line: Line, reading: Reading, order: Order, typed: Typed) -> None:
    report = reading.report
    e = _type_line(line, reading, order, typed)
    if e is None:
        return
    rules = Rules(report, typed.places[line.name], line.span)
    matrices = {frozenset(s.dims): s.name for s in typed.states if len(s.dims) == 2}
    if rules.check_reads(e, "") or frozenset(e.dims) in matrices:
        name = matrices.get(frozenset(e.dims), "a state")
        place = typed.places[line.name].get(e, line.span)
        message = f"'{line.name}' has both dims of the matrix state {name}"
        report.add("matrix-output", place, message, "read it by @ with a vector: q @ S[t]")
        return
    stored = layout(e, {t.name: t.dims for t in reading.tensors})
    if stored is None:
        report.add("layout", line.span, f"the order of the dims of '{line.name}' cannot be told", "an output has at most one dim")
        return
    if not any(n.op in ("past", "now") for n in walk(e)):
        report.add("no-state", line.span, f"the output '{line.name}' reads no state", "compute it outside, or read S[t] or S[t-1]")
        return
    typed.outputs.append(OutputLine(line.name, e.head, stored, e, line.span))


def _read_recurrence(reading: Reading, parsed: list[tuple[Scalar, Formula | None]], causal: bool) -> Typed:
    scope, report, typed = reading.scope, reading.report, Typed()
    lines: list[Line] = []
    lost: list[str] = []
    for key, formula in parsed:
        if reading.declare(key.text, key.span, "the line"):
            if formula is not None:
                lines.append(Line(key.text, key.span, formula, len(lines)))
            else:
                lost.append(key.text)
    if lost:  # what reads a line that could not be parsed says nothing new
        scope.names.update(dict.fromkeys(lost))
        lines = [x for x in lines if not any(n.text in lost for n in nodes(x.formula.body))]
    order = Order(lines, causal, scope, report)
    scope.names.update((x.name, None) for x in lines if x.abbreviates and x.name in order.broken)
    scope.states = {x.name: StateType(x.name, x.at) for x in order.states}
    scope.outputs = {x.name for x in order.outputs}
    scope.later = set()
    init = _read_init(reading, list(scope.states), causal)
    for line in order.states:
        _type_state(line, reading, order, typed, init)
    for line in order.outputs:
        _type_output(line, reading, order, typed)
    for line in order.lines:
        if line.abbreviates and line.name not in order.broken:
            _see(scope, order, line)
            scope.abbreviations[line.name] = line.formula
            if line.name not in scope.put_in:
                scope.put_in[line.name] = Elaboration(scope).formula(line.formula)
    if not order.outputs and not lost and "recurrence" in reading.sections:
        report.add("no-output", reading.sections["recurrence"][0].span, "no line is an output", "add one, such as `o: q @ S[t]`")
    typed.names = [(n, e) for n, e in (*scope.names.items(), *scope.put_in.items()) if e is not None]
    return typed


def _check_used(reading: Reading, typed: Typed) -> None:
    """Rule 4: every input, param and state is used. Asked only of a file that is right so far."""
    everything = [s.expr for s in typed.states] + [o.expr for o in typed.outputs]
    leaves = {n.name for n in walk(*everything) if n.op in ("input", "param")}
    for tensor in reading.tensors:
        if tensor.name not in leaves:
            message = f"the {'input' if tensor.token else 'param'} '{tensor.name}' is never used"
            reading.report.add("unused", reading.spans[tensor.name], message, "use it, or remove its line")
    for state in typed.states:
        others = [s.expr for s in typed.states if s is not state] + [o.expr for o in typed.outputs]
        if not any(n.op in ("past", "now") and n.name == state.name for n in walk(*others)):
            reading.report.add("unused", state.span, f"the state '{state.name}' is never read", f"read {state.name}[t] in an output")
    for node in walk(*everything):
        if node.op == "scale" and "K" not in reading.scope.dims:
            at = next((p[node] for p in typed.places.values() if node in p), Span(1, 1))
            help = "name the key's dim K, or write a number"
            reading.report.add("scale", at, "scale defaults to K ** -0.5, but no dim is called K", help)
            break


# ---- the verbs ------------------------------------------------------------------------------------------------------------------


def read_places(text: str, path: str = "<spec>") -> tuple[Variant, dict[str, dict[Expr, Span]]]:
    """Reads a spec's text to a Variant, and by line the place of every term ("" for the terms of define); raises SpecErrors."""
    if len(text) > MAX_BYTES:
        message = f"the file has more than {MAX_BYTES // 1024} KiB"
        raise SpecErrors([Mistake("file-too-large", Span(1, 1), message, "a spec is a page of text")], text[:200], path)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    report = Report()
    source = Source(text, path)
    root = compose(source, report)
    if root is None:
        raise SpecErrors(report.mistakes, source.text, path)
    try:
        return _read_root(root, source, report)
    except TooMany:
        raise SpecErrors(report.mistakes, source.text, path) from None


def _read_root(root: Mapping, source: Source, report: Report) -> tuple[Variant, dict[str, dict[Expr, Span]]]:
    reading = Reading(source, report, Scope(report))
    _read_sections(root, reading)
    name, doc, causal = _read_name(reading), _word(reading, "doc", ""), _read_causal(reading)
    chunk_sizes, chunk_default = _read_chunk(reading)
    _read_tensors(reading)
    define, recurrence = _formulas("define", reading), _formulas("recurrence", reading)
    _read_define(reading, define)
    in_define, reading.scope.places = reading.scope.places, {}
    _read_assumptions(reading)
    typed = _read_recurrence(reading, recurrence, causal)
    if not report.mistakes:
        _check_used(reading, typed)
    if report.mistakes:
        raise SpecErrors(report.mistakes, source.text, source.path)
    variant = Variant(
        name=name,
        doc=doc,
        inputs=tuple(t for t in reading.tensors if t.token),
        params=tuple(t for t in reading.tensors if not t.token),
        states=tuple(typed.states),
        outputs=tuple(typed.outputs),
        assumptions=tuple(reading.assumptions),
        chunk_sizes=chunk_sizes,
        chunk_default=chunk_default,
        causal=causal,
        names=tuple(typed.names),
        sizes=tuple(reading.scope.sizes.items()),
        source=source.text,
        path=source.path,
        spans=tuple(reading.spans.items()),
    )
    return variant, {"": in_define, **typed.places}


def read_text(text: str, path: str = "<spec>", strict: bool = False) -> Variant:
    """Reads a spec's text; raises SpecErrors with every mistake. With ``strict`` a warning is a mistake."""
    variant, places = read_places(text, path)
    warnings = lint(variant, places) if strict else ()
    if warnings:
        raise SpecErrors((replace(w, warning=False) for w in warnings), variant.source, path)
    return variant


def warnings_of(variant: Variant) -> tuple[Mistake, ...]:
    """Returns the warnings about a variant (rule 6), in the order of the file."""
    _, places = read_places(variant.source, variant.path)
    return tuple(sorted(lint(variant, places), key=lambda m: (m.span.line, m.span.col)))


def place_of(variant: Variant, line: str, term: Expr) -> Span:
    """Returns where a term of a state or output line stands in the file; the line's name where the term was made by algebra."""
    _, places = read_places(variant.source, variant.path)
    return places.get(line, {}).get(term) or dict(variant.spans)[line]


def read(path: str | Path, strict: bool = False) -> Variant:
    """Reads a spec file; raises SpecErrors with every mistake, OSError where the file cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) <= MAX_BYTES:
            before = data[: error.start].decode("utf-8")
            span = Span(before.count("\n") + 1, error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1)
            message = f"byte {data[error.start]:#04x} is not UTF-8"
            raise SpecErrors([Mistake("not-utf8", span, message, "save the file as UTF-8")], before, str(path)) from error
        text = " " * len(data)
    return read_text(text, str(path), strict)
