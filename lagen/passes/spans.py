"""Splits the lowered gradient of a log-decay into what crosses a chunk's border and what stays inside, so that nothing cancels.

The gradient at token t is the sum over all pairs (reader i, writer j) that t lies between, i >= t > j. Of the pairs with one token in the
chunk, each side is summed alone; of those with neither, the states at the chunk's two ends give the sum. Of those with both, readers'
and writers' sums are subtracted, which leaves a rounding of float32: both round the same pair weights. Where float32 is all there is,
pairs are taken one by one instead, unless the tokens' vectors decay by themselves.
"""

from __future__ import annotations

from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import Expr
from lagen.passes.chunk import strip


def split_spans(root: Expr) -> Expr:
    """Rewrites the lowered ``spans`` and ``suffix`` nodes of ``root`` over their parts (ir/chunk)."""

    def rule(n: Expr) -> Expr | None:
        if n.op == "spans":
            sums = [x for left, mix in pair_sums(n.args[0], E.ONE) for x in (mix.args[0], mix.args[1], _meeting(left, mix.args[2]))]
            args = (n.args[0], _without(n.args[0], "mix"), *sums)
        elif n.op == "suffix":
            reads, writes = n.args
            rest = _without(writes, "inter", "carry") if n.dims else writes
            args = (split_spans(reads), _without(writes, "mix"), rest)
        else:
            return None
        return Expr(n.op, args, dims=n.dims, head=n.head, token=True, attrs=n.attrs)

    return E.rewrite(root, rule)


def pair_sums(e: Expr, left: Expr) -> list[tuple[Expr, Expr]]:
    """Lists the pair sums of a value that is linear in them, each with what ``left`` and the value make it meet."""
    if e.op == "mix":
        return [(left, e)]
    if not E.reads(e, "mix"):
        return []
    if e.op in ("add", "sub", "neg", "expand"):
        signs = {"add": (E.ONE, E.ONE), "sub": (E.ONE, E.const(-1.0)), "neg": (E.const(-1.0),), "expand": (E.ONE,)}[e.op]
        return [x for a, sign in zip(e.args, signs, strict=True) for x in pair_sums(a, E.mul(sign, left))]
    if e.op == "div" and not E.reads(e.args[1], "mix"):
        return pair_sums(e.args[0], E.div(left, e.args[1]))
    assert e.op in ("mul", "contract"), f"not linear in its pair sums: {e}"
    a, b = sorted(e.args, key=lambda x: bool(E.reads(x, "mix")))
    return pair_sums(b, E.mul(left, a))


def _meeting(left: Expr, far: Expr) -> Expr:
    """Makes what each pair's reader, ``left``, and writer, ``far``, give when they meet."""
    if not far.dims:
        return E.mul(left, Expr("col", (far,), dims=(COL,), token=True)) if far.token else E.mul(left, far)
    number, vector = strip(left)
    return E.mul(Expr("gram", (vector, far), dims=(COL,), token=True), number)


def _without(e: Expr, *ops: str) -> Expr:
    """Leaves out the addends of ``e`` that ``ops`` make, in which it is linear."""
    if e.op in ops:
        return E.ZERO
    if not E.reads(e, *ops):
        return e
    args = tuple(_without(a, *ops) for a in e.args)
    return E.ZERO if e.op not in ("add", "sub") and E.ZERO in args else E.rebuild(e, args)
