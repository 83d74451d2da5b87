"""Bounds of token-wise expressions: intervals over all real inputs that meet the assumptions, and proofs that a log-decay is <= 0.

An interval holds for every element of the value. It is the meet of what these say: the operation over its operands' intervals
(with 0 * inf = 0, since inf only stands for "unbounded"); assumptions about the expression itself; assumptions that cancel terms of
it, as g - h <= 0 does in 2 * g - 2 * h; and the corners of the box, where the expression is affine in each of its bounded atoms: then
its extremes are there, so `lb + (1 - lb) * s` with lb and s in [0, 1] is in [0, 1], where intervals alone say [0, 2].

What it is not: a solver; what it cannot show may still be true. Who reads it: passes/canonicalise (rule 3), spec/lint (rule 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product

from lagen.ir import expr as E
from lagen.ir.expr import Expr, number, show, walk
from lagen.ir.variant import Variant

INF = math.inf
Interval = tuple[float, float]
EVERYTHING: Interval = (-INF, INF)

CORNERS = 6
"""Most atoms whose corners are tried together: 2 ** 6 evaluations."""
MAX_WORK = 20_000
"""Terms evaluated at corners, all expressions together."""
MAX_FACTS = 12
"""Assumptions between two values that are tried; further ones are left out, which only weakens bounds."""
SLACK = 1e-12
"""What rounding may add to a bound. A log-decay above 0 by this little is clamped to 0 by every kernel."""
RESET = -104.0
"""The log of a decay of 0: exp(-104) is 0 in float32, and kernels clamp there (the function logdecay)."""


# ---- arithmetic on intervals ----------------------------------------------------------------------------------------------------


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0.0 or y == 0.0 else x * y


def _add(a: Interval, b: Interval) -> Interval:
    lo = -INF if -INF in (a[0], b[0]) else a[0] + b[0]
    return lo, INF if INF in (a[1], b[1]) else a[1] + b[1]


def _neg(a: Interval) -> Interval:
    return -a[1], -a[0]


def _mul(a: Interval, b: Interval) -> Interval:
    corners = [_times(x, y) for x in a for y in b]
    return min(corners), max(corners)


def _reciprocal(a: Interval) -> Interval:
    if a[0] < 0.0 < a[1] or a == (0.0, 0.0):
        return EVERYTHING
    lo = -INF if a[1] == 0.0 else 1.0 / a[1]
    return lo, INF if a[0] == 0.0 else 1.0 / a[0]


def _meet(a: Interval, b: Interval) -> Interval:
    """Intersects; where assumptions contradict each other the first is kept."""
    lo, hi = max(a[0], b[0]), min(a[1], b[1])
    return (lo, hi) if lo <= hi else a


def _hull(*xs: Interval) -> Interval:
    return min(x[0] for x in xs), max(x[1] for x in xs)


def _exp(x: float) -> float:
    return INF if x > 700.0 else math.exp(x)


def _log(x: float) -> float:
    return -INF if x <= 0.0 else math.log(x)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + _exp(-x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + (0.0 if math.isinf(x) else math.log1p(math.exp(-abs(x))))


def _rsqrt(x: float) -> float:
    return INF if x <= 0.0 else x**-0.5


def _silu(x: float) -> float:
    return _times(x, _sigmoid(x))


def _cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _gelu(x: float) -> float:
    return _times(x, _cdf(x))


_RISING: dict[str, Callable[[float], float]] = {
    "exp": _exp,
    "log": _log,
    "sqrt": lambda x: math.sqrt(max(x, 0.0)) if x < INF else INF,
    "sign": lambda x: math.copysign(1.0, x) if x else 0.0,
    "sigmoid": _sigmoid,
    "logsigmoid": lambda x: -_softplus(-x),
    "softplus": _softplus,
    "tanh": math.tanh,
    "relu": lambda x: max(x, 0.0),
    "elu": lambda x: x if x > 0.0 else math.expm1(x),
    "cdf": _cdf,
    "logdecay": lambda x: min(max(x, RESET), 0.0),
}
_DIPPING: dict[str, tuple[Callable[[float], float], float, float]] = {  # falls to a lowest value at the given place, then rises
    "silu": (_silu, -1.2784645427610738, -0.2784645427610738),
    "gelu": (_gelu, -0.7517915246935645, -0.16997120747990369),
}


def _dipping(op: str, x: Interval) -> Interval:
    f, at, lowest = _DIPPING[op]
    return lowest if x[0] <= at <= x[1] else min(f(x[0]), f(x[1])), max(f(x[0]), f(x[1]))


def _power(x: Interval, exponent: float) -> Interval:
    if exponent == 0.0:
        return 1.0, 1.0
    if exponent < 0.0:
        return _reciprocal(_power(x, -exponent))

    def value(base: float) -> float:
        try:
            return float(base**exponent)
        except OverflowError:
            return INF if base > 0.0 or exponent % 2.0 == 0.0 else -INF

    if exponent != int(exponent):
        return value(max(x[0], 0.0)), value(max(x[1], 0.0))
    if exponent % 2.0:
        return value(x[0]), value(x[1])
    far = value(max(abs(x[0]), abs(x[1])))
    return (0.0 if x[0] <= 0.0 <= x[1] else value(min(abs(x[0]), abs(x[1])))), far


# ---- linear forms ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A sum of atoms with coefficients, and a number."""

    terms: tuple[tuple[Expr, float], ...]
    number: float

    def plus(self, other: Linear, factor: float) -> Linear:
        """Adds ``factor`` times another form."""
        total = dict(self.terms)
        for atom, c in other.terms:
            total[atom] = total.get(atom, 0.0) + factor * c
        return Linear(tuple((a, c) for a, c in total.items() if abs(c) > SLACK), self.number + factor * other.number)


def linear(e: Expr) -> Linear:
    """Returns an expression as a linear form over its atoms."""
    if e.op == "const":
        return Linear((), e.value)
    zero = Linear((), 0.0)
    if e.op in ("add", "sub"):
        return linear(e.args[0]).plus(linear(e.args[1]), 1.0 if e.op == "add" else -1.0)
    if e.op == "neg":
        return zero.plus(linear(e.args[0]), -1.0)
    if e.op == "mul" and e.args[0].op == "const":
        return zero.plus(linear(e.args[1]), e.args[0].value)
    if e.op in ("mul", "div") and e.args[1].op == "const" and e.args[1].value:
        factor = e.args[1].value
        return zero.plus(linear(e.args[0]), factor if e.op == "mul" else 1.0 / factor)
    return Linear(((e, 1.0),), 0.0)


# ---- intervals of expressions ---------------------------------------------------------------------------------------------------


class Bounds:
    """The intervals of expressions under assumptions (comparisons lt, le, gt, ge, eq). ``sizes`` gives dims a known size."""

    def __init__(self, assumptions: Iterable[Expr] = (), sizes: Mapping[str, int] | None = None) -> None:
        self.sizes = dict(sizes or {})
        self.used: dict[str, None] = {}  # what the last intervals rest on, in words
        self._assumptions = tuple(assumptions)
        self._facts: list[tuple[Linear, str]] = []  # forms that are <= 0
        self._known: dict[Expr, tuple[Interval, str, str]] = {}  # bounds, and who said the lower and the upper one
        self._work = 0
        self._memo: dict[Expr, tuple[Interval, tuple[str, ...]]] = {}
        self._open: set[Expr] = set()
        for a in self._assumptions:
            self._assume(a)

    # ---- assumptions ----

    def _assume(self, a: Expr) -> None:
        left, right = a.args
        if a.op in ("lt", "le", "eq"):
            self._fact(linear(left).plus(linear(right), -1.0), str(a))
        if a.op in ("gt", "ge", "eq"):
            self._fact(linear(right).plus(linear(left), -1.0), str(a))
        for e, other, least, most in (
            (left, right, ("gt", "ge", "eq"), ("lt", "le", "eq")),
            (right, left, ("lt", "le", "eq"), ("gt", "ge", "eq")),
        ):
            n = linear(other)
            if not n.terms:
                self._know(e, (n.number if a.op in least else -INF, n.number if a.op in most else INF), str(a))

    def _fact(self, form: Linear, text: str) -> None:
        """Notes form <= 0; of a single atom it is a bound."""
        if len(form.terms) != 1:
            if form.terms and len(self._facts) < MAX_FACTS:
                self._facts.append((form, text))
            return
        ((atom, c),) = form.terms
        bound = -form.number / c
        self._know(atom, (-INF, bound) if c > 0 else (bound, INF), text)

    def _know(self, e: Expr, bound: Interval, text: str) -> None:
        """Notes a bound of an expression, and what it says of the argument of exp and the like."""
        if e.op == "const":
            return
        old, low, high = self._known.get(e, (EVERYTHING, "", ""))
        met = _meet(old, bound)
        self._known[e] = met, text if met[0] > old[0] else low, text if met[1] < old[1] else high
        if e.op == "exp":
            self._know(e.args[0], (_log(bound[0]), INF if bound[1] == INF else _log(bound[1])), text)
        elif e.op == "log":
            self._know(e.args[0], (_exp(bound[0]), _exp(bound[1])), text)
        elif e.op == "neg":
            self._know(e.args[0], _neg(bound), text)
        elif e.op == "abs" and bound[1] < INF:
            self._know(e.args[0], (-bound[1], bound[1]), text)

    # ---- the interval of an expression ----

    def interval(self, e: Expr) -> Interval:
        """Returns bounds that hold for every element of ``e``; what they rest on is added to ``used``."""
        found, words = self._find(e)
        self.used.update(dict.fromkeys(words))
        return found

    def _find(self, e: Expr) -> tuple[Interval, tuple[str, ...]]:
        if e in self._memo:
            return self._memo[e]
        outside, self.used = self.used, {}
        found = self._operation(e)
        if e in self._known:
            bound, low, high = self._known[e]
            found = self._better(found, (bound[0], INF), low)
            found = self._better(found, (-INF, bound[1]), high)
        if e not in self._open:
            self._open.add(e)
            if e.op in ("add", "sub", "mul"):
                found = self._corners(e, found)
            if self._facts or e.op in ("add", "sub"):
                found = self._cancelled(e, found)
            self._open.discard(e)
            self._memo[e] = found, tuple(self.used)
        words = tuple(self.used)
        self.used = outside
        return found, words

    def _better(self, old: Interval, new: Interval, why: str) -> Interval:
        met = _meet(old, new)
        if met != old:
            self.used[why] = None
        return met

    def _cancelled(self, e: Expr, found: Interval) -> Interval:
        form = linear(e)
        above, why_above = self._most(form, 0, ())
        below, why_below = self._most(Linear((), 0.0).plus(form, -1.0), 0, ())
        if above < found[1]:
            found = self._better(found, (-INF, above), why_above)
        if -below > found[0]:
            found = self._better(found, (-below, INF), why_below)
        return found

    def _most(self, form: Linear, depth: int, taken: tuple[int, ...]) -> tuple[float, str]:
        """Returns the least upper bound found of a linear form, and the assumptions that gave it."""
        total, why = form.number, ""
        for atom, c in form.terms:
            lo, hi = self._operand(atom)
            total += _times(c, hi if c > 0 else lo)
            if total == INF or total != total:
                total = INF
                break
        if depth == 2:
            return total, why
        for i, (fact, text) in enumerate(self._facts):
            if i in taken:
                continue
            ratios = {dict(form.terms)[a] / c for a, c in fact.terms if a in dict(form.terms)}
            for ratio in ratios:
                if ratio > 0:
                    most, more = self._most(form.plus(fact, -ratio), depth + 1, (*taken, i))
                    if most < total:
                        total, why = most, f"{text}, {more}" if more else text
        return total, why

    def _operand(self, e: Expr) -> Interval:
        """Returns the interval of an operand; while it is being found itself, what its operation says."""
        if e in self._open:
            return self._known[e][0] if e in self._known else self._leaf(e) if not e.args else EVERYTHING
        return self.interval(e)

    def _corners(self, e: Expr, found: Interval) -> Interval:
        degrees: dict[Expr, list[int]] = {}
        _degrees(e, degrees)
        boxed: list[tuple[Expr, Interval]] = []
        for atom, (degree, times) in degrees.items():
            if degree == 1 and times > 1:
                box = self._operand(atom)
                if -INF < box[0] and box[1] < INF:
                    boxed.append((atom, box))
        self._work += 2 ** len(boxed) * sum(times for _, times in degrees.values())
        if not boxed or len(boxed) > CORNERS or self._work > MAX_WORK:
            return found
        others = {a: self._operand(a) for a in degrees}
        values = [
            _evaluate(e, {**others, **{a: (c, c) for (a, _), c in zip(boxed, corner, strict=True)}})
            for corner in product(*(b for _, b in boxed))
        ]
        names = ", ".join(f"{a} in {shown(b)}" for a, b in boxed)
        return self._better(found, _hull(*values), f"corners of {names}")

    def _operation(self, e: Expr) -> Interval:
        if not e.args:
            return self._leaf(e)
        if e.op in _SAME_ROW and e.args[0].op in _SAME_ROW[e.op]:
            return 0.0, 1.0
        xs = [self._operand(a) for a in e.args]
        x = xs[0]
        if e.op in _RISING:
            return _RISING[e.op](x[0]), _RISING[e.op](x[1])
        if e.op in _DIPPING:
            return _dipping(e.op, x)
        if e.op == "rsqrt":
            return _rsqrt(x[1]) if x[1] < INF else 0.0, _rsqrt(x[0])
        if e.op == "where" and not any(n.op == "where" for a in e.args[1:] for n in walk(a)):
            return _hull(self._branch(e.args[0], e.args[1]), self._branch(_otherwise(e.args[0]), e.args[2]))
        if e.op in ("contract", "sum"):
            return self._summed(e, xs)
        rule = _RULES.get(e.op)
        return EVERYTHING if rule is None else rule(e, xs)

    def _branch(self, condition: Expr, e: Expr) -> Interval:
        """Bounds a branch of where, whose condition holds there."""
        inside = Bounds((*self._assumptions, condition), self.sizes)
        found = inside.interval(e)
        self.used.update(inside.used)
        return found

    def _leaf(self, e: Expr) -> Interval:
        if e.op == "const":
            return e.value, e.value
        if e.op == "size":
            return (float(self.sizes[e.name]),) * 2 if e.name in self.sizes else (1.0, INF)
        return EVERYTHING

    def _summed(self, e: Expr, xs: list[Interval]) -> Interval:
        """Bounds a sum over a dim of unknown size, at least 1."""
        if e.op == "contract":
            a, b = e.args
            if a.op == b.op == "l2norm":
                return (0.0 if a == b else -1.0), 1.0
            for p, other in ((a, xs[1]), (b, xs[0])):
                if p.op == "softmax":
                    return other
            x = _mul(*xs)
            if a == b:
                x = max(x[0], 0.0), x[1]
        else:
            x = xs[0]
        n = self.sizes.get(e.attr("dim"))
        if n is not None:
            return _times(x[0], n), _times(x[1], n)
        return (x[0] if x[0] >= 0.0 else -INF), (x[1] if x[1] <= 0.0 else INF)


_OTHERWISE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _otherwise(condition: Expr) -> Expr:
    return E.call(_OTHERWISE[condition.op], *condition.args)


_SAME_ROW = {"sum": ("softmax",)}


def _product(e: Expr, xs: list[Interval]) -> Interval:
    if e.args[0] == e.args[1] and e.op == "mul":
        return _power(xs[0], 2.0)
    return _mul(*xs)


def _l2norm(e: Expr, xs: list[Interval]) -> Interval:
    return (0.0 if xs[0][0] >= 0.0 else -1.0), (0.0 if xs[0][1] <= 0.0 else 1.0)


def _signs(e: Expr, xs: list[Interval]) -> Interval:
    return (0.0 if xs[0][0] >= 0.0 else -INF), (0.0 if xs[0][1] <= 0.0 else INF)


def _same(e: Expr, xs: list[Interval]) -> Interval:
    return xs[0]


_RULES: dict[str, Callable[[Expr, list[Interval]], Interval]] = {
    "add": lambda e, xs: (0.0, 0.0) if e.args[0] == E.neg(e.args[1]) else _add(*xs),
    "sub": lambda e, xs: (0.0, 0.0) if e.args[0] == e.args[1] else _add(xs[0], _neg(xs[1])),
    "mul": _product,
    "outer": _product,
    "div": lambda e, xs: _mul(xs[0], _reciprocal(xs[1])),
    "neg": lambda e, xs: _neg(xs[0]),
    "pow": lambda e, xs: _power(xs[0], e.value),
    "abs": lambda e, xs: (max(xs[0][0], -xs[0][1], 0.0), max(-xs[0][0], xs[0][1])),
    "min": lambda e, xs: (min(xs[0][0], xs[1][0]), min(xs[0][1], xs[1][1])),
    "max": lambda e, xs: (max(xs[0][0], xs[1][0]), max(xs[0][1], xs[1][1])),
    "where": lambda e, xs: _hull(xs[1], xs[2]),
    "cos": lambda e, xs: (-1.0, 1.0),
    "sin": lambda e, xs: (-1.0, 1.0),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), lambda e, xs: (0.0, 1.0)),
    **dict.fromkeys(("mean", "rowmax", "rename", "expand"), _same),
    "softmax": lambda e, xs: (0.0, 1.0),
    "l2norm": _l2norm,
    "rmsnorm": _signs,
    "concat": lambda e, xs: _hull(*xs),
    "taylor2": lambda e, xs: (0.0 if xs[0][0] >= 0.0 else -INF, INF),
    "quad": lambda e, xs: (0.0 if xs[0][0] >= 0.0 or xs[0][1] <= 0.0 else -INF, INF),
}


def _degrees(e: Expr, table: dict[Expr, list[int]]) -> dict[Expr, int]:
    """Returns the degree of a polynomial in each atom; ``table`` keeps the highest, and how often each atom occurs."""
    if e.op == "const":
        return {}
    if e.op in ("add", "sub", "mul", "neg"):
        below = [_degrees(a, table) for a in e.args]
        out: dict[Expr, int] = {}
        for b in below:
            for atom, d in b.items():
                out[atom] = out.get(atom, 0) + d if e.op == "mul" else max(out.get(atom, 0), d)
                table[atom][0] = max(table[atom][0], out[atom])
        return out
    table.setdefault(e, [1, 0])[1] += 1
    return {e: 1}


def _evaluate(e: Expr, atoms: dict[Expr, Interval]) -> Interval:
    """Evaluates a polynomial over its atoms' intervals."""
    if e.op == "const":
        return e.value, e.value
    if e.op in ("add", "sub", "mul", "neg"):
        xs = [_evaluate(a, atoms) for a in e.args]
        if e.op == "neg":
            return _neg(xs[0])
        return _mul(*xs) if e.op == "mul" else _add(xs[0], xs[1] if e.op == "add" else _neg(xs[1]))
    return atoms[e]


def interval(e: Expr, assumptions: Iterable[Expr] = (), sizes: Mapping[str, int] | None = None) -> Interval:
    """This function returns bounds of every element of ``e`` under the assumptions."""
    return Bounds(assumptions, sizes).interval(e)


def shown(x: Interval) -> str:
    """Prints an interval, unbounded ends open."""
    low = f"[{number(x[0])}" if x[0] > -INF else "(-inf"
    return f"{low}, {number(x[1])}]" if x[1] < INF else f"{low}, inf)"


# ---- decays ---------------------------------------------------------------------------------------------------------------------


def log_of(decay: Expr, assumptions: Iterable[Expr] = ()) -> Expr:
    """This function returns the log of a decay factor, read off its form: exp(x) gives x, sigmoid its logsigmoid, products sums,
    powers multiples, where both branches, and a factor of 0 the hard reset; anything else becomes log(...), whose argument
    ``prove_nonpositive`` then wants >= 0. A product whose operands may be negative is not taken apart."""
    return _log_form(decay, Bounds(assumptions))


def _log_form(e: Expr, bounds: Bounds) -> Expr:
    def positive(*xs: Expr) -> bool:
        return all(bounds.interval(x)[0] >= 0.0 for x in xs)

    if e.op == "const" and e.value >= 0.0:
        return E.const(_log(e.value) if e.value else RESET)
    if e.op == "exp":
        return e.args[0]
    if e.op == "sigmoid":
        return E.call("logsigmoid", e.args[0])
    if e.op == "sub" and e.args[0] == E.ONE and e.args[1].op == "sigmoid":
        return E.call("logsigmoid", E.neg(e.args[1].args[0]))
    if e.op in ("mul", "div") and positive(*e.args):
        logs = [_log_form(a, bounds) for a in e.args]
        return E.add(*logs) if e.op == "mul" else E.sub(*logs)
    if e.op == "pow" and positive(e.args[0]):
        return E.mul(E.const(e.value), _log_form(e.args[0], bounds))
    if e.op in ("sqrt", "rsqrt") and positive(e.args[0]):
        return E.mul(E.const(0.5 if e.op == "sqrt" else -0.5), _log_form(e.args[0], bounds))
    if e.op == "where":
        return E.call("where", e.args[0], _log_form(e.args[1], bounds), _log_form(e.args[2], bounds))
    if e.op in ("min", "max") and positive(*e.args):
        return E.call(e.op, *(_log_form(a, bounds) for a in e.args))
    return E.call("log", e)


@dataclass(frozen=True)
class Proof:
    """How a log-decay was shown to be <= 0 (``text``), or, where ``holds`` is False, the interval found and ``wanted``: assumptions
    in the spec language that would settle it, none where it is false whatever is assumed."""

    holds: bool
    text: str
    interval: Interval
    wanted: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """Returns what to write so that the proof holds."""
        if not self.wanted:
            return "write a factor of at most 1"
        return f"add {' and '.join(f'`- {w}`' for w in self.wanted)} to assume, where that is so"


def prove_nonpositive(log: Expr, assumptions: Iterable[Expr] = (), names: Mapping[Expr, str] | None = None) -> Proof:
    """This function tells whether a log-decay is <= 0 for all inputs that meet the assumptions, and why."""
    facts, known = tuple(assumptions), dict(names or {})
    proof = _tried(log, facts, known)
    return proof if proof.holds else replace(proof, wanted=_wanted(log, facts, proof.wanted))


def _tried(log: Expr, facts: tuple[Expr, ...], names: dict[Expr, str]) -> Proof:
    bounds = Bounds(facts)
    for node in walk(log):
        if node.op == "log" and bounds.interval(node.args[0])[0] < 0.0:
            inside, text = bounds.interval(node.args[0]), show(node.args[0], names)
            return Proof(False, f"{text} is in {shown(inside)}, so its log may not exist", inside, (f"{text} >= 0",))
    bounds.used.clear()
    found = bounds.interval(log)
    text = f"{show(log, names)} is in {shown(found)}"
    if found[1] <= SLACK:
        return Proof(True, f"{text} by {' and '.join(bounds.used) or 'intervals'}", found)
    wanted = f"{show(log.args[0], names)} <= 1" if log.op == "log" else f"{show(log, names)} <= 0"
    return Proof(False, f"{text}, so the decay may grow the state", found, (wanted,))


def _wanted(log: Expr, facts: tuple[Expr, ...], whole: tuple[str, ...]) -> tuple[str, ...]:
    """Returns assumptions that would settle it: about one tensor where that is enough, else about the whole."""
    leaves = [n for n in walk(log) if n.op in ("input", "param")]
    if not leaves:
        return () if all(n.op in ("const", "size") for n in walk(log) if not n.args) else whole
    for leaf in leaves:
        below, above = E.call("le", leaf, E.ZERO), E.call("ge", leaf, E.ZERO)
        inside = (above, E.call("le", leaf, E.ONE))
        for more in ((below,), (above,), inside):
            if Bounds((*facts, *more)).interval(leaf) != (0.0, 0.0) and _tried(log, (*facts, *more), {}).holds:
                return tuple(str(m) for m in more)
    return whole


def facts_of(variant: Variant) -> tuple[Expr, ...]:
    """This function returns the assumptions of a variant, and of every peak line ``m: max(m[t-1] + a, b)`` that m[t] is the larger."""
    facts = list(variant.assumptions)
    for line in variant.states:
        if line.peak:
            now = E.leaf("now", line.name, line.dims, line.head, token=True)
            facts.extend(E.call("le", a, now) for a in line.expr.args)
    return tuple(facts)
