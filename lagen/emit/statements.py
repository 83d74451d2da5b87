"""Prints values of a kernel as Triton statements, in the order they are asked for (a load comes just before its first use).

Tiles have named axes: C (the chunk's tokens), D (the same tokens as columns), and the dims of the spec. Broadcasting is computed from
the axes, masks from what an expression makes of zeros. The printer is closed: an op it does not know raises and names itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lagen.ir import expr as E
from lagen.ir.chunk import COL, ROW
from lagen.ir.expr import Expr, walk
from lagen.ir.scalar import FUNCTIONS

_INLINE = 72
"""Longest element-wise expression, in characters, that stands inside another."""


@dataclass(frozen=True)
class Tile:
    """A printed value: its text and the axes of the tile it denotes; ``raw`` as loaded, in the tensor's own dtype."""

    text: str
    axes: tuple[str, ...]
    raw: bool = False


def zero_preserving(n: Expr) -> bool:
    """Tells whether a value is surely 0 on padding rows and lanes, given that loads are."""
    if n.op in ("input", "stored", "above", "lead", "follows", "diag"):
        return n.token
    if n.op in ("tail", "between"):  # what is added up, or multiplied, is guarded
        return True
    if n.op == "const":
        return n.value == 0.0
    if n.op == "mul":
        return any(zero_preserving(a) and a.dims == n.dims for a in n.args) and all(finite(a) for a in n.args)
    if n.op == "contract" and not n.dims:  # it is printed with zeros in place of one side's padding
        return n.args[0 if zero_preserving(n.args[0]) else 1].token
    if n.op in ("inter", "gram"):  # a row of zeros reads and scores nothing; a carry's lanes are 0 where they are padding
        return bool(n.args[0].dims) and zero_preserving(n.args[0])
    if n.op == "flip":  # columns of padding were scored by rows of zeros
        return n.args[0].op in ("stored", "above") or any(x.op == "gram" and zero_preserving(x.args[1]) for x in _product(n.args[0]))
    if n.op == "mix":  # what is added up is guarded
        return bool(n.dims) and n.args[0].dims == (COL,) and zero_preserving(n.args[0])
    if n.op in FUNCTIONS and FUNCTIONS[n.op].zero and n.op != "div":
        return all(zero_preserving(a) and a.dims == n.dims for a in n.args)
    return False


def _product(weights: Expr) -> list[Expr]:
    """Lists the factors of weighed pair scores."""
    return [x for a in weights.args for x in _product(a)] if weights.op in ("weigh", "mul") else [weights]


def finite(n: Expr) -> bool:
    """Tells whether a value stays finite where its operands are padding."""
    return not any(x.op in ("div", "log", "rsqrt", "contract", "sum") or (x.op == "pow" and x.value < 0) for x in walk(n))


class Statements:
    """The statements of one kernel body so far, and the tile of every value already printed."""

    def __init__(
        self,
        names: Iterable[tuple[str, Expr]],
        roots: Iterable[Expr],
        rows: bool = True,
        rows_end: str = "m_end",
        chunked: bool = False,
    ) -> None:
        self.lines: list[str] = []
        self.tiles: dict[Expr, Tile] = {}
        self.exact: frozenset[str] = frozenset()  # tensors that hold float32 whatever the inputs do
        self.chunked = chunked  # whether a program goes from chunk to chunk
        self.storage: dict[str, tuple[str, ...]] = {}  # of tensors with two dims: the order that they are stored in
        self.rows = rows  # whether tiles have a token axis (the step kernel has none)
        self.rows_end = rows_end  # the row behind the sequence's last token
        self.used: set[str] = set()
        self.known = {e: n for n, e in names if e.args}
        self.uses = Counter(a for n in walk(*roots) for a in n.args)
        self.loads: dict[str, Expr] = {}  # tensor name -> leaf, for the signature
        self.head: list[str] = []  # lines that stand before the loop
        self.masks: set[tuple[str, bool]] = set()
        self.prelude: set[str] = set()
        self.scaled = False
        self.sizes: set[str] = set()  # dims whose size a value uses
        self._coordinates: dict[Expr, dict[str, Tile]] = {}

    # -- text ---------------------------------------------------------------------------------------------------------------------

    def let(self, stem: str, text: str, axes: tuple[str, ...], raw: bool = False) -> Tile:
        """Assigns ``text`` to a fresh variable."""
        name = self.fresh(stem)
        shape = ", ".join({ROW: "BT", COL: "BT"}.get(a, f"B{a}") for a in axes)
        self.lines.append(f"{name} = {text}  # [{shape}]" if len(axes) == 2 else f"{name} = {text}")
        return Tile(name, axes, raw)

    def fresh(self, stem: str) -> str:
        """Returns a variable name that is not taken."""
        name, i = stem, 2
        while name in self.used:
            name, i = f"{stem}{i}", i + 1
        self.used.add(name)
        return name

    def axes(self, n: Expr) -> tuple[str, ...]:
        """Returns the axes of the tile of ``n``: tokens first, then columns, then dims."""
        dims = sorted(n.dims, key=lambda d: (d != COL, d))
        return ((ROW,) if n.token and self.rows else ()) + tuple(dims)

    @staticmethod
    def spread(tile: Tile, axes: tuple[str, ...]) -> str:
        """Indexes a tile so that it broadcasts to ``axes``."""
        if tile.axes == axes or not tile.axes:
            return tile.text
        assert set(tile.axes) <= set(axes), f"{tile} to {axes}"
        index = ", ".join(":" if a in tile.axes else "None" for a in axes)
        return f"{tile.text}[{index}]"

    def wide(self, n: Expr) -> Tile:
        """Prints ``n`` in float32."""
        tile = self.tile(n)
        if not tile.raw:
            return tile
        key = Expr("float32", (n,), dims=n.dims, token=n.token)
        if key not in self.tiles:
            self.tiles[key] = self.let(f"{tile.text}_f", f"{tile.text}.to(tl.float32)", tile.axes)
        return self.tiles[key]

    def operand(self, n: Expr) -> str:
        """Prints ``n`` as a matmul operand: masked where padding would not be zero, in the inputs' dtype."""
        return f"{self.guarded(n, raw=True).text}.to(DT)"

    def operand_of(self, carry: Expr) -> Tile:
        """Prints a carry as it was when first asked for, as a matmul operand."""
        key = Expr("cast", (carry,), dims=carry.dims)
        if key not in self.tiles:
            held = self.tile(carry)
            self.tiles[key] = self.let(f"{held.text}_d", f"{held.text}.to(DT)", held.axes)
        return self.tiles[key]

    def guarded(self, n: Expr, raw: bool = False) -> Tile:
        """Prints ``n`` with zeros on padding rows and lanes."""
        if zero_preserving(n):
            return self.tile(n) if raw else self.wide(n)
        key = Expr("guarded", (n,), dims=n.dims, token=n.token)
        if key not in self.tiles:
            tile = self.wide(n)
            mask = self.mask(tile.axes)
            self.tiles[key] = self.let("b_m", f"tl.where({mask}, {tile.text}, 0.0)", tile.axes) if mask else tile
        return self.tiles[key]

    def mask(self, axes: tuple[str, ...]) -> str:
        """Prints the mask of valid rows and lanes of a tile ("" where it has neither)."""
        parts = [self.spread(Tile("m_t" if a == ROW else f"m_{a.lower()}", (a,)), axes) for a in axes if a != COL]
        return " & ".join(parts)

    # -- values -------------------------------------------------------------------------------------------------------------------

    def tile(self, n: Expr) -> Tile:
        """Prints ``n`` (once) and returns its tile; raises NotImplementedError for an op that has no Triton form."""
        if n not in self.tiles:
            turned = Expr(n.op, n.args[::-1], n.name, n.value, n.dims, n.head, n.token, n.attrs) if n.op == "contract" else n
            self.tiles[n] = self.tiles[turned] if turned in self.tiles else self.make(n)
        return self.tiles[n]

    def make(self, n: Expr) -> Tile:
        """Prints a value that is not yet there."""
        if n.op in ("input", "param", "stored"):
            return self.load(n)
        if n.op in FUNCTIONS:
            return self.elementwise(n)
        maker = getattr(self, f"make_{n.op}", None)
        if maker is None:
            raise NotImplementedError(f"no Triton form for op {n.op!r}: {n}")
        made = maker(n)
        assert isinstance(made, Tile)
        return made

    def load(self, n: Expr, row: str = "o_t", suffix: str = "") -> Tile:
        """Prints a load of ``row``; padding rows and lanes read 0."""
        self.loads[n.name] = n
        axes = self.axes(n)
        lanes = self.lanes(self.storage.get(n.name, n.dims), axes)
        if n.token and self.rows:
            lanes.insert(0, f"{self.spread(Tile(row, (ROW,)), axes)} * {n.name}_st")
        if dict(n.attrs).get("per") and self.chunked:
            lanes.insert(0, f"i_c * {n.name}_st")
        at = " + ".join([f"p_{n.name}", f"({' + '.join(lanes)})" if len(lanes) > 1 else lanes[0]] if lanes else [f"p_{n.name}"])
        mask = self.mask(axes)
        return self.let(f"b_{n.name}{suffix}", f"tl.load({at}, mask={mask}, other=0.0)" if mask else f"tl.load({at})", axes, raw=True)

    def lanes(self, dims: tuple[str, ...], axes: tuple[str, ...]) -> list[str]:
        """Prints the offsets of elements stored as [*dims] in a tile on ``axes``."""
        names = ["o_c" if d == COL else f"o_{d.lower()}" for d in dims]
        steps = [f" * {size}" for size in dims[1:]] + [""]  # a tensor has two dims at most
        return [f"{self.spread(Tile(name, (d,)), axes)}{step}" for name, d, step in zip(names, dims, steps, strict=False)]

    def make_lead(self, n: Expr) -> Tile:
        """Prints a load of the row below; the last token loads its own."""
        line = f"o_next = tl.minimum(o_t + 1, {self.rows_end} - 1)"
        if line not in self.lines:
            self.lines.append(line)
        return self.load(n.args[0], "o_next", "_next")

    def make_follows(self, n: Expr) -> Tile:
        """Prints 1 where a token follows, else 0."""
        return self.let("b_follows", f"tl.where(o_t + 1 < {self.rows_end}, 1.0, 0.0)", (ROW,))

    def make_flip(self, n: Expr) -> Tile:
        """Prints stored pair scores with rows and columns exchanged: the load itself is transposed."""
        a = n.args[0]
        if a.op == "above":
            return self.triangle(a.args[0], "[:, None]", "[None, :]", "<")
        if a.op != "stored":
            tile = self.wide(a)
            return self.let(f"{tile.text}_f", f"tl.trans({tile.text})", (ROW, COL))
        self.loads[a.name] = a
        text = f"tl.load(p_{a.name} + (o_t[None, :] * {a.name}_st + o_c[:, None]), mask=m_t[None, :], other=0.0)"
        return self.let(f"b_{a.name}_f", text, (ROW, COL), raw=True)

    def elementwise(self, n: Expr) -> Tile:
        """Prints an element-wise function; a short one that is used once stays inside its user."""
        if n.op == "add" and n.args[1].op == "mix" and len(n.args[1].args) == 3 and n.dims and n.args[1].dims == n.dims:
            return self.accumulate(n.args[1], n.args[0], n)
        axes = self.axes(n)
        operands = [self.spread(self.wide(a), axes) for a in n.args]
        form = FUNCTIONS[n.op].triton
        self.prelude |= {w for w in ("lg_sign", "lg_logsigmoid", "lg_softplus", "lg_tanh", "lg_elu", "lg_cdf") if w in form}
        text = form.format(*operands)
        stem = f"b_{self.known[n]}" if n in self.known else "b_x"
        if n not in self.known and self.uses[n] == 1 and len(text) < _INLINE:
            return Tile(f"({text})", axes)
        return self.let(stem, text, axes)

    def make_const(self, n: Expr) -> Tile:
        """Prints a number."""
        return Tile(repr(n.value), ())

    def make_size(self, n: Expr) -> Tile:
        """Prints the size of a dim."""
        self.sizes.add(n.name)
        return Tile(n.name, ())

    def make_scale(self, n: Expr) -> Tile:
        """Prints the operator's scale."""
        self.scaled = True
        return Tile("scale", ())

    def make_pow(self, n: Expr) -> Tile:
        """Prints a constant power by products, roots and reciprocals, else through the logarithm."""
        x = self.wide(n.args[0])
        if n.args[0].op in ("size", "const"):
            return Tile(f"{x.text}**{n.value!r}", ())
        p = abs(n.value)
        if p in (1.0, 2.0, 3.0, 4.0):
            text = " * ".join([x.text] * int(p))
        elif p == 0.5:
            text = f"tl.sqrt({x.text})"
        else:
            text = f"tl.exp({p!r} * tl.log({x.text}))"
        return self.let("b_p", f"1.0 / ({text})" if n.value < 0 else text, x.axes)

    def make_expand(self, n: Expr) -> Tile:
        """Prints nothing: broadcasting does it, or the store."""
        return self.tile(n.args[0])

    def make_contract(self, n: Expr) -> Tile:
        """Prints an inner product of two vectors."""
        a, b = n.args
        if len(a.dims) != 1 or len(b.dims) != 1:
            raise NotImplementedError(f"no Triton form for a matrix in {n}")
        for pair in ((a, b), (b, a)):
            scores = Expr("gram", pair, dims=(COL,), token=True)
            if scores in self.uses and self.rows:  # the pair scores are at hand: take their diagonal
                return self.diagonal(scores)
        full = (ROW, *a.dims) if self.rows and (a.token or b.token) else a.dims
        clean, other = (a, b) if zero_preserving(a) else (b, a)
        left = self.spread(self.guarded(clean), full)
        right = self.spread(self.wide(other) if finite(other) else self.guarded(other), full)
        return self.let("b_d", f"tl.sum({left} * {right}, axis={len(full) - 1})", full[:-1])

    def diagonal(self, scores: Expr) -> Tile:
        """Prints what every token scores with itself."""
        return self.let("b_d", f"tl.sum(tl.where(o_t[:, None] == o_t[None, :], {self.wide(scores).text}, 0.0), axis=1)", (ROW,))

    def make_diag(self, n: Expr) -> Tile:
        """Prints the diagonal of stored pair scores, whichever way they are loaded."""
        flipped = Expr("flip", n.args, dims=(COL,), token=True)
        return self.diagonal(flipped if flipped in self.uses else n.args[0])

    def make_sum(self, n: Expr) -> Tile:
        """Prints a sum over a vector."""
        x = self.guarded(n.args[0])
        return self.let("b_s", f"tl.sum({x.text}, axis={len(x.axes) - 1})", x.axes[:-1])

    def make_mean(self, n: Expr) -> Tile:
        """Prints a mean over a vector."""
        x = self.guarded(n.args[0])
        return self.let("b_s", f"tl.sum({x.text}, axis={len(x.axes) - 1}) / {n.attr('dim')}", x.axes[:-1])

    def make_rowmax(self, n: Expr) -> Tile:
        """Prints the largest element of a vector; padding lanes do not count."""
        x = self.wide(n.args[0])
        lanes = self.spread(Tile(f"m_{x.axes[-1].lower()}", x.axes[-1:]), x.axes)
        return self.let("b_s", f"tl.max(tl.where({lanes}, {x.text}, float('-inf')), axis={len(x.axes) - 1})", x.axes[:-1])

    # -- chunks -------------------------------------------------------------------------------------------------------------------

    def coordinate(self, g: Expr) -> dict[str, Tile]:
        """Prints the cumsum of a log-decay inside the chunk, exact to float32 of every difference.

        The decay is split into a multiple of 1/256, whose sums over a chunk are exact in float32 (MATH.md section 5), and a rest.
        """
        key = Expr("coordinate", (g,), dims=g.dims, token=True)
        if key not in self.tiles:
            axes = (ROW, *g.dims)
            mask = self.mask(axes)
            text = self.spread(self.wide(g), axes)
            b_g = Tile(text, axes)
            if not zero_preserving(g):
                b_g = self.let("b_g", f"tl.where({mask}, {text}, 0.0)", axes)
            hi = self.let("b_gh", f"tl.floor({b_g.text} * 256.0 + 0.5) * 0.00390625", axes)
            lo = self.let("b_gl", f"{b_g.text} - {hi.text}", axes)
            found = {"gh": hi, "gl": lo}
            found["h"] = self.let("b_bh", f"tl.cumsum({hi.text}, axis=0)", axes)
            found["l"] = self.let("b_bl", f"tl.cumsum({lo.text}, axis=0)", axes)
            self.tiles[key] = found["h"]
            self._coordinates[key] = found
        return self._coordinates[key]

    def gate(self, g: Expr) -> str:
        """Prints a log-decay on a dim, zero on padding, and names it."""
        tile = self.guarded(g)
        if not tile.text.isidentifier():
            tile = self.tiles[g] = self.let("b_g", tile.text, tile.axes)
        return tile.text

    def prefix(self, g: Expr) -> str:
        """Prints the prefix sums of a log-decay on a dim."""
        key = self.prefix_key(g)
        if key not in self.tiles:
            self.prelude.add("lg_sums")
            self.tiles[key] = self.let("b_sums", f"lg_sums({self.gate(g)}, DT)", self.axes(g))
        return self.tiles[key].text

    @staticmethod
    def prefix_key(g: Expr) -> Expr:
        """Names the prefix sums of a log-decay as a value."""
        return Expr("prefix", (g,), dims=g.dims, token=True)

    def total(self, g: Expr) -> tuple[Tile, Tile]:
        """Prints the sum of a log-decay over the chunk."""
        found = self.coordinate(g)
        if "th" not in found:
            axes = found["gh"].axes[1:]
            found["th"] = self.let("b_th", f"tl.sum({found['gh'].text}, axis=0)", axes)
            found["tl"] = self.let("b_tl", f"tl.sum({found['gl'].text}, axis=0)", axes)
        return found["th"], found["tl"]

    def reading(self, g: Expr, prev: bool) -> tuple[Tile, Tile]:
        """Prints the coordinate of a read: b, or b - g for a read of the undecayed past."""
        found = self.coordinate(g)
        if prev and "ph" not in found:
            found["ph"] = self.let("b_ph", f"{found['h'].text} - {found['gh'].text}", found["h"].axes)
            found["pl"] = self.let("b_pl", f"{found['l'].text} - {found['gl'].text}", found["h"].axes)
        return (found["ph"], found["pl"]) if prev else (found["h"], found["l"])

    def make_start(self, n: Expr) -> Tile:
        """Prints the decay from the chunk's beginning to a token."""
        if n.dims:
            self.prelude.add("lg_start")
            sums, prev = self.prefix(n.args[0]), n.attr("prev") == "1"
            return self.let("e_b", f"lg_start({self.gate(n.args[0])}, {sums}, {prev}, BT, DT, PRECISION)", self.axes(n))
        h, low = self.reading(n.args[0], n.attr("prev") == "1")
        return self.let("e_b", f"tl.exp({h.text} + {low.text})", h.axes)

    def make_end(self, n: Expr) -> Tile:
        """Prints the decay from a token to the chunk's end."""
        if n.dims:
            self.prelude.add("lg_end")
            g, sums = self.gate(n.args[0]), self.tiles.get(self.prefix_key(n.args[0]))
            # a sweep that needs no prefix sums has no registers for them
            after = f"tl.sum({g}, axis=0)[None, :] - {sums.text}" if sums else f"tl.cumsum({g}, axis=0, reverse=True) - {g}"
            return self.let("e_c", f"lg_end({g}, {after}, BT, DT, PRECISION)", self.axes(n))
        (th, tl), found = self.total(n.args[0]), self.coordinate(n.args[0])
        axes = found["h"].axes
        text = f"({self.spread(th, axes)} - {found['h'].text}) + ({self.spread(tl, axes)} - {found['l'].text})"
        return self.let("e_c", f"tl.exp({text})", axes)

    def make_whole(self, n: Expr) -> Tile:
        """Prints the decay over the whole chunk."""
        if n.dims:
            return self.let("e_t", f"tl.exp(tl.sum({self.gate(n.args[0])}, axis=0))", n.dims)
        th, tl = self.total(n.args[0])
        return self.let("e_t", f"tl.exp({th.text} + {tl.text})", th.axes)

    def make_carry(self, n: Expr) -> Tile:
        """Refers to a carry; the kernel declares it."""
        raise AssertionError(f"carry {n.name} was not declared")

    def make_col(self, n: Expr) -> Tile:
        """Turns a token's number into a column."""
        tile = self.wide(n.args[0]) if finite(n.args[0]) else self.guarded(n.args[0])
        named = tile if tile.text.isidentifier() else self.let("b_w", tile.text, tile.axes)
        return Tile(named.text, (COL,) if named.axes else ())

    @staticmethod
    def causal(n: Expr) -> str:
        """Prints the mask of the pairs that count; of rows that change with the chunk, or it would hold registers across the loop."""
        reverse, inclusive = n.attr("reverse") == "1", n.attr("inclusive") == "1"
        return f"o_t[:, None] {'<' if reverse else '>'}{'=' if inclusive else ''} o_t[None, :]"

    def make_pairs(self, n: Expr) -> Tile:
        """Prints the decay between every pair of tokens; the exponent is cut at 0 before exp, the mask selects after."""
        mask = self.causal(n)
        if not n.args:
            return Tile(mask, (ROW, COL))
        g = n.args[0]
        (rh, rl), found = self.reading(g, n.attr("prev") == "1"), self.coordinate(g)
        h, low = found["h"].text, found["l"].text
        if n.attr("reverse") == "1":
            text = f"({rh.text}[None, :] - {h}[:, None]) + ({rl.text}[None, :] - {low}[:, None])"
        else:
            text = f"({rh.text}[:, None] - {h}[None, :]) + ({rl.text}[:, None] - {low}[None, :])"
        return self.let("b_D", f"tl.where({mask}, tl.exp(tl.minimum({text}, 0.0)), 0.0)", (ROW, COL))

    def weights(self, n: Expr) -> Tile:
        """Prints the pair weights of a mix: scores and numbers, decayed and masked."""
        w, pairs = n.args[:2]
        if pairs == E.ONE:  # a block of an inverse: zero where no pair counts
            return self.tile(w)
        key = Expr("weights", (w, pairs), dims=(COL,), token=True)
        if key not in self.tiles:
            tile, p = self.wide(w), self.tile(pairs)
            text = self.spread(tile, (ROW, COL)) if tile.axes else tile.text
            if not pairs.args:
                self.tiles[key] = self.let("b_P", f"tl.where({p.text}, {text}, 0.0)", (ROW, COL))
            else:
                self.tiles[key] = p if w == E.ONE else self.let("b_P", f"{text} * {p.text}", (ROW, COL))
        return self.tiles[key]

    def make_weigh(self, n: Expr) -> Tile:
        """Prints what each token reads of another's write."""
        return self.weights(n)

    def make_inverse(self, n: Expr) -> Tile:
        """Prints (I - A)^-1 of strictly lower weights."""
        self.prelude.add("lg_inverse")
        return self.let("b_T", f"lg_inverse({self.wide(n.args[0]).text}, LEVELS, BT, EXACT)", (ROW, COL))

    def make_pack(self, n: Expr) -> Tile:
        """Prints two triangles as one table."""
        scores, inverse = (self.wide(a).text for a in n.args)
        return self.let("b_L", f"tl.where(o_c[:, None] >= o_c[None, :], {scores}, tl.trans({inverse}))", (ROW, COL))

    def make_above(self, n: Expr) -> Tile:
        """Prints the load of a unit lower table that lies above the diagonal of another one."""
        return self.triangle(n.args[0], "[None, :]", "[:, None]", ">")

    def triangle(self, table: Expr, rows: str, columns: str, side: str) -> Tile:
        """Prints the load of what lies on a ``side`` of the diagonal, with ones on that; ``rows`` and ``columns`` place the table's own."""
        name = table.name
        self.loads[name] = table
        text = f"tl.load(p_{name} + (o_t{rows} * {name}_st + o_c{columns}), mask=m_t{rows} & (o_c[:, None] {side} o_c[None, :]), other=0.0)"
        return self.let("b_T", f"tl.where((o_c[:, None] == o_c[None, :]) & m_t[:, None], 1.0, {text})", (ROW, COL), raw=True)

    def make_compose(self, n: Expr) -> Tile:
        """Prints the product of two tables of pair weights, in float32."""
        p, q = (self.wide(a).text for a in n.args)
        return self.let("b_Q", f"tl.dot({p}, {q}, input_precision=EXACT)", (ROW, COL))

    @property
    def exactly(self) -> bool:
        """Tells whether some matmul keeps float32's digits whatever the inputs are."""
        return any("EXACT" in line for line in self.lines)

    def make_gram(self, n: Expr) -> Tile:
        """Prints pair scores without a decay."""
        r, k = n.args
        text = f"tl.dot({self.operand(r)}, tl.trans({self.operand(k)}), input_precision=PRECISION)"
        return self.let("b_A", text, (ROW, COL))

    def make_mix(self, n: Expr) -> Tile:
        """Prints pair weights applied to the tokens' vectors, without a decay of the vectors' dim."""
        return self.accumulate(n, None, n)

    def make_lag(self, n: Expr) -> Tile:
        """Prints a tile a token later; the chunk's first token gets 0."""
        self.prelude.add("lg_lag")
        x = self.wide(n.args[0])
        return self.let("b_lag", f"lg_lag({x.text}, BT)", x.axes)

    def accumulate(self, mix: Expr, onto: Expr | None, n: Expr) -> Tile:
        """Prints an undecayed mix, onto what is already there if given: accumulators are scaled, not operands."""
        turned = mix.args[0].op == "flip" and mix.args[0].args[0].op == "weigh"
        weights, far = self.tile(mix.args[0].args[0]) if turned else self.weights(mix), mix.args[2]
        if not far.dims:
            text = f"tl.sum({weights.text}, axis=1)"
            if far != E.ONE:
                text = f"tl.sum({weights.text} * {self.tile(Expr('col', (far,), dims=(COL,), token=True)).text}[None, :], axis=1)"
            return self.let("b_o", text, (ROW,))
        axes = self.axes(n)
        base = self.wide(onto) if onto is not None else None
        onto_it = f", {base.text}" if base is not None and base.axes == axes else ""
        left = f"tl.trans({weights.text}.to(DT))" if turned else f"{weights.text}.to(DT)"
        text = f"tl.dot({left}, {self.operand(far)}{onto_it}, input_precision=PRECISION)"
        tile = self.let("b_o", text, self.axes(mix))
        return tile if base is None or onto_it else self.let("b_o", f"{tile.text} + {self.spread(base, axes)}", axes)

    def make_tail(self, n: Expr) -> Tile:
        """Prints sums over a chunk's tokens from each one on."""
        axes = self.axes(n)
        return self.let("b_tail", f"tl.cumsum({self.spread(self.guarded(n.args[0]), axes)}, axis=0, reverse=True)", axes)

    def make_inter(self, n: Expr) -> Tile:
        """Prints what the carry holds for every token of the chunk."""
        r, carry = n.args
        held = self.tile(carry)
        if not r.dims:
            text = held.text if r == E.ONE else f"{self.spread(self.wide(r), (ROW, *held.axes))} * {held.text}[None, :]"
            return Tile(text, held.axes) if r == E.ONE else self.let("b_i", text, (ROW, *held.axes))
        if len(held.axes) == 2:
            text = f"tl.dot({self.operand(r)}, {self.operand_of(carry).text}, input_precision=PRECISION)"
            return self.let("b_i", text, (ROW, held.axes[1]))
        # a matmul with the vector as 16 equal columns: a product of whole tiles would not fit the registers
        columns = f"tl.broadcast_to({held.text}[:, None], [B{held.axes[0]}, 16]).to(DT)"
        return self.let("b_i", f"tl.sum(tl.dot({self.operand(r)}, {columns}, input_precision=PRECISION), axis=1) * 0.0625", (ROW,))
