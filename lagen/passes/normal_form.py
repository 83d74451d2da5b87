"""Normal form: what an expression means as algebra, so that two spellings can be compared.

A polynomial maps monomials to exact coefficients; a monomial is a sorted tuple of atoms with exponents; an atom is canonical text. Sums
are expanded; contractions are sums over a named dim, with what lacks the dim pulled out; exp of a sum is a product of exps. Every read
of a state is told by its past: S[t] is put in as decay * S[t-1] + writes. What it is not: something to compute from or to print, and no
proof of inequality (max(x, y) - x is not compared with relu(y - x)). Where products would grow past LIMIT terms they stay factored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from lagen.ir.expr import Expr, walk
from lagen.ir.recurrence import State

Monomial = tuple[tuple[str, Fraction], ...]
Polynomial = tuple[tuple[Monomial, Fraction], ...]
"""Sorted by monomial; no coefficient is 0."""

LIMIT = 512
_EVEN, _ODD = ("abs", "cos"), ("tanh", "sin", "sign")  # functions whose argument is given a leading plus
_UNIT: Monomial = ()
_ONE = Fraction(1)
ZERO: Polynomial = ()
UNIT: Polynomial = ((_UNIT, _ONE),)


def text(p: Polynomial) -> str:
    """Prints a polynomial, the same for equal ones."""
    return " + ".join(f"{c}*{_product(m)}" for m, c in p) or "0"


def _product(m: Monomial) -> str:
    return " ".join(a if e == 1 else f"{a}^{e}" for a, e in m) or "1"


def _sorted(terms: Mapping[Monomial, Fraction]) -> Polynomial:
    return tuple(sorted((m, c) for m, c in terms.items() if c))


def add(*ps: Polynomial) -> Polynomial:
    """Adds polynomials."""
    total: dict[Monomial, Fraction] = {}
    for p in ps:
        for m, c in p:
            total[m] = total.get(m, Fraction(0)) + c
    return _sorted(total)


def scaled(p: Polynomial, c: Fraction) -> Polynomial:
    """Multiplies by a number."""
    return tuple((m, k * c) for m, k in p) if c else ZERO


def _joined(a: Monomial, b: Monomial) -> Monomial:
    powers = dict(a)
    for atom, e in b:
        powers[atom] = powers.get(atom, Fraction(0)) + e
    return tuple(sorted((x, min(e, _ONE) if x.startswith("[") else e) for x, e in powers.items() if e))


def _shared(p: Polynomial) -> Monomial:
    """Returns the monomial with every atom's least exponent over the terms, 0 where it is absent (no indicator is divided by)."""
    powers = [dict(m) for m, _ in p]
    least = {a: min(m.get(a, Fraction(0)) for m in powers) for a in sorted({a for m in powers for a in m})}
    return tuple((a, e) for a, e in least.items() if e and not a.startswith("["))


class Algebra:
    """Makes normal forms. ``states`` are those that readouts read; of every atom its dims are kept, and what is inside exp and the like."""

    def __init__(self, states: Iterable[State] = ()) -> None:
        self.states = {s.name: s for s in states}
        self._solved = {u.leaf: u.value for s in self.states.values() for u in s.solves}
        self._dims: dict[str, frozenset[str]] = {}
        self._inside: dict[str, tuple[str, Polynomial]] = {}
        self._memo: dict[Expr, Polynomial] = {}

    def equal(self, a: Expr, b: Expr) -> bool:
        """Tells whether two expressions are the same algebra."""
        return a == b or self.of(a) == self.of(b)

    # ---- atoms ----

    def atom(self, name: str, dims: Iterable[str] = (), exponent: Fraction = _ONE) -> Polynomial:
        """Makes the polynomial of one atom; a long name is shortened to a digest."""
        if len(name) > 240:
            name = f"{'[' if name.startswith('[') else ''}#{hashlib.sha256(name.encode()).hexdigest()}"
        self._dims[name] = frozenset(dims)
        return ((((name, exponent),), _ONE),)

    def function(self, name: str, p: Polynomial, exponent: Fraction = _ONE) -> Polynomial:
        """Makes the atom name(p)."""
        made = self.atom(f"{name}({text(p)})", self.dims(p), exponent)
        self._inside[made[0][0][0][0]] = (name, p)
        return made

    def dims(self, p: Polynomial) -> frozenset[str]:
        """Returns the dims that a polynomial spans."""
        return frozenset(d for m, _ in p for a, _ in m for d in self._dims[a])

    # ---- arithmetic ----

    def mul(self, a: Polynomial, b: Polynomial) -> Polynomial:
        """Multiplies, expanded up to LIMIT terms."""
        if len(a) * len(b) > LIMIT:
            return self.mul(*(p if len(p) == 1 else self._factored(p, _ONE) for p in (a, b)))
        total: dict[Monomial, Fraction] = {}
        for m, c in a:
            for n, d in b:
                key = _joined(m, n)
                total[key] = total.get(key, Fraction(0)) + c * d
        return _sorted(total)

    def _factored(self, p: Polynomial, e: Fraction) -> Polynomial:
        """Makes p ** e as one atom, and, where e is whole, what can be taken out of p's terms."""
        if e.denominator != 1 or not p:
            return self.function("", p, e)
        shared = _shared(p)
        rest = self.mul(((tuple((a, -k) for a, k in shared), _ONE),), p)
        lead = rest[0][1]
        content: Polynomial = ((tuple((a, k * e) for a, k in shared), lead ** int(e)),)
        x = self._one_plus_exp(scaled(rest, 1 / lead))
        if x is not None and e < 0:
            return self.mul(content, self.power(add(UNIT, scaled(self.sigmoid(x), -_ONE)), -e))
        return self.mul(content, self.function("", scaled(rest, 1 / lead), e))

    def _one_plus_exp(self, p: Polynomial) -> Polynomial | None:
        """Returns x where p is 1 + exp(x): its reciprocal is 1 - sigmoid(x)."""
        if len(p) != 2 or UNIT[0] not in p:
            return None
        m, c = next(t for t in p if t != UNIT[0])
        found = [self._inside.get(a, ("", ZERO)) for a, _ in m]
        if c != 1 or not m or any(kind != "exp" for kind, _ in found):
            return None
        return add(*(scaled(inner, k) for (_, inner), (_, k) in zip(found, m, strict=True)))

    def power(self, p: Polynomial, e: Fraction) -> Polynomial:
        """Raises to a constant exponent."""
        if e == 0:
            return UNIT
        whole = e.denominator == 1
        if len(p) == 1:
            m, c = p[0]
            if whole or (c == 1 and len(m) == 1 and m[0][1] == 1):
                return ((_joined((), tuple((a, k * e) for a, k in m)), c ** int(e) if whole else _ONE),)
        if whole and 0 < e <= 4 and len(p) ** int(e) <= LIMIT:
            total = p
            for _ in range(int(e) - 1):
                total = self.mul(total, p)
            return total
        return self._factored(p, e)

    # ---- functions ----

    def exp(self, p: Polynomial) -> Polynomial:
        """Makes exp(p) as a product of one exp a monomial."""
        total = UNIT
        for m, c in p:
            kind, inner = self._inside.get(m[0][0], ("", ZERO)) if len(m) == 1 and m[0][1] == 1 else ("", ZERO)
            if kind == "softplus" and c.denominator == 1 and abs(c) <= 4:
                once = add(UNIT, self.exp(inner)) if c > 0 else add(UNIT, scaled(self.sigmoid(inner), -_ONE))
                total = self.mul(total, self.power(once, abs(c)))
            elif kind == "log" and c.denominator == 1:
                total = self.mul(total, self.power(inner, c))
            else:
                total = self.mul(total, self.function("exp", ((m, _ONE),), c))
        return total

    def sigmoid(self, p: Polynomial) -> Polynomial:
        """Makes sigmoid(p), with 1 - sigmoid(-p) where p leads with a minus."""
        if _negative(p):
            return add(UNIT, scaled(self.sigmoid(scaled(p, -_ONE)), -_ONE))
        return self.function("sigmoid", p)

    def softplus(self, p: Polynomial) -> Polynomial:
        """Makes softplus(p), with softplus(-p) + p where p leads with a minus."""
        return add(self.softplus(scaled(p, -_ONE)), p) if _negative(p) else self.function("softplus", p)

    def log(self, p: Polynomial) -> Polynomial:
        """Makes log(p); exps come out of it."""
        if len(p) == 1:
            m, c = p[0]
            exps = [(e, self._inside[a][1]) for a, e in m if self._inside.get(a, ("",))[0] == "exp"]
            rest = tuple((a, e) for a, e in m if self._inside.get(a, ("",))[0] != "exp")
            outside = add(*(scaled(inner, e) for e, inner in exps))
            if len(rest) == 1 and c == 1 and rest[0][1] == 1 and self._inside.get(rest[0][0], ("",))[0] == "sigmoid":
                return add(outside, scaled(self.softplus(scaled(self._inside[rest[0][0]][1], -_ONE)), -_ONE))
            inner: Polynomial = ((rest, c),)
            return add(outside, ZERO if inner == UNIT else self.function("log", inner))
        return self.function("log", p)

    def indicator(self, op: str, a: Polynomial, b: Polynomial) -> Polynomial:
        """Makes a comparison as a number, 1 or 0."""
        if op in ("gt", "ge"):
            return self.indicator({"gt": "lt", "ge": "le"}[op], b, a)
        if op in ("le", "ne"):
            return add(UNIT, scaled(self.indicator("lt", b, a) if op == "le" else self.indicator("eq", a, b), -_ONE))
        p = add(a, scaled(b, -_ONE))
        if op == "eq" and _negative(p):
            p = scaled(p, -_ONE)
        return self.atom(f"[{text(p)} {op} 0]", self.dims(p))

    def total(self, p: Polynomial, dim: str) -> Polynomial:
        """Sums over ``dim``: what lacks it comes out."""
        return self._over(
            p, dim, lambda inner: self.atom(f"sum {dim} ({_product(inner)})", self.dims(((inner, _ONE),)) - {dim}), (f"size {dim}")
        )

    def _over(self, p: Polynomial, dim: str, close: Callable[[Monomial], Polynomial], empty: str = "") -> Polynomial:
        """Splits each monomial into what has ``dim`` (closed) and what lacks it."""
        out = []
        for m, c in p:
            inner = tuple((a, e) for a, e in m if dim in self._dims[a])
            outer: Polynomial = ((tuple((a, e) for a, e in m if dim not in self._dims[a]), c),)
            out.append(self.mul(outer, close(inner) if inner or not empty else self.atom(empty)))
        return add(*out)

    # ---- reads ----

    def decay(self, state: State) -> Polynomial:
        """Returns the log of a state's whole decay; the clamp of "logdecay" is left out."""
        return add(*(self.of(g.args[0] if g.op == "logdecay" else g) for g in state.decay))

    def writes(self, state: State) -> Polynomial:
        """Returns what a token adds to a state."""
        return add(*(self.mul(self.of(w.row), self.of(w.col)) for w in state.writes))

    def read(self, state: State, vector: Polynomial, dim: str, at: str) -> Polynomial:
        """Returns a read of a state over ``dim`` as reads of its past ("all": of its sum), linear in the vector."""
        if state.peak and at == "now":
            most = sorted((text(add(self.atom(f"read {state.name} previous", state.dims), self.decay(state))), text(self.writes(state))))
            return self.mul(vector, self.atom(f"max({', '.join(most)})", state.dims))
        if at == "decayed":
            return self.read(state, self.mul(vector, self.exp(self.decay(state))), dim, "previous")
        if at == "now":
            own = self.mul(vector, self.writes(state))
            return add(self.read(state, vector, dim, "decayed"), self.total(own, dim) if dim else own)
        rest = frozenset(state.dims) - {dim}
        if not dim:
            return self.mul(vector, self.atom(f"read {state.name} {at}", rest))
        return self._over(
            vector,
            dim,
            lambda inner: self.atom(f"read {state.name} {dim} {at} ({_product(inner)})", rest | self.dims(((inner, _ONE),)) - {dim}),
        )

    # ---- expressions ----

    def of(self, x: Expr) -> Polynomial:
        """Returns the normal form of an expression."""
        for node in walk(x):
            if node not in self._memo:
                self._memo[node] = self._node(node, [self._memo[a] for a in node.args])
        return self._memo[x]

    def _node(self, x: Expr, args: list[Polynomial]) -> Polynomial:
        op = x.op
        if op == "const":
            return (
                ((_UNIT, Fraction(x.value)),) if x.value and math.isfinite(x.value) else ZERO if not x.value else self.atom(repr(x.value))
            )
        if op in ("size", "scale", "input", "param", "past", "now"):
            return self.atom(f"{op} {x.name}".strip(), x.dims)
        if op == "solved":
            return self.of(self._solved[x])
        if op == "readout":
            return self.read(self.states[x.name], args[0], x.attr("dim"), x.attr("at"))
        if op in ("contract", "sum", "mean"):
            p = self.mul(*args) if op == "contract" else args[0]
            p = self.total(p, x.attr("dim"))
            return self.mul(p, self.atom(f"size {x.attr('dim')}", (), -_ONE)) if op == "mean" else p
        if op in _RULES:
            return _RULES[op](self, *args)
        if op == "pow":
            return self.power(args[0], Fraction(x.value))
        if op in ("lt", "le", "gt", "ge", "eq", "ne"):
            return self.indicator(op, args[0], args[1])
        if op in ("min", "max"):
            return self.atom(f"{op}({', '.join(sorted(text(a) for a in args))})", x.dims)
        if op in _ODD and _negative(args[0]):
            return scaled(self.function(op, scaled(args[0], -_ONE)), -_ONE)
        if op in _EVEN and _negative(args[0]):
            return self.function(op, scaled(args[0], -_ONE))
        inner = ", ".join(text(a) for a in args)
        extra = "".join(f" {k}={v}" for k, v in x.attrs) + (f" {x.value!r}" if x.value else "")
        return self.atom(f"{op}{extra}({inner})", x.dims)


def _negative(p: Polynomial) -> bool:
    return bool(p) and p[0][1] < 0


_HALF = Fraction(1, 2)
_RULES: dict[str, Callable[..., Polynomial]] = {
    "add": lambda m, a, b: add(a, b),
    "sub": lambda m, a, b: add(a, scaled(b, -_ONE)),
    "neg": lambda m, a: scaled(a, -_ONE),
    "mul": Algebra.mul,
    "outer": Algebra.mul,
    "div": lambda m, a, b: m.mul(a, m.power(b, -_ONE)),
    "expand": lambda m, a: a,
    "logdecay": lambda m, a: a,
    "sqrt": lambda m, a: m.power(a, _HALF),
    "rsqrt": lambda m, a: m.power(a, -_HALF),
    "exp": Algebra.exp,
    "log": Algebra.log,
    "sigmoid": Algebra.sigmoid,
    "softplus": Algebra.softplus,
    "logsigmoid": lambda m, a: scaled(m.softplus(scaled(a, -_ONE)), -_ONE),
    "silu": lambda m, a: m.mul(a, m.sigmoid(a)),
    "relu": lambda m, a: m.atom(f"max({', '.join(sorted((text(a), text(ZERO))))})", m.dims(a)),
    "where": lambda m, c, a, b: add(m.mul(c, a), b, scaled(m.mul(c, b), -_ONE)),
}
"""Ops with algebra of their own; all others are atoms."""
