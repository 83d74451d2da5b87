"""Prints expressions, states and chunk forms as mathematics, for people to read.

Notation: q S[t] contracts a state's first dim with a vector, S[t] v its second; ⟨a, b⟩ is an inner product, ∘ an element-wise and ⊗ an
outer one; γ∘S[t−1] is the decayed past; [>t] and [≥t] mark what later tokens wrote. In chunks S is the carried state, b the cumsum of a
log-decay g inside the chunk and b_C its last row; tril keeps j <= i, strict j < i; Γ_ij = exp(b_i − b_j), where gram and mix carry it on
the axis of b. The printer is closed: an op that it does not know raises KeyError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from lagen.ir.chunk import Carry
from lagen.ir.expr import ONE, Expr, number, walk
from lagen.ir.recurrence import State

ATOM, FACTOR, PRODUCT, SUM, ANY = 4, 3, 2, 1, 0
"""How tightly a text binds."""
Text = tuple[str, int]

_INFIX = {"add": ("+", SUM), "sub": ("−", SUM), "div": ("/", PRODUCT)}
_INFIX |= {"lt": ("<", ANY), "le": ("≤", ANY), "gt": (">", ANY), "ge": ("≥", ANY), "eq": ("=", ANY), "ne": ("≠", ANY)}
_CALLS = {
    **{f: f for f in ("exp", "log", "sqrt", "abs", "sign", "min", "max", "sigmoid", "logsigmoid", "softplus", "tanh", "relu", "elu")},
    **{f: f for f in ("silu", "gelu", "cdf", "cos", "sin", "softmax", "l2norm", "rmsnorm", "taylor2", "quad", "mean", "sum")},
    **{"rowmax": "max", "untaylor2": "taylor2ᵀ", "unquad": "quadᵀ"},
}
_READS = {"now": "[t]", "previous": "[t−1]", "all": "[T]", "later": "[>t]", "since": "[≥t]"}


class Mathematics:
    """Prints expressions. ``states`` are those that readouts read, ``names`` sub-expressions that have a name."""

    def __init__(self, states: Iterable[State], names: Mapping[Expr, str] | None = None) -> None:
        self.states = {s.name: s for s in states}
        self.names = dict(names or {})

    def text(self, x: Expr, level: int = ANY) -> str:
        """Prints ``x``, in parentheses where it binds weaker than ``level``."""
        if x in self.names:
            return self.names[x]
        body, binds = self._node(x)
        return f"({body})" if binds < level else body

    def definition(self, x: Expr) -> str:
        """Prints what a name stands for."""
        return self._node(x)[0]

    def name_repeated(self, roots: Iterable[Expr], length: int = 28) -> list[Expr]:
        """Names what stands at several places and is longer than ``length``; returns it in the order of use."""
        uses: Counter[Expr] = Counter()
        order = list(walk(*roots))
        for n in order:
            uses.update(n.args)
        made: list[Expr] = []
        for n in order:
            if uses[n] > 1 and n.args and n not in self.names and len(self.definition(n)) > length:
                self.names[n] = f"x{len(made) + 1}"
                made.append(n)
        return made

    def _node(self, x: Expr) -> Text:
        if x.op in ("input", "param", "stored", "size"):
            return x.name, ATOM
        if x.op == "const":
            return number(x.value).replace("-", "−"), PRODUCT if x.value < 0 else ATOM
        if x.op == "add" and x.args[1].op == "neg" and x.args[1] not in self.names:
            return f"{self.text(x.args[0], SUM)} − {self.text(x.args[1].args[0], PRODUCT)}", SUM
        if x.op in _INFIX:
            sign, level = _INFIX[x.op]
            return f"{self.text(x.args[0], level)} {sign} {self.text(x.args[1], level + 1)}", level
        if x.op in _CALLS:
            return f"{_CALLS[x.op]}({', '.join(self.text(a) for a in x.args)})", ATOM
        return _RULES[x.op](self, x)

    def _product(self, x: Expr) -> Text:
        a, b = x.args
        sign = " ∘ " if a.dims and b.dims else " · "
        return f"{self.text(a, PRODUCT)}{sign}{self.text(b, FACTOR)}", PRODUCT

    def _power(self, x: Expr) -> Text:
        return f"{self.text(x.args[0], ATOM)}^{number(x.value).replace('-', '−')}", FACTOR

    def _contract(self, x: Expr) -> Text:
        a, b = x.args
        if len(a.dims) == len(b.dims) == 1:
            return f"⟨{self.text(a)}, {self.text(b)}⟩", ATOM
        return f"{self.text(a, FACTOR)} {self.text(b, FACTOR)}", PRODUCT

    def _where(self, x: Expr) -> Text:
        return f"{self.text(x.args[1])} if {self.text(x.args[0])} else {self.text(x.args[2])}", ANY - 1

    def _readout(self, x: Expr) -> Text:
        state, (vector,) = self.states[x.name], x.args
        at = x.attr("at")
        read = f"(γ∘{x.name}[t−1])" if at == "decayed" else f"{x.name}{_READS[at]}"
        if not x.attr("dim"):
            return (read, ATOM) if vector == ONE else (f"{self.text(vector, PRODUCT)} · {read}", PRODUCT)
        if len(state.dims) == 1:
            return f"⟨{self.text(vector)}, {read}⟩", ATOM
        v = self.text(vector, FACTOR)
        return (f"{v} {read}" if x.attr("dim") == state.dims[0] else f"{read} {v}"), PRODUCT

    def _suffix(self, x: Expr) -> Text:
        first, second = (self.text(a) for a in x.args[:2])
        return f"Σ[s≥t] ({first}) − Σ[t≤s<T] ({second}) + closing", SUM

    # ---- states ----

    def state(self, s: State) -> str:
        """Prints a state's line."""
        step = "t+1" if s.reverse else "t−1"
        if s.peak:
            shift = "".join(f" + {self.text(g, SUM)}" for g in s.decay)
            return f"{s.name}[t] = max({s.name}[t−1]{shift}, {self.text(s.writes[0].row)})"
        if not s.causal:
            return f"{s.name} = Σ_t ({self._writes(s)})"
        past = f"{s.name}[{step}]"
        if s.reverse and s.decay:
            return f"{s.name}[t] = {self.decayed(s, f'({past} + {self._writes(s)})')}      right side at t+1"
        line = f"{s.name}[t] = {self.decayed(s, past)}"
        return line + (f" + {self._writes(s)}" if s.writes else "") + ("      writes at t+1" if s.reverse else "")

    def solved(self, s: State) -> list[str]:
        """Prints what a state solves, a line each."""
        return [f"{self.text(u.leaf)} = {self.text(u.value)}" for u in s.solves]

    def decayed(self, s: State, past: str) -> str:
        """Prints the decay around ``past``."""
        for g in s.decay:
            factor = f"exp({self.text(g)})"
            if not g.dims:
                past = f"{factor} · {past}"
            elif len(g.dims) > 1:
                past = f"{factor} ∘ {past}"
            elif g.dims == s.dims[:1]:
                past = f"Diag({factor}) {past}" if len(s.dims) == 2 else f"{factor} ∘ {past}"
            else:
                past = f"{past} Diag({factor})"
        return past

    def carry(self, c: Carry) -> str:
        """Prints how a chunk updates a carried state."""
        body = c.state
        for f in c.factors:
            factor = self.text(f, FACTOR)
            if not f.dims or not c.x or not c.y:
                body = f"{factor} {'∘' if f.dims else '·'} {body}"
            else:
                body = f"Diag({factor}) {body}" if f.dims[0] == c.x else f"{body} Diag({factor})"
        return f"{c.state}' = {body}" + "".join(f" + {self.text(t.near, ATOM)}ᵀ {self.text(t.far, FACTOR)}" for t in c.terms)

    def _writes(self, s: State) -> str:
        terms = []
        for w in s.writes:
            if len(s.dims) == 2:
                terms.append(f"{self.text(w.row, FACTOR)} ⊗ {self.text(w.col, FACTOR)}")
            else:
                parts = [x for x in (w.row, w.col) if x != ONE] or [ONE]
                terms.append(" · ".join(self.text(p, SUM if len(parts) == 1 else FACTOR) for p in parts))
        return " + ".join(terms)


def _coordinate(g: Expr) -> str:
    return f"b_{g.dims[0]}" if g.dims else "b"


def _start(m: Mathematics, x: Expr) -> Text:
    b = _coordinate(x.args[0])
    return (f"e^({b}−g)" if x.attr("prev") == "1" else f"e^{b}"), FACTOR


def _gram(m: Mathematics, x: Expr) -> Text:
    r, n = m.text(x.args[0], FACTOR), m.text(x.args[1], FACTOR)
    return (f"gram({r}, {n}; {_coordinate(x.args[2])})", ATOM) if len(x.args) > 2 else (f"{r} {n}ᵀ", PRODUCT)


def _mix(m: Mathematics, x: Expr) -> Text:
    weight, pairs, values = x.args[:3]
    scores = [m.text(weight, FACTOR if pairs.args else ANY)] if weight != ONE or not pairs.args else []
    scores += ["Γ"] if pairs.args else []
    kept = "tril" if pairs.attr("inclusive") == "1" else "strict"
    if pairs.attr("reverse") == "1":
        kept = {"tril": "triu", "strict": "strict_triu"}[kept]
    masked, far = f"{kept}({' ∘ '.join(scores)})", m.text(values, FACTOR)
    if len(x.args) > 3:
        return f"mix({masked}, {far}; {_coordinate(x.args[3])})", ATOM
    return (f"{masked} {far}", PRODUCT) if values != ONE else (f"rowsum({masked})", ATOM)


_RULES: dict[str, Callable[[Mathematics, Expr], Text]] = {
    "scale": lambda m, x: ("scale", ATOM),
    "mul": Mathematics._product,
    "neg": lambda m, x: (f"−{m.text(x.args[0], PRODUCT)}", PRODUCT),
    "pow": Mathematics._power,
    "rsqrt": lambda m, x: (f"1/√({m.text(x.args[0])})", FACTOR),
    "where": Mathematics._where,
    "logdecay": lambda m, x: m._node(x.args[0]),
    "outer": lambda m, x: (f"{m.text(x.args[0], FACTOR)} ⊗ {m.text(x.args[1], FACTOR)}", PRODUCT),
    "contract": Mathematics._contract,
    "concat": lambda m, x: (f"[{m.text(x.args[0])}; {m.text(x.args[1])}]", ATOM),
    "rename": lambda m, x: m._node(x.args[0]),
    "expand": lambda m, x: m._node(x.args[0]),
    "lead": lambda m, x: (f"{m.text(x.args[0], ATOM)}[t+1]", ATOM),
    "follows": lambda m, x: ("1[t<T]", ATOM),
    "flip": lambda m, x: (f"{m.text(x.args[0], ATOM)}ᵀ", ATOM),
    "part": lambda m, x: (f"part{x.attr('index')}({m.text(x.args[0])})", ATOM),
    "readout": Mathematics._readout,
    "solved": lambda m, x: (f"{x.name}[t]", ATOM),
    "suffix": Mathematics._suffix,
    "carry": lambda m, x: (x.name, ATOM),
    "start": _start,
    "end": lambda m, x: (f"e^({_coordinate(x.args[0])}_C−{_coordinate(x.args[0])})", FACTOR),
    "whole": lambda m, x: (f"e^{_coordinate(x.args[0])}_C", FACTOR),
    "col": lambda m, x: (f"{m.text(x.args[0], FACTOR)}ᵀ", FACTOR),
    "pairs": lambda m, x: ("Γ" if x.args else "1", ATOM),
    "gram": _gram,
    "mix": _mix,
    "inter": lambda m, x: (f"{m.text(x.args[0], FACTOR)} {m.text(x.args[1], FACTOR)}", PRODUCT),
}
"""How an op is written, where it is neither an infix sign nor a call."""
