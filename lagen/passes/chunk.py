"""Lowers readouts to chunks: from token-by-token states to pair weights inside a chunk and a carry between chunks.

One rule serves every readout of every state, forward and reverse (MATH.md section 2): contract X, keep Y,

    O = scale_i exp(c_i) * (r_i S)  +  mix(gram(r, n) * pairs, f)            S' = exp(b_C) S + (n exp(b_C - b))^T f

with the decay's parts on {}, {X} and {Y} each in its place. Numbers that multiply a vector (scale, a step size, a denominator) are
stripped off it and ride on the pair weights and accumulators, so matmul operands stay what was loaded wherever possible.
"""

from __future__ import annotations

from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.chunk import COL, Carry, Term
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Solve, State


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


def lower_readout(node: Expr, state: State, carry: Carry, without: frozenset[Expr] = frozenset()) -> Expr:
    """Lowers one readout to tiles: what the carry holds, and the pairs inside the chunk; ``without`` are writes that do not count."""
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
        if far in without:
            continue
        kind = {
            "inclusive": str(int(at in ("now", "since"))),
            "prev": str(int(prev if not reverse else not write.decayed)),
            "reverse": str(int(reverse)),
        }
        n_far, v_far = strip(far)
        weight, pairs = _weights(node.args[0], near, n_far, on_x, on_none, kind)
        out = E.add(out, _tile("mix", weight, pairs, v_far, *([on_y] if on_y else []), dims=v_far.dims, **(kind if on_y else {})))
    return out


def _weights(vector: Expr, near: Expr, far: Expr, on_x: Expr | None, on_none: Expr | None, kind: dict[str, str]) -> tuple[Expr, Expr]:
    """Makes what tokens with ``vector`` read of writes along ``near`` with the number ``far``: weights, and the pairs that count."""
    (number, r), (n_near, v_near) = strip(vector), strip(near)
    written = E.mul(n_near, far)
    weight = E.mul(number, _tile("col", written, dims=(COL,)) if written.token else written)
    if r.dims:
        weight = E.mul(_scores(r, v_near, on_x, kind), weight)
    return weight, _tile("pairs", *([on_none] if on_none else []), dims=(COL,), **kind)


def lower_solve(leaf: Expr, state: State, carry: Carry) -> Expr:
    """Lowers a solved value: (I - A)^-1, of what tokens read of each other's solved values, times what else there is.

    A decay on the dim that is kept stands between tokens and telescopes along every path of A, so that the inverse is taken without it.
    """
    on_y = _decays(state, carry.x, carry.y)[1]
    kind = {"prev": "0", "inclusive": "1", "reverse": str(int(state.reverse))}
    leaves = [u.leaf for u in state.solves]
    known = [_known(u, state, carry, frozenset(leaves)) for u in state.solves]
    inverse = inverses(state, carry.x)[leaves.index(leaf)]
    parts = [
        _tile("mix", t, E.ONE, x, *([on_y] if on_y else []), dims=leaf.dims, **(kind if on_y else {}))
        for t, x in zip(inverse, known, strict=True)
        if t != E.ZERO
    ]
    return E.add(*parts)


def _known(u: Solve, state: State, carry: Carry, solved: frozenset[Expr]) -> Expr:
    """Lowers what a value is solved from; the token's own writes, where the base holds them all, are read along with the later ones."""
    terms = E.addends(u.base)
    reads = []
    for r in u.reads:
        writes = tuple(w for w in state.writes if w.row not in solved and w.col not in solved)
        own = [E.mul(_pair(near, r.args[0]), far) for near, far in (sides(state, carry.x, w.row, w.col) for w in writes)]
        if own and r.attr("at") == "later" and all(w.decayed for w in writes) and all(o in terms for o in own):
            for o in own:
                terms.remove(o)
            since = tuple((k, "since" if k == "at" else v) for k, v in r.attrs)
            r = replace(r, attrs=since, _hash=0)
        reads.append(lower_readout(r, state, carry, solved))
    return E.add(*terms, *reads)


def _pair(a: Expr, b: Expr) -> Expr:
    return E.contract(a, b) if a.dims and a.dims == b.dims else E.mul(a, b)


def inverses(state: State, x: str) -> list[list[Expr]]:
    """Makes the blocks of (I - A)^-1 for what ``state`` solves over ``x``: each token sees the solved values of those before it.

    A reverse state's system is its forward state's transposed, so that one inverse serves both.
    """
    rows = state.solves[::-1] if state.reverse else state.solves
    on_x, _, on_none = _decays(state, x, "")
    readers: list[list[tuple[Expr, str]]] = []
    writers: list[Expr] = []
    for u in rows:
        found = [(sides(state, x, w.row, w.col)[0], w.decayed) for w in state.writes if u.leaf in (w.row, w.col)]
        if state.reverse:
            writers.append(u.reads[0].args[0])
            readers.append([(near, "0" if decayed else "1") for near, decayed in found])
        else:
            writers.append(found[0][0])
            readers.append([(r.args[0], str(int(r.attr("at") == "previous"))) for r in u.reads])
    blocks = [
        [
            E.add(
                *(
                    _tile("weigh", *_weights(r, w, E.ONE, on_x, on_none, {"inclusive": "0", "prev": prev, "reverse": "0"}), dims=(COL,))
                    for r, prev in reads
                )
            )
            for w in writers
        ]
        for reads in readers
    ]
    inverse = _inverted(blocks)
    if not state.reverse:
        return inverse
    n = len(inverse)
    return [[_flip(inverse[n - 1 - j][n - 1 - i]) for j in range(n)] for i in range(n)]


def _flip(t: Expr) -> Expr:
    return t if t == E.ZERO else _tile("flip", t, dims=(COL,))


def _inverted(blocks: list[list[Expr]]) -> list[list[Expr]]:
    """Inverts I - A block by block, every block of A being strictly lower: I - A = L U by elimination, then U^-1 L^-1."""
    n = len(blocks)
    a = [list(row) for row in blocks]
    diagonal: list[Expr] = []
    below: dict[tuple[int, int], Expr] = {}
    for k in range(n):
        diagonal.append(_tile("inverse", a[k][k], dims=(COL,)))
        for i in range(k + 1, n):
            below[i, k] = _compose(a[i][k], diagonal[k])
            for j in range(k + 1, n):
                a[i][j] = E.add(a[i][j], _compose(below[i, k], a[k][j]))
    out = [[E.ZERO] * n for _ in range(n)]
    for c in range(n):
        left = [E.ONE if i == c else E.ZERO for i in range(n)]  # column c of L^-1; ONE is the identity
        for i in range(c + 1, n):
            left[i] = E.add(*(_compose(below[i, k], left[k]) for k in range(c, i)))
        for i in reversed(range(n)):
            rest = E.add(*(_compose(a[i][j], out[j][c]) for j in range(i + 1, n)))
            # P (I + rest) = P + P rest
            own = _compose(diagonal[i], left[i])
            out[i][c] = E.add(own, _compose(diagonal[i], rest))
    return out


def _compose(p: Expr, q: Expr) -> Expr:
    """Makes P Q of pair weights, of which ONE is the identity."""
    if E.ZERO in (p, q):
        return E.ZERO
    return q if p == E.ONE else p if q == E.ONE else _tile("compose", p, q, dims=(COL,))


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
    return Carry(state.name, x, y, state.reverse, factors, _by_vector(terms) if updated else (), updated)


def _by_vector(terms: list[Term]) -> tuple[Term, ...]:
    """Adds up what is written along one vector; a sum of vectors that are written along anyway is taken apart, numbers going far."""
    found: dict[Expr, list[Expr]] = {}
    for t in terms:
        for n, v in map(strip, E.addends(t.near)):
            found.setdefault(v, []).append(E.mul(t.far, n))
    if len(found) > len(terms) or all(t.near.op not in ("add", "sub") for t in terms):
        return tuple(terms)
    return tuple(Term(v, E.add(*far)) for v, far in found.items())


def merge(e: Expr) -> Expr:
    """Adds pair weights that meet the same pairs and vector before they meet it: one matmul where there were two."""

    def rule(n: Expr) -> Expr | None:
        if n.op not in ("add", "sub"):
            return None
        groups: dict[object, list[Expr]] = {}
        for t in E.addends(n):
            groups.setdefault((t.args[1:], t.attrs) if t.op == "mix" else t, []).append(t)
        if not any(len(g) > 1 for g in groups.values()):
            return None
        out = []
        for g in groups.values():
            if len(g) > 1 and g[0].op == "mix":
                weights = E.add(*(t.args[0] for t in g))
                out.append(Expr("mix", (weights, *g[0].args[1:]), dims=g[0].dims, token=True, attrs=g[0].attrs))
            else:
                out.extend(g)
        return E.add(*out)

    return E.rewrite(e, rule)
