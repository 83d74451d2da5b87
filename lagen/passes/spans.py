"""Splits the lowered gradient of a log-decay into what crosses a chunk's border and what stays inside, so that nothing cancels.

The gradient at token t is the sum over all pairs (reader i, writer j) that t lies between, i >= t > j. Of the pairs with one token in the
chunk, each side is summed alone; of those with neither, the states at the chunk's two ends give the sum. Of those with both, readers'
and writers' sums are subtracted, which leaves a rounding of float32: both round the same pair weights. Where float32 is all there is,
pairs are taken one by one instead, unless the tokens' vectors decay by themselves.

Under a decay of the tokens' vectors the launch that makes the pair sums has both sides in its registers (passes/whole_decay). ``tails`` has
it subtract them there and add up what is left to the chunk's end: rounded before, as they cross memory, the two sides would not cancel, and
every token before would have the difference. So it is with what a forward sweep gives the readers: it is added up before it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import Expr, walk
from lagen.ir.plan import Kernel, Store
from lagen.passes.chunk import strip
from lagen.passes.pair_sums import by_table, decay_of


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


def tails(sweeps: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Rewrites the suffix sums of vectors: what readers give, by its tail, and the pairs inside the chunk, by theirs, stand apart."""
    made = {s.buffer.leaf: s.value for k in sweeps for s in k.stores}
    kept: dict[Expr, Expr] = {}  # what an earlier sweep stores of what it gives the readers

    def rule(n: Expr) -> Expr | None:
        if n.op != "suffix" or not n.dims:
            return None
        reads, writes, inside = n.args
        given = made.get(reads, reads)
        sums = [*pair_sums(given, E.ONE), *pair_sums(E.neg(inside), E.ONE)]
        if not E.reads(given, "mix") or _without(inside, "mix") != E.ZERO or decay_of([mix for _, mix in sums]) is None:
            return replace(n, args=(tail(E.sub(reads, inside)), writes), _hash=0)
        found = [tail(_without(given, "mix")), *(tail(E.add(*(E.mul(left, mix) for left, mix in table))) for table in by_table(sums))]
        if reads not in made:
            return replace(n, args=(E.add(*found), writes), _hash=0)
        # what reads nothing that this pass's sweeps store goes along with what an earlier one stores
        early = [t for t in found if made.keys().isdisjoint(walk(t)) or t is found[0]]
        kept[reads] = E.add(*early)
        return replace(n, args=(E.add(reads, *(t for t in found if t not in early)), writes), _hash=0)

    out = [k.map(lambda e: E.rewrite(e, rule)) for k in sweeps]

    def store(s: Store) -> Store:
        return Store(replace(s.buffer, dtype="input"), kept[s.buffer.leaf]) if s.buffer.leaf in kept else s

    return tuple(replace(k, stores=tuple(map(store, k.stores))) for k in out)


def tail(x: Expr) -> Expr:
    """Makes the sum of ``x`` over a chunk's tokens from each one on."""
    return Expr("tail", (x,), dims=x.dims, token=True)


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
