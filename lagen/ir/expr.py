"""Expressions: the closed language of token-wise values and of linear recurrences, typed by named dims.

What it is: immutable, hash-consed-by-value trees. A value belongs to one batch element and one head; it may have one row per
token (``token``), and it spans a set of named dims (``dims``: at most two; never the head dim, which is ``head``).
What it is not: it has no chunks, no tiles, no memory and no text. Who makes it: spec/ (from a file) and passes/ (by algebra).
Who reads it: verify/oracle (token by token), passes/, emit/.

Every node is made by ``make`` (or the verbs below it), which applies the typing rule of the op and raises ExprTypeError in the
user's words. Ops live in the table OPS; element-wise functions live in ir/scalar.py with everything that is known about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lagen.ir.scalar import FUNCTIONS

HEADS = ("", "H", "HV")
"""Head dims in order of width: an expression is on the widest of its operands'."""


LEAVES = ("input", "param", "stored")
"""Ops that are loaded from a tensor."""


class ExprTypeError(Exception):
    """Says, in the user's words, why an expression has no type."""


@dataclass(frozen=True, eq=False)
class Expr:
    """One value. Equal when built alike; its hash is kept, so comparing shared trees is cheap."""

    op: str
    args: tuple[Expr, ...] = ()
    name: str = ""  # of a leaf: input, param, state, readout
    value: float = 0.0  # of const and pow (the exponent), eps of l2norm and rmsnorm
    dims: tuple[str, ...] = ()  # sorted; order of storage is the Tensor's or the State's affair
    head: str = ""
    token: bool = False
    attrs: tuple[tuple[str, str], ...] = ()
    _hash: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        own = (self.op, self.name, self.value, self.dims, self.head, self.token, self.attrs)
        object.__setattr__(self, "_hash", hash((own, tuple(a._hash for a in self.args))))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expr) or self._hash != other._hash:
            return False
        return (self.op, self.name, self.value, self.dims, self.head, self.token, self.attrs) == (
            other.op,
            other.name,
            other.value,
            other.dims,
            other.head,
            other.token,
            other.attrs,
        ) and self.args == other.args

    def attr(self, key: str) -> str:
        """Returns the attribute ``key``; raises KeyError when the op carries none of that name."""
        return dict(self.attrs)[key]

    def __str__(self) -> str:
        return show(self)


# ---- typing rules ---------------------------------------------------------------------------------------------------------------


def _head(args: Iterable[Expr]) -> str:
    return max((a.head for a in args), key=HEADS.index, default="")


def _token(args: Iterable[Expr]) -> bool:
    return any(a.token for a in args)


def _set(dims: Iterable[str]) -> str:
    return "{" + ", ".join(sorted(dims)) + "}"


def _broadcast(op: str, args: tuple[Expr, ...]) -> tuple[str, ...]:
    widest = max((a.dims for a in args), key=len, default=())
    for a in args:
        if not set(a.dims) <= set(widest):
            raise ExprTypeError(
                f"'{op}' meets dims {_set(a.dims)} and {_set(widest)}: element-wise, one operand's dims must contain the other's; "
                "write outer(a, b) for a matrix or a @ b to contract a dim they share"
            )
    return widest


def _row(op: str, x: Expr) -> str:
    if len(x.dims) != 1:
        raise ExprTypeError(f"'{op}' acts on a token's own vector, but its argument has dims {_set(x.dims)}")
    return x.dims[0]


def _outer(a: Expr, b: Expr) -> tuple[str, ...]:
    if len(a.dims) != 1 or len(b.dims) != 1:
        raise ExprTypeError(f"outer(a, b) takes two vectors, got dims {_set(a.dims)} and {_set(b.dims)}")
    if a.dims == b.dims:
        raise ExprTypeError(f"outer(a, b) takes vectors of different dims, both have {_set(a.dims)}; name one side differently")
    return tuple(sorted(a.dims + b.dims))


def _contract(a: Expr, b: Expr) -> tuple[tuple[str, ...], str]:
    shared = set(a.dims) & set(b.dims)
    if len(shared) != 1:
        raise ExprTypeError(
            f"'@' contracts the one dim that its sides share; {_set(a.dims)} and {_set(b.dims)} share {len(shared) or 'none'}"
        )
    dims = tuple(sorted((set(a.dims) | set(b.dims)) - shared))
    if len(dims) > 1:
        raise ExprTypeError(f"'@' between two matrices is out of reach: {_set(a.dims)} @ {_set(b.dims)}")
    return dims, shared.pop()


# ---- makers ---------------------------------------------------------------------------------------------------------------------


def const(value: float) -> Expr:
    """Makes a number."""
    return Expr("const", value=float(value))


ZERO, ONE = const(0.0), const(1.0)


def size(dim: str) -> Expr:
    """Makes the size of a dim, as in ``K ** -0.5``."""
    return Expr("size", name=dim)


def scale() -> Expr:
    """Makes the operator's keyword argument ``scale``."""
    return Expr("scale")


def leaf(op: str, name: str, dims: Iterable[str], head: str = "", token: bool = False) -> Expr:
    """Makes a named tensor: op is input (token), param, past (S[t-1]), now (S[t])."""
    return Expr(op, name=name, dims=tuple(sorted(dims)), head=head, token=token)


def call(name: str, *args: Expr) -> Expr:
    """Makes an element-wise function of ir/scalar.py, broadcasting by dims; raises ExprTypeError."""
    if name not in FUNCTIONS:
        raise KeyError(f"no element-wise function named {name!r}")
    return Expr(name, args, dims=_broadcast(name, args), head=_head(args), token=_token(args))


def add(*args: Expr) -> Expr:
    """Adds; drops zeros that do not widen the result."""
    if not args:
        return ZERO
    total = args[0]
    for x in args[1:]:
        if x == ZERO:
            continue
        total = x if total == ZERO else call("add", total, x)
    return total


def neg(x: Expr) -> Expr:
    """Negates; folds constants and double signs."""
    if x.op == "const":
        return const(-x.value)
    return x.args[0] if x.op == "neg" else call("neg", x)


def sub(a: Expr, b: Expr) -> Expr:
    """Subtracts; drops zeros."""
    if b == ZERO:
        return a
    return neg(b) if a == ZERO else call("sub", a, b)


def mul(*args: Expr) -> Expr:
    """Multiplies; drops ones, absorbs zeros, pulls signs out."""
    out = ONE
    for x in args:
        if ZERO in (out, x):
            return ZERO
        if out.op == "const" and x.op == "const":
            out = const(out.value * x.value)
        elif out == ONE:
            out = x
        elif x == ONE:
            pass
        elif x == const(-1.0):
            out = neg(out)
        elif out == const(-1.0):
            out = neg(x)
        elif x.op == "neg":
            out = neg(mul(out, x.args[0]))
        elif out.op == "neg":
            out = neg(mul(out.args[0], x))
        else:
            out = call("mul", out, x)
    return out


def div(a: Expr, b: Expr) -> Expr:
    """Divides; drops a denominator of one."""
    if b == ONE:
        return a
    return ZERO if a == ZERO else call("div", a, b)


def power(x: Expr, exponent: float) -> Expr:
    """Raises to a constant exponent."""
    if exponent == 1.0:
        return x
    return Expr("pow", (x,), value=float(exponent), dims=x.dims, head=x.head, token=x.token)


def outer(a: Expr, b: Expr) -> Expr:
    """Makes the matrix a_i b_j; raises ExprTypeError. The first operand's dim comes first in a state's layout."""
    return Expr("outer", (a, b), dims=_outer(a, b), head=_head((a, b)), token=_token((a, b)))


def contract(a: Expr, b: Expr) -> Expr:
    """Makes a @ b: the sum over the one dim that both share; raises ExprTypeError."""
    dims, dim = _contract(a, b)
    return Expr("contract", (a, b), dims=dims, head=_head((a, b)), token=_token((a, b)), attrs=(("dim", dim),))


def reduce(op: str, x: Expr) -> Expr:
    """Makes sum, mean or rowmax over a token's own vector; raises ExprTypeError."""
    assert op in ("sum", "mean", "rowmax"), op
    _row(op, x)
    return Expr(op, (x,), head=x.head, token=x.token, attrs=(("dim", x.dims[0]),))


def sum_over(x: Expr, dim: str) -> Expr:
    """Makes the sum over one dim of a vector or a matrix."""
    return Expr("sum", (x,), dims=tuple(d for d in x.dims if d != dim), head=x.head, token=x.token, attrs=(("dim", dim),))


def row(op: str, x: Expr, eps: float = 0.0) -> Expr:
    """Makes softmax, l2norm or rmsnorm of a token's own vector; raises ExprTypeError."""
    assert op in ("softmax", "l2norm", "rmsnorm"), op
    dim = _row(op, x)
    return Expr(op, (x,), value=eps, dims=x.dims, head=x.head, token=x.token, attrs=(("dim", dim),))


def concat(a: Expr, b: Expr, dim: str) -> Expr:
    """Makes [a, b] on the new dim ``dim``, whose size is the sum of theirs; raises ExprTypeError."""
    _row("concat", a), _row("concat", b)
    return Expr("concat", (a, b), dims=(dim,), head=_head((a, b)), token=_token((a, b)), attrs=(("dim", dim),))


def resize(op: str, x: Expr, dim: str) -> Expr:
    """Makes taylor2(x) (size 1 + K + K(K+1)/2), quad(x) (K(K+1)/2) or rename(x) (same size) on the new dim ``dim``."""
    assert op in ("taylor2", "quad", "rename"), op
    _row(op, x)
    return Expr(op, (x,), dims=(dim,), head=x.head, token=x.token, attrs=(("dim", dim),))


def expand(x: Expr, dims: tuple[str, ...]) -> Expr:
    """Repeats ``x`` over the dims it lacks; no text comes of it but where it is stored."""
    return x if x.dims == dims else Expr("expand", (x,), dims=dims, head=x.head, token=x.token)


def lead(x: Expr) -> Expr:
    """Makes the value of the token after: x_{t+1}, and x_T at the last token, which FOLLOWS takes out."""
    return Expr("lead", (x,), dims=x.dims, head=x.head, token=True) if x.token else x


FOLLOWS = Expr("follows", token=True)
"""1 where a token follows, 0 at the last one."""


def part(x: Expr, index: int, dims: tuple[str, ...], like: tuple[Expr, Expr]) -> Expr:
    """Takes operand ``index`` of concat(*like) back out of its result ``x``; it has ``dims``."""
    return Expr("part", (x, *like), dims=dims, head=x.head, token=x.token, attrs=(("index", str(index)),))


def unsize(op: str, d: Expr, x: Expr) -> Expr:
    """Makes the adjoint of taylor2 or quad at ``x`` for the cotangent ``d``."""
    return Expr(f"un{op}", (d, x), dims=x.dims, head=_head((d, x)), token=_token((d, x)), attrs=(("dim", d.dims[0]),))


# ---- walking --------------------------------------------------------------------------------------------------------------------


def walk(*roots: Expr) -> Iterator[Expr]:
    """Yields every distinct node below ``roots``, operands before users."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """Makes ``node`` again over other operands, retyped."""
    if args == node.args:
        return node
    if node.op in FUNCTIONS:
        table: dict[str, Callable[..., Expr]] = {"add": add, "mul": mul, "sub": sub, "div": div, "neg": neg}
        return table[node.op](*args) if node.op in table else call(node.op, *args)
    if node.op == "pow":
        return power(args[0], node.value)
    if node.op == "outer":
        return outer(*args)
    if node.op == "contract":
        return contract(*args)
    if node.op in ("sum", "mean", "rowmax"):
        return reduce(node.op, args[0]) if not node.dims else sum_over(args[0], node.attr("dim"))
    if node.op in ("softmax", "l2norm", "rmsnorm"):
        return row(node.op, args[0], node.value)
    if node.op == "concat":
        return concat(args[0], args[1], node.attr("dim"))
    if node.op in ("taylor2", "quad", "rename"):
        return resize(node.op, args[0], node.attr("dim"))
    return Expr(node.op, args, node.name, node.value, node.dims, _head((*args, node)), _token((*args, node)), node.attrs)


def substitute(root: Expr, table: dict[Expr, Expr]) -> Expr:
    """Replaces nodes of ``root`` by ``table``, top-most first match, and retypes what stands above."""
    return rewrite(root, lambda node: table.get(node))


def rewrite(root: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Rewrites ``root`` bottom-up-with-memo: where ``rule`` returns a value it replaces the node, else its operands are visited."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            new = rule(node)
            memo[node] = new if new is not None else rebuild(node, tuple(visit(a) for a in node.args))
        return memo[node]

    return visit(root)


def addends(e: Expr) -> list[Expr]:
    """Lists the terms of a sum, signs included."""
    if e.op == "add":
        return addends(e.args[0]) + addends(e.args[1])
    if e.op == "sub":
        return addends(e.args[0]) + [neg(t) for t in addends(e.args[1])]
    if e.op == "neg" and e.args[0].op in ("add", "sub"):
        return [neg(t) for t in addends(e.args[0])]
    return [e]


def factors(e: Expr) -> list[Expr]:
    """Lists the factors of a product, -1 for a sign."""
    if e.op == "neg":
        return [const(-1.0), *factors(e.args[0])]
    return [f for a in e.args for f in factors(a)] if e.op == "mul" else [e]


def reads(root: Expr, *ops: str) -> tuple[Expr, ...]:
    """Returns the distinct nodes below ``root`` whose op is one of ``ops``, in operand order."""
    return tuple(n for n in walk(root) if n.op in ops)


# ---- printing -------------------------------------------------------------------------------------------------------------------

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_INFIX |= {"lt": ("<", 0), "le": ("<=", 0), "gt": (">", 0), "ge": (">=", 0), "eq": ("==", 0), "ne": ("!=", 0)}


_MOMENTS = {"now": "t", "previous": "t-1"}


def number(value: float) -> str:
    """Prints a number without a needless fraction."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def show(e: Expr, names: dict[Expr, str] | None = None) -> str:
    """Prints an expression in the spec language (chunk-level ops as calls); ``names`` gives sub-expressions a name."""
    names = names or {}

    def text(x: Expr, level: int) -> str:
        if x in names:
            return names[x]
        if x.op == "const":
            return number(x.value)
        if x.op == "size":
            return x.name
        if x.op == "scale":
            return "scale"
        if x.op == "past":
            return f"{x.name}[t-1]"
        if x.op == "now":
            return f"{x.name}[t]"
        if x.op == "readout" and x.args[0] == ONE and x.attr("at") in _MOMENTS:
            return f"{x.name}[{_MOMENTS[x.attr('at')]}]"
        if x.op in _INFIX:
            sign, prec = _INFIX[x.op]
            body = f"{text(x.args[0], prec)} {sign} {text(x.args[1], prec + 1)}"
            return f"({body})" if prec < level else body
        if x.op == "neg":
            return f"(-{text(x.args[0], 3)})" if level > 1 else f"-{text(x.args[0], 3)}"
        if x.op == "pow":
            body = f"{text(x.args[0], 4)} ** {number(x.value)}"
            return f"({body})" if level > 3 else body
        if x.op == "contract":
            body = f"{text(x.args[0], 3)} @ {text(x.args[1], 3)}"
            return f"({body})" if level > 1 else body
        if not x.args:
            return x.name or x.op
        inner = ", ".join(text(a, 0) for a in x.args)
        extra = "".join(f", {k}={v}" for k, v in x.attrs if x.op not in ("sum", "mean", "rowmax", "softmax", "l2norm", "rmsnorm"))
        label = {"rowmax": "max"}.get(x.op, x.op) + (f"[{x.name}]" if x.name else "")
        return f"{label}({inner}{extra})"

    return text(e, 0)
