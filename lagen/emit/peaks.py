"""Prints a peak's scan over the tokens of a chunk, what it leaves to the next chunk, and the maxima before each token."""

from __future__ import annotations

from lagen.emit.statements import Statements, Tile
from lagen.ir.chunk import ROW, Carry
from lagen.ir.expr import Expr
from lagen.ir.plan import Buffer


def peak_tile(out: Statements, n: Expr) -> Tile:
    """This function prints max(m + a, b) at every token of the chunk: an associative scan, then the carry."""
    shift, write, carry = n.args
    held = out.tile(carry)
    axes = (ROW, *held.axes)
    mask = out.mask(axes)
    a = out.let("b_a", f"tl.where({mask}, {out.spread(out.wide(shift), axes)}, 0.0)", axes)
    b = out.let("b_b", f"tl.where({mask}, {out.spread(out.wide(write), axes)}, float('-inf'))", axes)
    out.prelude.add("lg_peak")
    x, m = out.fresh("b_x"), out.fresh("b_y")
    out.lines.append(f"{x}, {m} = tl.associative_scan(({a.text}, {b.text}), 0, lg_peak)")
    return out.let(f"{held.text}_t", f"tl.maximum({out.spread(held, axes)} + {x}, {m})", axes)


def next_peak(out: Statements, carry: Carry) -> str:
    """This function prints the maximum after the chunk's last token, and names it."""
    assert carry.peak is not None, carry
    tile = out.tile(carry.peak)
    last = out.spread(Tile("(o_t == tl.minimum(i_c * BT + BT, m_end) - 1)", (ROW,)), tile.axes)
    return out.let(f"b_{carry.state}_n", f"tl.sum(tl.where({last}, {tile.text}, 0.0), axis=0)", tile.axes[1:]).text


def store_before(out: Statements, b: Buffer, now: Tile, held: Tile) -> list[str]:
    """This function prints the store of the maxima before each token: those of the rows above, and the carry at the first."""
    lanes = out.mask(held.axes)
    row = out.spread(Tile("(o_t + 1)", (ROW,)), now.axes)
    place = f" + {out.spread(Tile(f'o_{b.dims[0].lower()}', b.dims), now.axes)}" if b.dims else ""
    inside = out.spread(Tile("(o_t + 1 < m_end)", (ROW,)), now.axes) + (f" & {out.mask(now.axes[1:] and now.axes)}" if b.dims else "")
    first = f"p_{b.name}" + (f" + o_{b.dims[0].lower()}" if b.dims else "")
    return [
        f"tl.store(p_{b.name} + ({row} * {b.name}_st{place}), {now.text}, mask={inside})",
        "if i == 0:",
        f"    tl.store({first}, {held.text}" + (f", mask={lanes})" if lanes else ")"),
    ]
