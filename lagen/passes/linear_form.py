"""Linear forms: an expression over states as a sum of products, so that decays, writes and reads can be told apart.

What it is: ``Term`` is a product of token-wise factors times at most one state leaf; ``Lines`` expands an expression into terms and
closes every contraction of a state into a readout (ir/recurrence.py). What it is not: token-wise sub-expressions are not expanded,
because nothing is gained by it and the user's names would be lost. Who makes it: passes/canonicalise. Nobody keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn

from lagen.ir import expr as E
from lagen.ir.bounds import facts_of
from lagen.ir.expr import ONE, Expr, ExprTypeError
from lagen.ir.recurrence import State, readout
from lagen.ir.variant import OutputLine, StateLine, Variant
from lagen.passes.normal_form import UNIT, ZERO, Algebra, Polynomial, add
from lagen.passes.refusal import Refused

Flat = tuple[tuple[Expr, ...], tuple[Expr, ...]]
"""Factors and divisors of a product."""

MAX_TERMS = 1024
"""Most terms of one product; a spec has a handful."""


@dataclass(frozen=True)
class Term:
    """A product: ``factors`` over ``over``, all token-wise and of any dims, times ``state`` (a past or now leaf) if there is one."""

    factors: tuple[Expr, ...] = ()
    over: tuple[Expr, ...] = ()
    state: Expr | None = None

    def on(self, dim: str) -> Flat:
        """Returns the factors and divisors that have ``dim``."""
        return tuple(f for f in self.factors if dim in f.dims), tuple(f for f in self.over if dim in f.dims)

    def off(self, dim: str) -> Flat:
        """Returns the factors and divisors that lack ``dim``."""
        return tuple(f for f in self.factors if dim not in f.dims), tuple(f for f in self.over if dim not in f.dims)

    def times(self, *factors: Expr) -> Term:
        """Returns this term with more factors."""
        return Term(self.factors + tuple(f for f in factors if f != ONE), self.over, self.state)

    def __str__(self) -> str:
        parts = [
            f"({f})" if f.op in ("add", "sub", "neg") else str(f) for f in (*self.factors, *(() if self.state is None else (self.state,)))
        ]
        return " * ".join(parts or ["1"]) + "".join(f" / ({d})" for d in self.over)


def product(factors: tuple[Expr, ...], over: tuple[Expr, ...] = ()) -> Expr:
    """Multiplies ``factors`` and divides by ``over``; the factors' dims must nest."""
    wide_last = sorted(factors, key=lambda f: len(f.dims))
    total = E.mul(*wide_last)
    return E.div(total, E.mul(*sorted(over, key=lambda f: len(f.dims)))) if over else total


def product_of_all(factors: tuple[Expr, ...], over: tuple[Expr, ...] = ()) -> Expr:
    """Multiplies factors of any dims: vectors of different dims become a matrix."""
    by_dims = {f.dims: None for f in sorted((*factors, *over), key=lambda f: (len(f.dims), f.dims))}
    parts = [product(tuple(f for f in factors if f.dims == d), tuple(f for f in over if f.dims == d)) for d in by_dims]
    vectors = [p for p in parts if len(p.dims) == 1]
    matrices = [E.outer(*vectors)] if len(vectors) > 1 else vectors
    return E.mul(*(p for p in parts if not p.dims), *matrices, *(p for p in parts if len(p.dims) > 1))


def flat(x: Expr) -> Flat:
    """Splits a product into factors and divisors, through mul, div, neg and outer, and no further."""
    if x.op == "neg":
        up, down = flat(x.args[0])
        return (E.const(-1.0), *up), down
    if x.op in ("mul", "outer"):
        (up, down), (more, less) = flat(x.args[0]), flat(x.args[1])
        return tuple(f for f in up + more if f != ONE), down + less
    if x.op == "div":
        (up, down), (less, more) = flat(x.args[0]), flat(x.args[1])
        return tuple(f for f in up + more if f != ONE), tuple(f for f in down + less if f != ONE)
    return (() if x == ONE else (x,)), ()


def split_scalar(x: Expr) -> tuple[Expr, Expr]:
    """Splits a product into its scalar part and the rest; ``x`` itself is the rest where it has no scalar factor."""
    if not x.dims:
        return x, ONE
    if x.op == "neg":
        s, v = split_scalar(x.args[0])
        return E.neg(s), v
    if x.op in ("mul", "div"):
        (s1, v1), (s2, v2) = split_scalar(x.args[0]), split_scalar(x.args[1])
        if (s1, s2) == (ONE, ONE):
            return ONE, x
        return (E.mul(s1, s2), E.mul(v1, v2)) if x.op == "mul" else (E.div(s1, s2), E.div(v1, v2))
    return ONE, x


class Lines:
    """Expands one line. ``own`` is the state whose line it is ("" for an output), ``done`` the states before it."""

    def __init__(self, variant: Variant, done: dict[str, State], decays: dict[str, Flat], line: StateLine | OutputLine) -> None:
        self.variant, self.done, self.line = variant, done, line
        self.own = line.name if isinstance(line, StateLine) else ""
        self.decays = decays  # each state's decay as it was read off, to know the decayed past again
        self.algebra = Algebra(done.values())
        self._facts: tuple[Expr, ...] | None = None
        self._open: dict[Expr, frozenset[Expr]] = {}
        self._values: dict[Expr, Expr] = {}
        self._reading: dict[Expr, bool] = {}

    # ---- errors ----

    def refuse(self, code: str, message: str, help: str = "", term: Expr | Term | None = None) -> NoReturn:
        """Raises Refused at this line, underlining ``term``."""
        raise Refused.at(self.variant, self.line, code, message, help, self._one(term))

    def _one(self, term: Expr | Term | None) -> Expr | None:
        """Returns the expression of a term that is one factor or one state."""
        if isinstance(term, Term):
            parts = [*term.factors, *(() if term.state is None else (term.state,))]
            return self.respell(parts[0]) if len(parts) == 1 and not term.over else None
        return None if term is None else self.respell(term)

    def say(self, term: Term) -> str:
        """Prints a term with its readouts as the spec language writes them."""
        return str(Term(tuple(map(self.respell, term.factors)), tuple(map(self.respell, term.over)), term.state))

    def respell(self, x: Expr) -> Expr:
        """Writes readouts as the spec language does, for messages."""

        def rule(n: Expr) -> Expr | None:
            if n.op != "readout":
                return None
            state = self.done.get(n.name) or self._shell(E.leaf("past", n.name, ()))
            leaf = E.leaf("now" if n.attr("at") in ("now", "all") else "past", n.name, state.dims, state.head, token=True)
            if n.attr("at") == "decayed":
                up, down = self.decays[n.name]
                for f in reversed(up):
                    leaf = E.mul(f, leaf)
                for f in down:
                    leaf = E.div(leaf, f)
            vector = self.respell(n.args[0])
            if vector.op == "expand":
                return E.mul(vector.args[0], E.reduce("sum", leaf))
            if not n.attr("dim"):
                return E.mul(vector, leaf)
            return E.contract(leaf, vector) if n.attr("dim") == state.dims[-1] and len(state.dims) == 2 else E.contract(vector, leaf)

        return E.rewrite(x, rule)

    # ---- what is known ----

    @property
    def facts(self) -> tuple[Expr, ...]:
        """Returns what may be assumed here: the spec's assumptions, and of every peak above that it is the larger."""
        if self._facts is None:
            known = [f for f in facts_of(self.variant) if {n.name for n in E.reads(f, "past", "now")} <= set(self.done)]
            self._facts = tuple(self.value(f) if E.reads(f, "past", "now") else f for f in known)
        return self._facts

    # ---- what stands open ----

    def open_leaves(self, x: Expr) -> frozenset[Expr]:
        """Returns the state leaves of ``x`` that no contraction has closed; states of no dims count in their own line only."""
        if x not in self._open:
            if x.op in ("past", "now"):
                found = frozenset({x}) if x.dims or x.name == self.own else frozenset()
            else:
                found = frozenset().union(*(self.open_leaves(a) for a in x.args)) if x.args else frozenset()
            if x.op in ("contract", "sum", "mean"):
                found = frozenset(leaf for leaf in found if x.attr("dim") not in leaf.dims)
            self._open[x] = found
        return self._open[x]

    # ---- linear forms ----

    def expand(self, x: Expr) -> tuple[Term, ...]:
        """Expands ``x`` into terms; raises Refused where it is not linear in an open state."""
        if not self.open_leaves(x) and len(x.dims) < 2:
            value = self.value(x)
            return () if value == E.ZERO else (Term(() if value == ONE else (value,)),)
        if x.op in ("past", "now"):
            return (Term(state=x),)
        if x.op == "add":
            return self.expand(x.args[0]) + self.expand(x.args[1])
        if x.op == "sub":
            return self.expand(x.args[0]) + tuple(t.times(E.const(-1.0)) for t in self.expand(x.args[1]))
        if x.op == "neg":
            return tuple(t.times(E.const(-1.0)) for t in self.expand(x.args[0]))
        if x.op in ("mul", "outer"):
            left, right = self.expand(x.args[0]), self.expand(x.args[1])
            if len(left) * len(right) > MAX_TERMS:
                self.refuse(
                    "too-long", f"a product of sums has more than {MAX_TERMS} terms when it is expanded", "multiply it out by hand", x
                )
            return tuple(self._times(a, b, x) for a in left for b in right)
        if x.op == "div":
            return self._divide(x)
        if x.op == "pow" and not self.open_leaves(x):
            terms = self.expand(x.args[0])
            if len(terms) == 1:
                return (Term(tuple(E.power(f, x.value) for f in terms[0].factors), tuple(E.power(f, x.value) for f in terms[0].over)),)
        if x.op == "where":
            return self._where(x)
        if x.op in ("contract", "sum", "mean"):
            return self._contract(x)
        if not self._free_leaves(x):
            self._nonlinear(x)
        return (Term((self.value(x),)),)

    def _free_leaves(self, x: Expr) -> bool:
        """Tells whether all that is open in ``x`` are vector states above, which are read freely."""
        return self.variant.causal and all(len(leaf.dims) < 2 and leaf.name != self.own for leaf in self.open_leaves(x))

    def freed(self, t: Term) -> Term:
        """Makes a vector state that a term has as a whole a factor of it."""
        if t.state is None or t.state.name == self.own or len(t.state.dims) > 1:
            return t
        return Term((*t.factors, self._free(t.state)), t.over)

    def _times(self, a: Term, b: Term, whole: Expr) -> Term:
        if a.state is not None and b.state is not None:
            a, b = self.freed(a), self.freed(b)
        if a.state is not None and b.state is not None:
            self.refuse(
                "nonlinear-state",
                f"'{a}' times '{b}': a state may stand once in a product, because every state is linear in its own past",
                term=whole,
            )
        return Term(a.factors + b.factors, a.over + b.over, a.state or b.state)

    def _divide(self, x: Expr) -> tuple[Term, ...]:
        divisor = x.args[1]
        if len(divisor.dims) == 2:
            terms = self.expand(divisor)
            if len(terms) != 1 or terms[0].state is not None:
                self.refuse("nonlinear-state", f"division by '{divisor}', which is not a product", term=divisor)
            return tuple(Term(t.factors + terms[0].over, t.over + terms[0].factors, t.state) for t in self.expand(x.args[0]))
        value = self.value(divisor)
        return tuple(Term(t.factors, t.over + (value,), t.state) for t in self.expand(x.args[0]))

    def _where(self, x: Expr) -> tuple[Term, ...]:
        if not self._free_leaves(x.args[0]):
            self._nonlinear(x)
        cond = self.value(x.args[0])
        yes, no = E.call("where", cond, ONE, E.ZERO), E.call("where", cond, E.ZERO, ONE)
        left, right = self.expand(x.args[1]), self.expand(x.args[2])
        chosen = self._chosen(cond, left, right)
        if chosen is not None:
            left, right = (tuple(t for t in side if t.state is None) for side in (left, right))
        return (*([] if chosen is None else [chosen]), *(t.times(yes) for t in left), *(t.times(no) for t in right))

    @staticmethod
    def _chosen(cond: Expr, left: tuple[Term, ...], right: tuple[Term, ...]) -> Term | None:
        """Returns the past of both branches as one term, where each has one and their coefficients have a common type."""
        a, b = ([t for t in side if t.state is not None] for side in (left, right))
        if len(a) != 1 or len(b) != 1 or a[0].state != b[0].state:
            return None
        try:
            return Term((E.call("where", cond, product(a[0].factors, a[0].over), product(b[0].factors, b[0].over)),), (), a[0].state)
        except ExprTypeError:
            return None

    def _nonlinear(self, x: Expr) -> NoReturn:
        leaf = sorted(self.open_leaves(x), key=str)[0]
        if leaf.name == self.own:
            self.refuse("nonlinear-state", f"'{x}' is not linear in {leaf}: every state is linear in its own past", term=x)
        self.refuse("matrix-read", f"'{x}': a matrix state is read by @ with a vector, and element-wise factors around it only", term=x)

    # ---- reads ----

    def _contract(self, x: Expr) -> tuple[Term, ...]:
        """Closes a contraction. What stays open (the own past of a scalar state) stays a factor."""
        dim = x.attr("dim")
        divide: tuple[Expr, ...] = (E.size(dim),) if x.op == "mean" else ()
        left = x.args[0]
        right = x.args[1] if x.op == "contract" else ONE
        if self.open_leaves(left) and self.open_leaves(right):
            narrow, left = sorted((left, right), key=lambda e: len(e.dims))
            right = self.value(narrow)
        elif self.open_leaves(right) or len(right.dims) > len(left.dims):
            left, right = right, self.value(left)
        else:
            right = self.value(right)
        if len(right.dims) > 1:  # a vector state through a matrix of the token, or a param
            return (Term((E.contract(self.value(left), right),)),)
        return tuple(self._close(t, right, dim, divide) for t in self._whole(self.expand(left)))

    def _whole(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Knows a state again that is spelled out: decay * S[t-1] + writes is S[t]."""
        pasts = [t for t in terms if t.state is not None and t.state.op == "past"]
        if len(pasts) != 1 or len(terms) < 2 or pasts[0].state is None:
            return terms
        past = pasts[0].state
        state = self.done.get(past.name)
        if state is None or any(t.state is not None for t in terms if t is not pasts[0]):
            return terms
        factors, over, at = self.past_of(past, pasts[0].factors, pasts[0].over)
        if state.decay and at != "decayed":
            return terms
        rest = self._polynomial(*(t for t in terms if t is not pasts[0]))
        wanted = self.algebra.mul(self._polynomial(Term(factors, over)), self.algebra.writes(state))
        return (Term(factors, over, replace(past, op="now")),) if rest == wanted else terms

    def _polynomial(self, *terms: Term) -> Polynomial:
        total = ZERO
        for t in terms:
            p = UNIT
            for f in t.factors:
                p = self.algebra.mul(p, self.algebra.of(f))
            for f in t.over:
                p = self.algebra.mul(p, self.algebra.power(self.algebra.of(f), Fraction(-1)))
            total = add(total, p)
        return total

    def _close(self, t: Term, right: Expr, dim: str, divide: tuple[Expr, ...]) -> Term:
        inside, under = t.on(dim)
        outside, below = t.off(dim)
        wide = [f for f in (*inside, *under) if len(f.dims) > 1]
        if t.state is None and len(wide) == 1 and wide[0] in inside:  # a matrix of the token, or a param: it takes the contraction itself
            vector = product((*(f for f in inside if f is not wide[0]), *(() if right == ONE else (right,))), under)
            return Term((*outside, self._dot(E.expand(vector, (dim,)), wide[0])), below + divide)
        if wide:
            message = f"'{wide[0]}' has both dims of a state and is not an outer product, so '@' cannot pass it"
            self.refuse("nonlinear-state", message, "scale the two sides apart, as in exp(a) * (exp(b) * S[t-1])", wide[0])
        if t.state is None or dim not in t.state.dims:
            return Term((*outside, self._dot(right, product(inside, under))), below + divide, t.state)
        factors, over, at = self.past_of(t.state, inside + outside, under + below)
        inside = tuple(f for f in factors if dim in f.dims)
        under = tuple(f for f in over if dim in f.dims)
        vector = product((*inside, *(() if right == ONE else (right,))), under)
        s, vector = split_scalar(vector)
        vector = E.expand(vector, (dim,))  # a plain sum is a read by a vector of ones
        state = self.done.get(t.state.name) or self._shell(t.state)
        read = self._dot(vector, self._free(t.state)) if state.peak else readout(state, vector, dim, at)
        rest = tuple(f for f in factors if dim not in f.dims)
        return Term(tuple(f for f in (*rest, s, read) if f != ONE), tuple(f for f in over if dim not in f.dims) + divide)

    @staticmethod
    def _dot(a: Expr, b: Expr) -> Expr:
        (s, a), (r, b) = split_scalar(a), split_scalar(b)
        if not a.dims or not b.dims:
            return E.mul(s, r, E.reduce("sum", a if a.dims else b))
        return E.mul(s, r, E.contract(a, b))

    def past_of(self, leaf: Expr, factors: tuple[Expr, ...], over: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], tuple[Expr, ...], str]:
        """Tells which past is read: the factors of a state's decay, when all are there, are taken out and the read is "decayed"."""
        if leaf.op == "now":
            return factors, over, "now" if self.variant.causal else "all"
        up, down = self.decays.get(leaf.name, ((), ()))
        if up or down:
            parts = [flat(f) for f in factors], [flat(f) for f in over]
            have = [f for p in parts[0] for f in p[0]] + [f for p in parts[1] for f in p[1]]
            under = [f for p in parts[0] for f in p[1]] + [f for p in parts[1] for f in p[0]]
            if self._remove(have, up) and self._remove(under, down):
                return tuple(have), tuple(under), "decayed"
            if self._polynomial(Term(factors, over)) == self._polynomial(Term(up, down)):
                return (), (), "decayed"
        return factors, over, "previous"

    def _remove(self, have: list[Expr], wanted: tuple[Expr, ...]) -> bool:
        """Takes ``wanted``, in whatever spelling, out of ``have``; tells whether all were there."""
        for w in wanted:
            found = next((i for i, f in enumerate(have) if self.algebra.equal(f, w)), None)
            if found is None:
                return False
            del have[found]
        return True

    def _shell(self, leaf: Expr) -> State:
        """Makes the state of a leaf whose line is not done yet, enough to type a readout of it."""
        line = self.variant.state(leaf.name)
        return State(line.name, line.head, line.dims, (), ())

    def value(self, x: Expr) -> Expr:
        """Lowers ``x`` to a token-wise value over readouts; raises Refused where a matrix state is left open."""
        if x not in self._values:
            self._values[x] = self._lowered(x) if self._reads(x) else x
        return self._values[x]

    def _reads(self, x: Expr) -> bool:
        """Tells whether ``x`` holds what an output may not: a state leaf, or an outer product."""
        if x not in self._reading:
            self._reading[x] = x.op in ("past", "now", "outer") or any(self._reads(a) for a in x.args)
        return self._reading[x]

    def _lowered(self, x: Expr) -> Expr:
        if x.op in ("past", "now"):
            return self._free(x)
        if x.op in ("contract", "sum", "mean"):
            terms = self._contract(x)
            return E.add(*(self._joined(t) for t in terms))
        out = E.rebuild(x, tuple(self.value(a) for a in x.args))
        return _cancelled(out) if out.op == "div" else out

    def _joined(self, t: Term) -> Expr:
        body = product(t.factors, t.over)
        return body if t.state is None else E.mul(body, self._free(t.state))

    def _free(self, leaf: Expr) -> Expr:
        if len(leaf.dims) == 2:
            self.refuse(
                "matrix-read", f"{leaf} is a matrix state: it is read by @ with a vector, as in q @ {leaf}", f"q @ {leaf}", term=leaf
            )
        state = self.done.get(leaf.name) or self._shell(leaf)
        at = ("now" if self.variant.causal else "all") if leaf.op == "now" else "previous"
        return readout(state, ONE, "", at)


def _cancelled(quotient: Expr) -> Expr:
    """Drops the sizes and numbers that both sides of a quotient have as factors, as the scale of a feature map."""
    (up, under), (down, over) = flat(quotient.args[0]), flat(quotient.args[1])
    left, right = list(up), list(down)
    for f in up:
        if f in right and f != E.const(-1.0) and all(n.op in ("const", "size", "scale", "pow") for n in E.walk(f)):
            left.remove(f)
            right.remove(f)
    if len(left) == len(up):
        return quotient
    return product((*left, *over), (*right, *under))
