"""Turns pair weights: where a kernel reads both directions, what a later token reads of an earlier one is what the earlier one gives it.

The weights of a reverse readout are those of a forward one with rows and columns exchanged, but for numbers of the reader, which go to
the vectors that it mixes. So one table of scores and decays serves both, transposed on its way into the second matmul.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import Expr, walk
from lagen.ir.plan import Kernel


def turn(kernel: Kernel) -> Kernel:
    """Rewrites the reverse pair sums of ``kernel`` over the weights of its forward ones, where those are the same pairs."""
    mixes = [n for n in dict.fromkeys(walk(*kernel.values)) if n.op == "mix" and len(n.args) == 3 and n.args[1].op == "pairs"]
    ahead = {n: _bare(n) for n in mixes if n.args[1].attr("reverse") == "0" and n.args[2].dims}
    table: dict[Expr, Expr] = {}
    for n in mixes:
        weights, pairs, far = n.args
        if pairs.attr("reverse") == "0" or not far.dims:
            continue
        met = replace(pairs, attrs=tuple((k, "0" if k == "reverse" else v) for k, v in pairs.attrs), _hash=0)
        turned = Counter(f for a in E.factors(weights) for f in E.factors(_turned(a)))
        for m, bare in ahead.items():
            known = Counter(E.factors(bare.args[0]))
            if bare.args[1] == met and known <= turned and _numbers(turned - known):
                flipped = Expr("flip", (Expr("weigh", bare.args[:2], dims=(COL,), token=True),), dims=(COL,), token=True)
                table[n] = replace(n, args=(flipped, E.ONE, E.mul(*(turned - known).elements(), far)), _hash=0)
                table[m] = bare
                break
    return kernel.map(lambda e: E.substitute(e, table))


def _bare(n: Expr) -> Expr:
    """Moves the numbers of writers from the weights of a pair sum to the vectors that it mixes."""
    factors = E.factors(n.args[0])
    columns = [f.args[0] for f in factors if f.op == "col"]
    return replace(n, args=(E.mul(*(f for f in factors if f.op != "col")), n.args[1], E.mul(*columns, n.args[2])), _hash=0)


def _turned(factor: Expr) -> Expr:
    """Exchanges rows and columns of a factor of pair weights."""
    if factor.op == "gram" and len(factor.args) == 2:
        return replace(factor, args=factor.args[::-1], _hash=0)
    if factor.op == "col":
        return factor.args[0]
    return Expr("col", (factor,), dims=(COL,), token=True) if factor.token and not factor.dims else factor


def _numbers(rest: Counter[Expr]) -> bool:
    """Tells whether what is left are numbers of a row."""
    return all(not f.dims for f in rest)
