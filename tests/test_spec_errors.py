"""Every mistake of the language: its code, its place, its caret, and what to write instead; and hostile files.

In the specs below «...» marks what the caret underlines; a spec may hold several, in the order of the file.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lagen.ir.variant import Span
from lagen.spec import SpecErrors, lint, read, read_text
from lagen.spec.mistakes import CODES

HEAD = """name: a
inputs:
  q: [H, K]
  k: [H, K]
  v: [H, V]
  g: [H]
"""
STATE = "recurrence:\n  S: exp(g) * S[t-1] + outer(k, v)\n"
GOOD = HEAD + "assume:\n  - g <= 0\n" + STATE + "  o: q @ S[t]\n"


def state(line: str, more: str = "") -> str:
    return f"{HEAD}{more}recurrence:\n  S: {line}\n  o: g * (q @ S[t])\n"


def output(line: str, more: str = "") -> str:
    return f"{HEAD}{more}{STATE}  o: {line}\n"


def define(lines: str) -> str:
    return f"{HEAD}define:\n  {lines}\n{STATE}  o: q @ S[t]\n"


def rest(line: str) -> str:
    return f"{GOOD}{line}\n"


TABLE: list[tuple[str, str]] = [
    # the file
    ("yaml", rest("doc: a«:» b")),
    ("yaml", rest("doc: «`»a`")),
    ("tag", rest("doc: «!!str x»")),
    ("tag", state("«!!python/object:os.system k»")),
    ("anchor", rest("doc: «&a b»")),
    ("anchor", state("«*k»")),
    ("many-documents", rest("«---»\nname: b")),
    ("duplicate-key", rest("«name»: b")),
    ("duplicate-key", output("q @ S[t]\n  «S»: k")),
    ("flow-style", HEAD + "recurrence: «{»S: max(b, c)}\n"),
    ("flow-style", state("«{»a: max(b, c)}")),
    ("nested-too-deep", rest("chunk: {default: [[«[»1]]]}")),
    ("shape", rest("params: «[»1]")),
    ("shape", rest("params: {w: «3»}")),
    ("shape", GOOD.replace("  - g <= 0", "  «g»: 0")),
    ("unknown-key", rest("«recurence»: 3")),
    ("unknown-key", rest("chunk: {«size»: 3}")),
    ("missing-key", "«n»ame: a\ninputs:\n  q: [H, K]\n"),
    ("value", rest("causal: «maybe»")),
    ("value", rest("chunk: {default: «60»}")),
    ("value", output("(q @ S[t]) / «0»")),
    ("init", rest("init: {«o»: 1}")),
    ("init", rest("init: {S: «one»}")),
    # expressions
    ("character", state("S[t-1] «∘» k + outer(k, v)")),
    ("character", state("outer(k, v) «^» 2")),
    ("character", state("|\n    S[t-1]  # the past\n    + outer(k, «$»v)")),
    ("syntax", state("S[t-1] + outer«(»k, v")),
    ("syntax", state("S[t-1] + outer(k, v)«)»")),
    ("syntax", state("S[t-1] «if» g else k")),
    ("syntax", state("S[t-1] + «0x10» * outer(k, v)")),
    ("syntax", f"{HEAD}recurrence:\n  «S»:\n  o: q @ S[t]\n"),
    ("syntax", define("f: concat(k, k) -> «F + 1»")),
    ("too-long", state("S[t-1]" + " + k" * 297 + " «+» k")),
    ("too-deep", state("(" * 60 + "«(»" + "k" + ")" * 61)),
    ("too-deep", state("«" + "k" + " + k" * 100 + "»")),
    ("ambiguous-product", output("«q @ S[t] * g»")),
    ("ambiguous-product", output("«q @ S[t] / g» + q @ S[t]")),
    ("ambiguous-product", state("S[t-1] + outer(k, «k @ exp(g) * S[t-1]»)")),
    ("exponent", state("S[t-1] + outer(k ** «g», v)")),
    ("comparison", state("S[t-1] + outer(k, v) * («g < 0»)")),
    ("comparison", state("S[t-1] + outer(k, v) * where(«g», 1, 2)")),
    ("comparison", state("S[t-1] + outer(k, v) * where(«0 < g < 1», 1, 2)")),
    ("arguments", state("S[t-1] + «outer(k)»")),
    ("arguments", define("e: «rmsnorm(k)»")),
    ("arguments", define("e: l2norm(k, «g»)")),
    ("arguments", define("e: «softplus» * k")),
    ("arguments", define("e: «softmax(k, k)»")),
    ("time", state("«t» * S[t-1] + outer(k, v)")),
    ("time", state("«S[t-2]» + outer(k, v)")),
    ("time", output("q @ «S[t+1]»")),
    ("time", output("q @ «S»")),
    ("no-past", state("S[t-1] + outer(«k[t-1]», v)")),
    ("no-past", define("e: «S[t-1]»")),
    ("no-past", f"{HEAD}causal: false\nrecurrence:\n  S: «S[t-1]» + outer(k, v)\n  o: q @ S[t]\n"),
    ("dims", state("S[t-1] + «k * v»")),
    ("dims", state("S[t-1] + «outer(k, k)»")),
    ("dims", output("q @ S[t] + «dot(k, v)»")),
    ("dims", output("«v @ S[t] + q @ S[t]»")),
    ("dim-unnamed", define("«e»: concat(k, v)")),
    ("dim-unnamed", define("f(x): concat(x, x)\n  e: sum(«f(k)»)")),
    ("dim-unnamed", define("e: outer(k, v) -> «F»")),
    ("dim-size", define("f(x): concat(x, x) -> F\n  e: sum(f(k)) + sum(«f(v)»)")),
    ("dim", rest("params: {w: [K, «H»]}")),
    ("dim", rest("params: {w: [H, K, «K»]}")),
    ("dim", rest("params: {w: [«T», K]}")),
    ("dim", rest("params: {w: [«64»]}")),
    ("dim", define("e: concat(k, k) -> «H»")),
    (
        "layout",
        f"{HEAD}recurrence:\n  «S»: S[t-1] * (sum(k) + k) + k * 0 + outer(k, v) + outer(taylor2(k), v)\n  o: q @ S[t]\n",
    ),
    ("scale", GOOD.replace("K]", "N]").replace("q @ S[t]", "«scale» * (q @ S[t])")),
    ("assumption", GOOD.replace("g <= 0", "«g + 1»")),
    ("assumption", GOOD.replace("g <= 0", "«g != 0»")),
    # rule 1
    ("nonlinear-state", state("«S[t-1] * S[t-1]» + outer(k, v)")),
    ("nonlinear-state", state("«exp(S[t-1])» + outer(k, v)")),
    ("nonlinear-state", state("S[t-1] + outer(k, v - «tanh(k @ S[t-1])»)")),
    ("nonlinear-state", state("«(k @ S[t-1] @ v) * S[t-1]» + outer(k, v)")),
    ("nonlinear-state", state("«outer(k, v) / S[t-1]»")),
    ("term-dims", state("S[t-1] + outer(k, v) + «k»")),
    ("term-dims", state("S[t-1] - «1» + outer(k, v)")),
    # rule 2 and 8
    (
        "circle",
        f"{HEAD}recurrence:\n  A: A[t-1] + outer(q @ «B[t-1]», k)\n  B: B[t-1] + outer(k, v) * g\n  o: q @ B[t]\n".replace(
            "B[t-1] + outer(k, v) * g", "B[t-1] + outer(k @ A[t-1], v)"
        ),
    ),
    ("circle", state("g * «S» + outer(k, v)")),
    ("circle", state("«S[t]» + outer(k, v)")),
    ("stage-order", f"{HEAD}recurrence:\n  o: q @ «S[t]»\n  S: S[t-1] + outer(k, v) * g\n"),
    ("stage-order", f"{HEAD}recurrence:\n  z: z[t-1] + q @ «S[t-1]»\n  S: S[t-1] + outer(k, v) * g\n  o: z[t] + q @ S[t]\n"),
    ("matrix-read", output("q @ «tanh(S[t])»")),
    ("matrix-read", output("q @ («S[t] * S[t-1]»)")),
    ("matrix-read", output("q @ («1 / S[t]»)")),
    ("matrix-output", output("«g * S[t]»")),
    ("matrix-output", output("«outer(k, q @ S[t])»")),
    # rule 4
    ("unused", GOOD.replace("inputs:\n", "inputs:\n  «x»: [H, K]\n")),
    ("unused", GOOD.replace("  o:", "  «z»: z[t-1] + k\n  o:")),
    ("twice", output("q @ S[t]\n  «q»: q @ S[t]")),
    ("twice", define("f(«x», x): x").replace("f(«x», x)", "«f(x, x)»")),
    ("undefined", state("S[t-1] + outer(«kk», v)")),
    ("undefined", state("S[t-1] + «phi(k)»")),
    ("undefined", define("e: «f»\n  f: 3")),
    ("undefined", define("f(x): x + «y»")),
    ("undefined", output("«_a»\n  _a: q @ S[t]")),
    ("undefined", output("q @ S[t] + «X[t]»")),
    ("undefined", output("q @ S[t]\n  p: «o» + v")),
    ("shadows", output("q @ S[t]\n  «exp»: q @ S[t]")),
    ("shadows", output("q @ S[t]\n  «K»: q @ S[t]")),
    ("shadows", output("q @ S[t]\n  «t»: q @ S[t]")),
    ("shadows", output("q @ S[t]\n  «scale»: q @ S[t]")),
    ("shadows", output("q @ S[t]\n  «lambda»: q @ S[t]")),
    ("shadows", define("«f(k)»: k")),
    ("name", rest("params: {«2x»: [H]}")),
    ("name", GOOD.replace("name: a", "name: «a-b»")),
    ("no-state", output("q @ S[t]\n  «p»: q")),
    # rule 5
    ("no-output", HEAD + STATE.replace("recurrence", "«recurrence»") + "  _o: q @ S[t]\n"),
    ("abbreviation", output("q @ «_R[t-1]»\n  _R: k")),
    # rule 7
    ("peak", state("«max(S[t-1], outer(k, v))»")),
    ("peak", GOOD.replace("  S:", "  m: «max(2 * m[t-1], g)»\n  S:").replace("q @ S[t]", "m[t] * (q @ S[t])")),
    ("peak", GOOD.replace("  S:", "  m: «max(g - m[t-1], 0)»\n  S:").replace("q @ S[t]", "m[t] * (q @ S[t])")),
    # rule 8
    ("out-of-reach", state("S[t-1] + outer(k, «solve(k, v)»)")),
    ("out-of-reach", state("S[t-1] + outer(«shift(k)», v)")),
]
ELSEWHERE = {
    "file-too-large": "test_large_files_are_refused_unread",
    "not-utf8": "test_bytes_that_are_no_text",
    **dict.fromkeys(("denominator", "domain", "write-weight", "delta-gain"), "test_warnings"),
    **dict.fromkeys(("decay-grows", "not-an-outer"), "tests of passes/canonicalise"),
}


def marked(spec: str) -> tuple[str, Span]:
    """Takes the marks out of a spec; returns it and the place that they marked."""
    start = spec.index("«")
    line = spec.count("\n", 0, start) + 1
    column = start - (spec.rfind("\n", 0, start) + 1) + 1
    return spec.replace("«", "").replace("»", ""), Span(line, column, spec.index("»") - start - 1)


def mistakes(spec: str) -> SpecErrors:
    with pytest.raises(SpecErrors) as found:
        read_text(spec, "dir/a.yaml")
    return found.value


@pytest.mark.parametrize("code, spec", TABLE, ids=[f"{code}-{i}" for i, (code, _) in enumerate(TABLE)])
def test_mistake_stands_where_it_is(code: str, spec: str) -> None:
    text, span = marked(spec)
    errors = mistakes(text)
    found = [m for m in errors.mistakes if (m.code, m.span) == (code, span)]
    assert found, f"wanted {code} at {span}, got\n{errors}"
    shown = str(errors)
    assert f"dir/a.yaml:{span.line}:{span.col}: error[{code}]: {found[0].message}" in shown
    source = text.split("\n")[span.line - 1]
    if len(source) <= 160:
        number = len(str(span.line))
        assert f"  {span.line} | {source}\n  {' ' * number} | {' ' * (span.col - 1)}{'^' * span.length}" in shown


def test_every_code_is_tested() -> None:
    assert {c for c, _ in TABLE} | set(ELSEWHERE) == set(CODES)


def test_one_mistake_is_reported_once() -> None:
    """What follows from a mistake is not reported again."""
    once = [
        s for c, s in TABLE if c in ("undefined", "shadows", "dims", "term-dims", "time", "shape", "ambiguous-product", "nonlinear-state")
    ]
    assert len(once) > 20
    for spec in once:
        errors = mistakes(marked(spec)[0])
        assert len(errors.mistakes) == 1, str(errors)


def test_all_mistakes_at_once() -> None:
    errors = mistakes(
        "name: 1a\ninputs:\n  q: [H, K]\n  k: [K, H]\n  v: [H, V]\ndefine:\n  e: soft(q)\nassume:\n  - q\n"
        "recurrence:\n  S: S[t-2] + outer(q, v)\n  o: q ^ 2\n"
    )
    assert [(m.code, m.span.line) for m in errors.mistakes] == [
        ("name", 1),
        ("dim", 4),
        ("undefined", 7),
        ("assumption", 9),
        ("time", 11),
        ("character", 12),
    ]


def test_the_whole_of_a_report() -> None:
    assert str(mistakes(GOOD.replace("q @ S[t]", "q @ tanh(S[t])").replace("exp(g)", "Exp(g)"))) == (
        "dir/a.yaml:10:6: error[undefined]: there is no function 'Exp'\n"
        "  10 |   S: Exp(g) * S[t-1] + outer(k, v)\n"
        "     |      ^^^^^^\n"
        "  help: did you mean exp?"
    )


def test_places_in_folded_lines() -> None:
    text, span = marked(f"{HEAD}recurrence:\n  S: exp(g) * S[t-1]\n    + outer(k,\n     «vv»)\n  o: q @ S[t]\n")
    assert [m.span for m in mistakes(text).mistakes] == [span]


def test_line_ends_and_byte_order_mark() -> None:
    assert read_text("\ufeff" + GOOD.replace("\n", "\r\n")) == read_text(GOOD)
    errors = mistakes(GOOD.replace("outer(k, v)", "outer(kk, v)").replace("\n", "\r\n"))
    assert errors.mistakes[0].span == Span(10, 30, 2)


def test_names_that_yaml_would_resolve() -> None:
    v = read_text("name: a\ninputs:\n  n: [H, K]\n  y: [H, K]\n  on: [H, V]\nrecurrence:\n  S: S[t-1] + outer(y, on)\n  no: n @ S[t]\n")
    assert [t.name for t in v.inputs] == ["n", "y", "on"] and v.outputs[0].name == "no"


# ---- warnings -------------------------------------------------------------------------------------------------------------------

WARNINGS = [
    ("denominator", output("(q @ S[t]) / «(q @ k)»").replace("«(q @ k)»", "(«q @ k»)")),
    ("denominator", output("rsqrt(«g») * (q @ S[t])", "assume:\n  - g >= 0\n")),
    ("domain", output("«log(g)» * (q @ S[t])")),
    ("domain", output("«g ** 0.5» * (q @ S[t])")),
    ("write-weight", state("S[t-1] + «exp(g)» * outer(k, v)")),
    ("delta-gain", state("S[t-1] + outer(k, v - «k @ S[t-1]»)")),
    ("delta-gain", state("S[t-1] + 3 * outer(n, v - «n @ S[t-1]»)", "define:\n  n: l2norm(k)\n")),
    ("delta-gain", state("S[t-1] + g * outer(k, v - «k @ S[t-1]»)", "assume:\n  - g * dot(k, k) <= 2\n")),
]
QUIET = [
    output("(q @ S[t]) / (1 + exp(g))"),
    output("(q @ S[t]) / max(abs(dot(q, k)), 1)"),
    output("(q @ S[t]) / g", "assume:\n  - g >= 0.5\n"),
    output("log(g) * (q @ S[t])", "assume:\n  - g >= 0\n"),
    output("g ** 2 * (q @ S[t])"),
    state("S[t-1] + exp(g) * outer(k, v)", "assume:\n  - g <= 0\n"),
    state("S[t-1] + exp(-softplus(g)) * outer(k, v)"),
    state("S[t-1] + outer(k, v - k @ S[t-1])", "assume:\n  - dot(k, k) <= 2\n"),
    state("S[t-1] + g * outer(k, v - k @ S[t-1])", "assume:\n  - abs(g) * dot(k, k) <= 2\n"),
    state("S[t-1] + outer(g * k, v - k @ S[t-1])", "assume:\n  - g >= 0\n  - g * dot(k, k) <= 2\n"),
    state("S[t-1] + outer(g * k, v - q @ S[t-1])"),
    state("S[t-1] + 2 * sigmoid(g) * outer(n, v - n @ S[t-1])", "define:\n  n: l2norm(k)\n"),
    state("S[t-1] + sigmoid(g) * outer(k, v - k @ S[t-1])", "assume:\n  - sum(k * k) <= 1\n  - dot(k, k) <= 1\n"),
]


@pytest.mark.parametrize("code, spec", WARNINGS, ids=[f"{c}-{i}" for i, (c, _) in enumerate(WARNINGS)])
def test_warnings(code: str, spec: str) -> None:
    text, span = marked(spec)
    found = lint(read_text(text))
    assert [(m.code, m.span, m.warning) for m in found] == [(code, span, True)], found
    with pytest.raises(SpecErrors, match=rf"error\[{code}\]"):
        read_text(text, strict=True)


@pytest.mark.parametrize("spec", QUIET)
def test_nothing_to_warn_of(spec: str) -> None:
    assert lint(read_text(spec)) == ()
    read_text(spec, strict=True)


# ---- hostile files --------------------------------------------------------------------------------------------------------------


def chain(first: str, step: str, last: str, n: int = 60) -> str:
    lines = "\n  ".join([f"d0{first}", *(f"d{i + 1}{step.format(i)}" for i in range(n))])
    return f"{HEAD}define:\n  {lines}\n{STATE}  o: g * (q @ S[t]) + {last.format(n)}\n"


HOSTILE = {
    "10 MB": "a: b\n" * 2_000_000,
    "10 MB line": "x" * 10_000_000,
    "parentheses": state("(" * 10_000 + "k" + ")" * 10_000),
    "signs": state("k" + "-" * 10_000 + "k"),
    "calls": state("exp(" * 10_000 + "k" + ")" * 10_000),
    "powers": state("k**" * 10_000 + "2"),
    "terms": state("k" + "+k" * 10_000),
    "brackets": "a: " + "[" * 60_000,
    "braces": "a: " + "{a: " * 10_000,
    "indents": "\n".join(" " * i + "a:" for i in range(300)),
    "dashes": "- " * 20_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(7_000)),
    "aliases": "a: &a [1]\nb: [" + "*a, " * 15_000 + "]",
    "laughs": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)),
    "spaces": state("k ->" + " " * 50_000 + "("),
    "undefined": "name: a\ninputs:\n  q: [H, K]\nrecurrence:\n"
    + "".join(f"  y{j}: " + " + ".join(f"x{i}" for i in range(90)) + "\n" for j in range(95)),
    "doubling names": chain(": k", ": d{0} + d{0}", "sum(d{})"),
    "doubling functions": chain("(x): x", "(x): d{0}(x) + d{0}(x)", "sum(d{}(k))"),
    "doubling nothing": chain("(x): 0", "(x): d{0}(x) + d{0}(x)", "d{}(g)"),
    "doubling arguments": chain("(x): x", "(x): x * x", "sum(d1(" * 1 + "d1(" * 45 + "k" + ")" * 46 + ")", 1),
    "nested names": chain(": k", ": exp(d{0}) + 1", "sum(d{})", 90),
    "circles": "name: a\ninputs:\n  q: [H, K]\nrecurrence:\n"
    + "".join(f"  s{j}: q + " + " + ".join(f"s{i}[t-1]" for i in range(60)) + "\n" for j in range(60)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name: str) -> None:
    start = time.process_time()
    errors = mistakes(HOSTILE[name])
    str(errors)
    assert time.process_time() - start < 1.0


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"name: a\n" * 1_300_000)
    start = time.process_time()
    with pytest.raises(SpecErrors, match="file-too-large"):
        read(path)
    assert time.process_time() - start < 0.2


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: a\ndoc: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(SpecErrors, match=re.escape(f"{path}:2:9: error[not-utf8]")):
        read(path)


def test_reading_is_fast() -> None:
    start = time.process_time()
    for _ in range(5):
        read_text(GOOD)
    assert (time.process_time() - start) / 5 < 0.05


# ---- random files ---------------------------------------------------------------------------------------------------------------


def read_any(text: str) -> None:
    start = time.process_time()
    try:
        variant = read_text(text)
    except SpecErrors as errors:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert errors.mistakes
        for m in errors.mistakes:
            assert 1 <= m.span.line <= len(lines) and m.span.length >= 1
            assert 1 <= m.span.col <= len(lines[m.span.line - 1]) + 1
        assert "error[" in str(errors)
    else:
        lint(variant)
    assert time.process_time() - start < 1.0


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text(text: str) -> None:
    read_any(text)


WORDS = [
    *"S[t-1] S[t] S o q k v g K V t scale pi + - * / @ ** ( ) , outer( exp( phi( dot( l2norm( concat( taylor2( where( max( -> F".split(),
    *"< <= 0 1 2 0.5 1e-6 : # \" ' | > & ! % ? [ ] { } [H, - x _a _a: z: z[t-1] m[t-1] init: causal: false assume: define: params:".split(),
    "\n",
    "\n  ",
    "\t",
    "\u00b5",
]


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """Draws a good spec with a few pieces replaced."""
    text = GOOD.replace("recurrence", "define:\n  phi(x): elu(x) + 1\n  e: phi(k)\nrecurrence")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        text = text[:at] + draw(st.sampled_from(WORDS)) + text[at + cut :]
    return text


@given(spoiled())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_spoiled_specs(text: str) -> None:
    read_any(text)


@given(st.lists(st.sampled_from(WORDS), max_size=25), st.lists(st.sampled_from(WORDS), max_size=25))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_lines(first: list[str], second: list[str]) -> None:
    read_any(output("q @ S[t] + " + " ".join(first).replace("\n", " "), "define:\n  e: " + " ".join(second).replace("\n", " ") + "\n"))
