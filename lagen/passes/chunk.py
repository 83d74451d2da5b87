"""Lowers readouts to chunks: from token-by-token states to pair weights inside a chunk and a carry between chunks.

One rule serves every readout of every state, forward and reverse (MATH.md section 2): contract X, keep Y,

    O = scale_i exp(c_i) * (r_i S)  +  mix(gram(r, n) * pairs, f)            S' = exp(b_C) S + (n exp(b_C - b))^T f

with the decay's parts on {}, {X} and {Y} each in its place. Numbers that multiply a vector (scale, a step size, a denominator) are
stripped off it and ride on the pair weights and accumulators, so matmul operands stay what was loaded wherever possible.
"""

from __future__ import annotations

from lagen.ir import expr as E
from lagen.ir.chunk import COL, Carry, Term
from lagen.ir.expr import Expr
from lagen.ir.recurrence import State


def strip(e: Expr) -> tuple[Expr, Expr]:
    """Splits an expression into a number per token and a vector whose product it is; a number alone has the vector ONE."""
    if not e.dims:
        return e, E.ONE
    if e.op == "mul":
        (n1, v1), (n2, v2) = strip(e.args[0]), strip(e.args[1])
        return E.mul(n1, n2), E.mul(v1, v2)
    if e.op == "div" and not e.args[1].dims:
        n, v = strip(e.args[0])
        return E.div(n, e.args[1]), v
    if e.op == "neg":
        n, v = strip(e.args[0])
        return E.neg(n), v
    if e.op == "expand":
        n, v = strip(e.args[0])
        return (n, v) if v.dims else (E.ONE, e)
    return E.ONE, e


def _tile(op: str, *args: Expr, dims: tuple[str, ...], **attrs: str) -> Expr:
    return Expr(op, args, dims=tuple(sorted(dims)), head="", token=True, attrs=tuple(sorted(attrs.items())))


def start(g: Expr, prev: bool) -> Expr:
    """Makes exp(b), or exp(b - g) with ``prev``."""
    return _tile("start", g, dims=g.dims, prev=str(int(prev)))


def end(g: Expr) -> Expr:
    """Makes exp(b_C - b)."""
    return _tile("end", g, dims=g.dims)


def whole(g: Expr) -> Expr:
    """Makes exp(b_C)."""
    return Expr("whole", (g,), dims=tuple(sorted(g.dims)))


def sides(state: State, x: str, write_row: Expr, write_col: Expr) -> tuple[Expr, Expr]:
    """Orders a write as (near, far): near stands on ``x``, far on what a readout over ``x`` leaves."""
    row_dim = state.dims[0] if state.dims else ""
    if x == row_dim:
        return write_row, write_col
    if len(state.dims) == 1:  # a vector state read over no dim: the vector is far
        return write_col, write_row
    return write_col, write_row


def lower_readout(node: Expr, state: State, carry: Carry) -> Expr:
    """Lowers one readout to tiles: what the carry holds, and the pairs inside the chunk."""
    x, y = carry.x, carry.y
    on_x, on_y, on_none = _decays(state, x, y)
    at = node.attr("at")
    number, r = strip(node.args[0])
    if at == "all":
        return E.mul(number, _inter(r, carry))
    reverse = state.reverse
    prev = at == "previous"

    def reach(g: Expr) -> Expr:
        return end(g) if reverse else start(g, prev)

    r_in = E.mul(r, reach(on_x)) if on_x else r
    out = E.mul(number, *([reach(on_none)] if on_none else []), _inter(r_in, carry), *([reach(on_y)] if on_y else []))
    for write in state.writes:
        near, far = sides(state, x, write.row, write.col)
        (n_near, v_near), (n_far, v_far) = strip(near), strip(far)
        kind = {
            "inclusive": str(int(at in ("now", "since"))),
            "prev": str(int(prev if not reverse else not write.decayed)),
            "reverse": str(int(reverse)),
        }
        written = E.mul(n_near, n_far)
        weight = E.mul(number, _tile("col", written, dims=(COL,)) if written.token else written)
        if r.dims:
            weight = E.mul(_scores(r, v_near, on_x, kind), weight)
        pairs = _tile("pairs", *([on_none] if on_none else []), dims=(COL,), **kind)
        out = E.add(out, _tile("mix", weight, pairs, v_far, *([on_y] if on_y else []), dims=v_far.dims, **(kind if on_y else {})))
    return out


def _scores(r: Expr, near: Expr, gate: Expr | None, kind: dict[str, str]) -> Expr:
    """Makes the pair scores r n^T; under a gate those of the later token's side, flipped where a reverse sweep reads them."""
    if gate is None:
        return _tile("gram", r, near, dims=(COL,))
    attrs = {"prev": kind["prev"], "inclusive": str(1 - int(kind["prev"])), "reverse": "0"}
    if kind["reverse"] == "0":
        return _tile("gram", r, near, gate, dims=(COL,), **attrs)
    return _tile("flip", _tile("gram", near, r, gate, dims=(COL,), **attrs), dims=(COL,))


def _inter(r: Expr, carry: Carry) -> Expr:
    if not carry.x and not carry.y:
        return E.mul(r, carry.value)
    dims = tuple(d for d in (carry.y,) if d)
    return Expr("inter", (r, carry.value), dims=dims, token=True)


def _decays(state: State, x: str, y: str) -> tuple[Expr | None, Expr | None, Expr | None]:
    """Returns the state's log-decays on the contracted dim, on the kept one, and on none."""
    return (state.decay_on(x) if x else None, state.decay_on(y) if y else None, state.decay_on())


def carry_of(state: State, x: str, updated: bool = True) -> Carry:
    """Makes the carry of ``state`` for readouts over ``x``; numbers and scalar decays go to the far side, which a sweep tiles."""
    rest = [d for d in state.dims if d != x]
    y = rest[0] if rest else ""
    on_x, on_y, on_none = _decays(state, x, y)
    terms = []
    for write in state.writes:
        near, far = sides(state, x, write.row, write.col)
        (n_near, v_near), (n_far, v_far) = strip(near), strip(far)

        def reach(g: Expr, write_decayed: bool = write.decayed) -> Expr:
            return start(g, not write_decayed) if state.reverse else end(g)

        v_near = E.mul(v_near, reach(on_x)) if on_x else v_near
        v_far = E.mul(v_far, reach(on_y)) if on_y else v_far
        number = E.mul(n_near, n_far, *([reach(on_none)] if on_none else []))
        terms.append(Term(v_near, E.mul(v_far, number)))
    factors = tuple(whole(g) for g in state.decay)
    return Carry(state.name, x, y, state.reverse, factors, tuple(terms) if updated else (), updated)
