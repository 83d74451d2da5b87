"""Rule 6: what is legal and may still go wrong in numbers. Warnings, which ``strict`` makes mistakes."""

from __future__ import annotations

from collections.abc import Iterator

from lagen.ir import expr as E
from lagen.ir.bounds import Bounds, facts_of, shown
from lagen.ir.expr import Expr, walk
from lagen.ir.variant import OutputLine, Span, StateLine, Variant
from lagen.spec.mistakes import Mistake
from lagen.spec.rules import mentions, terms

_POSITIVE = ("exp", "sigmoid", "softplus", "cdf")


def lint(variant: Variant, places: dict[str, dict[Expr, Span]]) -> tuple[Mistake, ...]:
    """This function returns the warnings about a variant; ``places`` are those of read_places."""
    found: list[Mistake] = []
    bounds = Bounds([*facts_of(variant), *_kept(variant)])
    lines: list[StateLine | OutputLine] = [*variant.states, *variant.outputs]
    for line in lines:
        in_line, in_define = places.get(line.name, {}), places.get("", {})
        check = _Line(line, bounds, {**in_line, **{e: at for e, at in in_define.items() if e.args or e not in in_line}})
        found.extend(check.numbers())
        if isinstance(line, StateLine) and not line.peak:
            found.extend(check.writes())
            found.extend(check.gains())
    return tuple(dict.fromkeys(found))


def _kept(variant: Variant) -> list[Expr]:
    """States that stay at 0 or above when they start there, by induction over tokens: their values as facts."""

    def facts(lines: list[StateLine]) -> list[Expr]:
        at = [E.leaf(op, s.name, s.dims, s.head, token=True) for s in lines for op in ("past", "now")]
        return [E.call("ge", e, E.const(0.0)) for e in at]

    kept = [s for s in variant.states if not s.peak and s.init >= 0.0]
    while kept:
        bounds = Bounds([*facts_of(variant), *facts(kept)])
        held = [s for s in kept if bounds.interval(s.expr)[0] >= 0.0]
        if held == kept:
            break
        kept = held
    return facts(kept)


class _Line:
    """The checks of one line."""

    def __init__(self, line: StateLine | OutputLine, bounds: Bounds, places: dict[Expr, Span]) -> None:
        self.line, self.bounds, self.places = line, bounds, places

    def warn(self, code: str, e: Expr, message: str, help: str) -> Mistake:
        return Mistake(code, self.places.get(e, self.line.span), message, help, warning=True)

    def positive(self, e: Expr) -> bool:
        """Tells whether an expression is provably above 0."""
        if self.bounds.interval(e)[0] > 0.0 or e.op in _POSITIVE:
            return True
        if e.op in ("mul", "div", "min", "sqrt", "rsqrt", "pow", "rename"):
            return all(self.positive(a) for a in e.args)
        if e.op == "max":
            return any(self.positive(a) for a in e.args)
        if e.op == "add":
            return any(self.positive(a) and self.bounds.interval(b)[0] >= 0.0 for a, b in (e.args, e.args[::-1]))
        return False

    def away_from_zero(self, e: Expr) -> bool:
        return self.bounds.interval(e)[1] < 0.0 or self.positive(e)

    def numbers(self) -> Iterator[Mistake]:
        """Warns of denominators that may be 0, and of log, sqrt, rsqrt and fractional powers of what may be negative."""
        for node in walk(self.line.expr):
            below = (
                node.args[1] if node.op == "div" else node.args[0] if node.op == "rsqrt" or (node.op == "pow" and node.value < 0) else None
            )
            whole = node.op == "pow" and node.value == int(node.value)
            if node.op in ("log", "sqrt", "rsqrt", "pow") and not whole and not self.positive(node.args[0]):
                inside = self.bounds.interval(node.args[0])
                if inside[0] < 0.0:
                    name = "**" if node.op == "pow" else node.op
                    message = f"'{name}' of what may be negative: it is in {shown(inside)}"
                    assume = "" if E.reads(node, "past", "now") else f"assume `{_short(node.args[0])} >= 0`, or "
                    yield self.warn("domain", node, message, f"{assume}write max(x, 1e-6)")
                    continue
            if below is not None and not self.away_from_zero(below):
                inside = self.bounds.interval(below)
                message = f"the denominator may be 0: it is in {shown(inside)}"
                yield self.warn(
                    "denominator",
                    below if below in self.places else node,
                    message,
                    "write max(x, 1e-6), add a positive number, or assume it",
                )

    def writes(self) -> Iterator[Mistake]:
        """Warns of an exp without an upper bound that scales a write."""
        for _, term in terms(self.line.expr):
            if mentions(term, self.line.name):
                continue
            for f in _factors(term, len(self.line.dims) < 2):
                if f.op == "exp" and self.bounds.interval(f.args[0])[1] == float("inf"):
                    message = "a write is scaled by an exp that has no upper bound"
                    yield self.warn(
                        "write-weight", f, message, f"assume `{_short(f.args[0])} <= 0`, or keep a peak line m and write exp(x - m[t])"
                    )

    def gains(self) -> Iterator[Mistake]:
        """Warns of a delta rule whose gain may exceed 2: there the state oscillates and grows."""
        for _, term in terms(self.line.expr):
            for node in (f for f in _whole_factors(term) if f.op == "outer" and mentions(f, self.line.name)):
                outside = [f for f in _whole_factors(term) if not f.dims]
                for side, other in (node.args, node.args[::-1]):
                    for read in (n for n in walk(other) if n.op == "contract" and mentions(n, self.line.name)):
                        gain = self.gain(outside, side, [a for a in read.args if not mentions(a, self.line.name)])
                        if gain is not None and self.bounds.interval(gain)[1] > 2.0:
                            message = f"the gain {_short(gain)} of this delta rule may exceed 2"
                            help = f"assume `{_short(gain)} <= 2`, or normalise: l2norm(k) and a gate in [0, 2]"
                            yield self.warn("delta-gain", read, message, help)

    def within_one(self, x: Expr) -> bool:
        """Tells whether |x| is at most 1."""
        low, high = self.bounds.interval(x)
        return -1.0 <= low and high <= 1.0

    def gain(self, outside: list[Expr], write: Expr, reads: list[Expr]) -> Expr | None:
        """Returns |scalars| * dot(k, k) of a correction that writes and reads along one vector k, None where they differ.

        Scalars that only make it smaller are left out.
        """
        if len(reads) != 1:
            return None
        wrote, read = _split(write), _split(reads[0])
        along = [f for f in wrote if f.dims]
        if along != [f for f in read if f.dims] or not along:
            return None
        scalars = [f for f in (*outside, *wrote, *read) if not f.dims and not self.within_one(f)]
        k = E.mul(*along)
        return E.mul(*(f if self.bounds.interval(f)[0] >= 0.0 else E.call("abs", f) for f in scalars), E.contract(k, k))


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 60 else text[:57] + "..."


def _factors(e: Expr, inside: bool) -> Iterator[Expr]:
    """Yields the factors of a product; those inside an outer only where they are scalars, unless ``inside``."""
    if e.op in ("mul", "neg"):
        for a in e.args:
            yield from _factors(a, inside)
    elif e.op == "div":
        yield from _factors(e.args[0], inside)
    elif e.op == "outer":
        for a in e.args:
            yield from (f for f in _factors(a, inside) if inside or not f.dims)
    else:
        yield e


def _whole_factors(e: Expr) -> Iterator[Expr]:
    """Yields the factors of a product, outer products whole."""
    if e.op in ("mul", "neg", "div"):
        for a in e.args[: 1 if e.op == "div" else 2]:
            yield from _whole_factors(a)
    else:
        yield e


def _split(e: Expr) -> list[Expr]:
    """Lists the factors of a product; quotients stay whole."""
    if e.op == "neg":
        return _split(e.args[0])
    return [f for a in e.args for f in _split(a)] if e.op == "mul" else [e]
