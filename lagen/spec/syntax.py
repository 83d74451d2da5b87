"""Expressions as they are spelled: a closed tree made from Python's grammar, every node with its place in the file.

Text is scanned before it is parsed: only characters that an expression holds, at most MAX_TOKENS words and MAX_DEPTH levels, so that
hostile text never reaches the parser. It is never evaluated. What a node means is spec/elaborate's affair.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass

from lagen.ir.variant import Span
from lagen.spec.document import Scalar, Source
from lagen.spec.mistakes import Report

MAX_TOKENS = 600
MAX_WORD = 64
MAX_DEPTH = 60
MAX_TERMS = 100
"""Levels of the parsed tree, where every further term of a sum is one."""

_TOKEN = re.compile(r"\s+|(\*\*|//|<=|>=|==|!=|->|[A-Za-z_]\w*|(?:\d[\d.]*|\.\d+)(?:[eE][+-]?\d+)?\w*|[-+*/@()\[\],<>])", re.ASCII)
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\Z", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

_INSTEAD_OF_CHARACTER = {
    "^": "write ** for powers",
    "{": "braces are no part of an expression",
    "=": "write the expression alone, or == in a comparison",
    ":": "an expression holds no colon",
    ";": "one line holds one expression",
    "'": "an expression holds no text",
    '"': "an expression holds no text",
    "∘": "write * for the element-wise product",
    "⊗": "write outer(a, b)",
    "·": "write * or @",
    "×": "write *",
    "−": "write the minus sign of ASCII, -",
    "&": "write where(a, where(b, x, y), y)",
    "|": "write where(a, x, where(b, x, y))",
    "%": "there is no modulo",
    "!": "write !=, or exchange the branches of where",
    "~": "exchange the branches of where",
}
_INSTEAD_OF_WORD = {
    "if": "write where(cond, a, b)",
    "else": "write where(cond, a, b)",
    "and": "write where(a, where(b, x, y), y)",
    "or": "write where(a, x, where(b, x, y))",
    "not": "exchange the branches of where",
    "lambda": "define a function: `f(x): ...` under define",
    "is": "write ==",
    "in": "a line is written for one token",
    "for": "a line is written for one token; sums over tokens are states",
}
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.MatMult: "@", ast.Pow: "**"}
_COMPARE = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne"}


@dataclass(frozen=True)
class Node:
    """One node of an expression. ``kind`` tells what ``text`` is:

    number (``value``), name, index (a state's name, ``value`` 0 for [t] and -1 for [t-1]), call (the function's name),
    binary (the operator), negate, compare (the element-wise function's name).
    """

    kind: str
    span: Span
    text: str = ""
    value: float = 0.0
    args: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Formula:
    """An expression and, where it ends with ``-> F``, the name of the dim that it makes."""

    body: Node
    makes: str
    makes_span: Span


def is_name(text: str) -> bool:
    """Tells whether ``text`` is an ASCII identifier."""
    return _NAME.match(text) is not None


def _scan(text: Scalar, source: Source, report: Report) -> bool:
    """Checks characters, length and nesting; returns whether the text may be parsed."""
    at, words, signs = 0, 0, 0
    opened: list[tuple[str, int]] = []
    body = text.text

    def refuse(code: str, i: int, j: int, message: str, help: str) -> bool:
        report.add(code, source.span(text.start + i, text.start + j), message, help)
        return False

    while at < len(body):
        match = _TOKEN.match(body, at)
        if match is None:
            help = _INSTEAD_OF_CHARACTER.get(body[at], "remove it")
            return refuse("character", at, at + 1, f"{body[at]!r} is no part of an expression", help)
        word, start, at = match.group(1), at, match.end()
        if word is None:
            continue
        words += 1
        signs = signs + 1 if word in ("-", "+", "**") else 0
        if word in "([":
            opened.append((word, start))
        elif word in ")]" and (not opened or opened.pop()[0] + word not in ("()", "[]")):
            return refuse("syntax", start, at, f"'{word}' closes nothing", "remove it, or open it before")
        if max(len(opened), signs) > MAX_DEPTH:
            return refuse("too-deep", start, at, f"more than {MAX_DEPTH} levels deep", "name parts of it under define")
        if len(word) > MAX_WORD:
            return refuse("too-long", start, start + 20, f"a word of more than {MAX_WORD} characters", "choose a shorter one")
        if words > MAX_TOKENS:
            return refuse("too-long", start, at, f"the expression has more than {MAX_TOKENS} words", "name parts of it under define")
        if word[0] in ".0123456789" and not (_NUMBER.match(word) and math.isfinite(float(word))):
            return refuse("syntax", start, at, f"'{word}' is no number of the language", "write a number such as 1, 0.5 or 1e-6")
        if word in _INSTEAD_OF_WORD:
            return refuse("syntax", start, at, f"'{word}' is no part of the language", _INSTEAD_OF_WORD[word])
    if opened:
        return refuse("syntax", opened[-1][1], opened[-1][1] + 1, f"'{opened[-1][0]}' is never closed", "close it")
    return True


def parse(text: Scalar, source: Source, report: Report, key: Span) -> Formula | None:
    """Parses the expression under ``key``; what is wrong goes to the report, and then None is returned."""
    if text.refused:
        return None
    if not text.text.strip():
        report.add("syntax", key, "an expression is missing", "write it behind the colon, on the same line or in a block")
        return None
    if not _scan(text, source, report):
        return None
    body, makes, makes_span = text.text, "", text.span
    arrow = body.find("->")
    if arrow >= 0:
        body, makes = body[:arrow], body[arrow + 2 :].strip()
        start = text.text.find(makes, arrow + 2)
        makes_span = source.span(text.start + start, text.start + start + len(makes))
        if not is_name(makes):
            what = "the name of a dim follows '->', and nothing else"
            report.add("syntax", makes_span, what, "end the line with `-> F`; name a part of it under define, with its own `-> F`")
            return None
    node = _Reader(text.start, source, report).read(body)
    return None if node is None else Formula(node, makes, makes_span)


class _Reader:
    """Turns Python's tree of one expression into nodes."""

    def __init__(self, start: int, source: Source, report: Report) -> None:
        self.start, self.source, self.report = start, source, report

    def place(self, i: int, j: int) -> Span:
        return self.source.span(self.start + i, self.start + j)

    def span(self, tree: ast.expr) -> Span:
        assert tree.end_col_offset is not None
        return self.place(tree.col_offset - 1, tree.end_col_offset - 1)

    def read(self, body: str) -> Node | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on `1(x)` and the like
                tree = ast.parse(f"({body})", mode="eval").body
        except SyntaxError as error:
            at = max(0, min((error.offset or 1) - 2, len(body.rstrip()) - 1))
            self.report.add("syntax", self.place(at, at + 1), f"not an expression: {error.msg}", "see LANGUAGE for what a line may hold")
            return None
        depth = _depth(tree)
        if depth > MAX_TERMS:
            self.report.add("too-deep", self.span(tree), f"{depth} levels deep", "name parts of it under define")
            return None
        return self.node(tree)

    def refuse(self, tree: ast.expr, message: str, help: str, code: str = "syntax") -> None:
        self.report.add(code, self.span(tree), message, help)

    def node(self, tree: ast.expr) -> Node | None:
        if isinstance(tree, ast.Constant):
            value = tree.value
            if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
                return Node("number", self.span(tree), value=float(value))
            self.refuse(tree, f"{str(tree.value)[:20]!r} is no number of the language", "write a number such as 1, 0.5 or 1e-6")
            return None
        if isinstance(tree, ast.Name):
            return Node("name", self.span(tree), tree.id)
        if isinstance(tree, ast.UnaryOp):
            return self.unary(tree)
        if isinstance(tree, ast.BinOp):
            return self.binary(tree)
        if isinstance(tree, ast.Call):
            return self.call(tree)
        if isinstance(tree, ast.Subscript):
            return self.index(tree)
        if isinstance(tree, ast.Compare):
            return self.compare(tree)
        if isinstance(tree, (ast.Tuple, ast.List)):
            self.refuse(tree, "a list is no expression", "write one expression a line")
        else:
            self.refuse(tree, f"{type(tree).__name__} is no part of the language", "use + - * / @ **, functions, S[t] and S[t-1]")
        return None

    def several(self, trees: list[ast.expr]) -> tuple[Node, ...] | None:
        nodes = [self.node(t) for t in trees]
        return None if None in nodes else tuple(n for n in nodes if n is not None)

    def unary(self, tree: ast.UnaryOp) -> Node | None:
        args = self.several([tree.operand])
        if args is None:
            return None
        if isinstance(tree.op, ast.USub):
            return Node("negate", self.span(tree), "-", args=args)
        if isinstance(tree.op, ast.UAdd):
            return args[0]
        self.refuse(tree, "there is no such sign", "write where(cond, a, b)")
        return None

    def binary(self, tree: ast.BinOp) -> Node | None:
        sign = _BINARY.get(type(tree.op))
        if sign is None:
            self.refuse(tree, f"there is no operator {type(tree.op).__name__}", "use + - * / @ **")
            return None
        bare = tree.left.col_offset == tree.col_offset  # an operand in parentheses begins after the whole does
        if sign in "*/" and isinstance(tree.left, ast.BinOp) and isinstance(tree.left.op, ast.MatMult) and bare:
            self.refuse(
                tree,
                f"'a @ b {sign} c' is read in two ways",
                f"write (a @ b) {sign} c, or a @ (b {sign} c)",
                "ambiguous-product",
            )
            return None
        args = self.several([tree.left, tree.right])
        return None if args is None else Node("binary", self.span(tree), sign, args=args)

    def call(self, tree: ast.Call) -> Node | None:
        if not isinstance(tree.func, ast.Name):
            self.refuse(tree.func, "only a name can be called", "write f(x); a product is written with *")
            return None
        if tree.keywords:
            self.refuse(tree, "functions take no keyword arguments", "write the arguments in order, as in l2norm(x, 1e-6)", "arguments")
            return None
        args = self.several(tree.args)
        return None if args is None else Node("call", self.span(tree), tree.func.id, args=args)

    def index(self, tree: ast.Subscript) -> Node | None:
        if not isinstance(tree.value, ast.Name):
            self.refuse(tree, "only a state's name takes [t] or [t-1]", "write S[t] or S[t-1]", "time")
            return None
        at = tree.slice
        if isinstance(at, ast.Name) and at.id == "t":
            return Node("index", self.span(tree), tree.value.id, 0.0)
        if isinstance(at, ast.BinOp) and isinstance(at.left, ast.Name) and at.left.id == "t" and isinstance(at.right, ast.Constant):
            if isinstance(at.op, ast.Sub) and at.right.value == 1 and type(at.right.value) is int:
                return Node("index", self.span(tree), tree.value.id, -1.0)
        name = tree.value.id
        help = f"write {name}[t-1]; a longer past is a state of its own"
        self.refuse(tree, f"only {name}[t] and {name}[t-1] exist", help, "time")
        return None

    def compare(self, tree: ast.Compare) -> Node | None:
        if len(tree.ops) != 1 or type(tree.ops[0]) not in _COMPARE:
            self.refuse(tree, "a comparison has two sides and one sign", "write two comparisons: a <= b, b <= c", "comparison")
            return None
        args = self.several([tree.left, tree.comparators[0]])
        return None if args is None else Node("compare", self.span(tree), _COMPARE[type(tree.ops[0])], args=args)


def _depth(tree: ast.AST) -> int:
    """Returns how deep a tree nests, without recursion."""
    deepest, stack = 0, [(tree, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        stack.extend((child, depth + 1) for child in ast.iter_child_nodes(node))
    return deepest
