"""Prints pair scores and pair sums under a decay of their vectors' dim: one loop over the levels of the dyadic anchors for all of a launch.

The pair (i, j) belongs to the level of the highest set bit of i xor j: there the later token sits in the upper half of an aligned block,
the earlier one in the lower half, and both decay to the block's middle, so no exponent is above 0 (MATH.md section 5). At a level a tile
has readers in its upper rows and writers in its lower ones; the values of a launch share exponents, masks and such tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lagen.emit.statements import Statements, Tile
from lagen.ir.chunk import COL, ROW, SIDES, is_leveled
from lagen.ir.expr import ONE, Expr, walk

NEAR = "o_c[:, None] == o_c[None, :]"


def print_levels(out: Statements, roots: Sequence[Expr], names: Mapping[Expr, str]) -> list[str]:
    """Prints loops for what ``roots`` take through the levels, and notes the tiles: first for values that need no other, then for the rest.

    ``names`` gives pair scores their names. Returns the lines that begin their sums, for the place where those begin.
    """
    left = dict.fromkeys(n for n in walk(*roots) if is_leveled(n))
    scores = {n: out.fresh(f"b_{names.get(n, 'A')}") for n in left if n.op == "gram"}
    while left:
        first = [n for n in left if not any(x in left for x in walk(*n.args))]
        group = [n for n in first if n.args[-1] == first[0].args[-1]]
        _Loop(out, roots, group).print(scores)
        left = {n: None for n in left if n not in group}
    return [f"{name} = tl.zeros([BT, BT], tl.float32)" for name in scores.values()]


class _Loop:
    """One loop over levels while it is printed."""

    def __init__(self, out: Statements, roots: Sequence[Expr], values: list[Expr]) -> None:
        gate, nodes = values[0].args[-1], dict.fromkeys(walk(*roots))
        self.out, self.values, self.axes = out, values, (ROW, *gate.dims)
        self.diagonals = [n for n in nodes if n.op == "diag" and n.args[0].op == "gram"]
        self.sides = [n for n in nodes if n.op in SIDES and set(values).issuperset(n.args)]
        self.signed = {a for n in self.sides if n.op == "between" for a in n.args}  # twins whose writers' rows of the table are negative
        self.gate = out.gate(gate)
        self.exponents: dict[str, str] = {}  # by whether reads are of the state before their own token's decay
        self.body: list[str] = []
        self.near: dict[str, str] = {}  # lines of the body that stand for a value, by text

    def print(self, names: Mapping[Expr, str]) -> None:
        """Prints operands, the loop, and what the diagonal adds; ``names`` are the sums of pair scores."""
        out, values, sides = self.out, self.values, self.sides
        grams = [n for n in values if n.op == "gram"]
        scores = {n: names[n] for n in grams}
        vectors = {n: (self.vector(n.args[0]), self.vector(n.args[1])) for n in grams}
        sums = {n: self.operands(n) for n in values if n not in scores}
        for n in self.diagonals:
            out.tile(n)
        for n in grams:  # a token and itself: no decay, and no level
            if n.attr("prev") == "0":
                r, k = (out.spread(out.wide(x), self.axes) for x in n.args[:2])
                out.lines.append(f"{scores[n]} += tl.where({NEAR}, tl.sum({r} * {k}, axis=1)[:, None], 0.0)")
        totals = {n: self.zeros(f"b_{n.op}" if n.op != "mix" else "b_o") for n in (*(n for n in sums if n.op == "mix"), *sides)}
        self.exponents = {p: out.fresh("e" if p == "0" else "e_prev") for p in sorted({n.attr("prev") for n in values})}
        self.upper, self.half = out.fresh("upper"), out.fresh("half")
        out.prelude.add("lg_reach")
        prefix = out.prefix(values[0].args[-1])
        for i, (prev, e) in enumerate(self.exponents.items()):
            upper = "_" if i else self.upper
            self.body.append(f"{e}, {upper} = lg_reach({self.gate}, {prefix}, level, {prev == '1'}, BT, DT, PRECISION)")
        # masks are of values that depend on the level, or they would hold registers across the loop
        self.body.append(f"{self.half} = o_c >> level")
        self.score(scores, vectors)
        for n, operands in sums.items():
            e, right, dot = self.sum(n, *operands)
            if n.op == "mix":
                self.body.append(f"{totals[n]} += {e} * {dot}")
                continue
            mine = [x for x in sides if n in x.args]
            met = self.once("b_s", dot) if n in self.signed else dot
            for side in mine:
                if side.op == "between":  # the vectors as the matmul has them: both sides of a pair make the same product
                    self.body.append(f"{totals[side]} += {met} * {right}")
                    continue
                both = self.once("b_z", f"{e} * {met}")
                sign = "-" if side.op == "writers" and n in self.signed else "+"
                reads = self.once("reads", f"tl.where({self.upper}, 1.0, 0.0)[:, None]")  # a product takes one instruction, a choice two
                self.body.append(f"{totals[side]} {sign}= {both} * {reads if side.op == 'readers' else f'(1.0 - {reads})'}")
        out.lines += ["for level in range(LEVELS):", *(f"    {line}" for line in self.body)]
        for n, total in totals.items():
            if n.op == "mix" and n.attr("inclusive") == "1":
                table, far, _ = sums[n]
                out.lines.append(f"{total} += tl.sum(tl.where({NEAR}, {table}, 0.0), axis=1)[:, None] * {far}")
        out.tiles |= {n: Tile(name, (ROW, COL)) for n, name in scores.items()}
        out.tiles |= {n: Tile(total, self.axes) for n, total in totals.items()}

    def named(self, stem: str, tile: Tile) -> str:
        """Gives a tile a name, on the axes of the loop's vectors."""
        text = self.out.spread(tile, self.axes)
        return text if text.isidentifier() else self.out.let(stem, text, self.axes).text

    def vector(self, n: Expr) -> str:
        """Prints a vector that the levels take, as it was loaded: half precision holds half the registers."""
        return self.named("b_x", self.out.guarded(n, raw=True))

    def zeros(self, stem: str) -> str:
        """Prints an accumulator of vectors."""
        return self.out.let(stem, f"tl.zeros([BT, B{self.axes[1]}], tl.float32)", self.axes).text

    def operands(self, n: Expr) -> tuple[str, str, str]:
        """Prints what a pair sum takes: its table, the writers' vectors, and the readers' where writers sum too."""
        out = self.out
        if n.op == "mix":
            table = out.let("b_P", f"{out.spread(out.weights(n), (ROW, COL))}.to(DT)", (ROW, COL))
            return table.text, self.vector(n.args[2]), ""
        a, b, r, w, number, _ = n.args
        scores = [Expr("gram", x, dims=(COL,), token=True) for x in ((a, b), (b, a))]
        earlier, later = (out.tile(x).text for x in scores)
        for d in (d for d in self.diagonals if d.args[0] in scores):  # while they are there: the loop keeps the tables alone
            out.tile(d)
        sign = "-" if n in self.signed else ""
        text = f"tl.where(o_c[:, None] > o_c[None, :], {earlier}, {sign}{later})"
        text = f"{text}.to(DT)" if number == ONE else f"({out.tile(number).text} * {text}).to(DT)"
        return out.let("b_P", text, (ROW, COL)).text, self.vector(w), self.vector(r)

    def once(self, stem: str, text: str) -> str:
        """Assigns a text to a name in the loop, the first time that it is needed."""
        if text not in self.near:
            self.near[text] = self.out.fresh(stem)
            self.body.append(f"{self.near[text]} = {text}")
        return self.near[text]

    @property
    def apart(self) -> str:
        """Prints the mask of the pairs of a level, of both orders."""
        return f"(({self.half}[:, None] ^ {self.half}[None, :]) == 1)"

    def score(self, scores: Mapping[Expr, str], sides: Mapping[Expr, tuple[str, str]]) -> None:
        """Prints pair scores: rows of readers and rows of writers share tiles, as many as there are of the more numerous."""
        readers = list(dict.fromkeys((sides[n][0], n.attr("prev")) for n in scores))
        writers = list(dict.fromkeys(k for _, k in sides.values()))
        tiles: list[str] = []
        for i in range(max(len(readers), len(writers))):
            e = self.exponents[readers[i][1]] if i < len(readers) else next(iter(self.exponents.values()))
            if i < min(len(readers), len(writers)):
                rows = f"tl.where({self.upper}[:, None], {readers[i][0]}, {writers[i]})"
            else:
                rows = readers[i][0] if i < len(readers) else writers[i]
            tiles.append(self.once("b_y", f"({rows} * {e}).to(DT)"))
        if not scores:
            return
        on_level = self.once("on_level", f"{self.apart} & ({self.half}[:, None] > {self.half}[None, :])")
        for n, name in scores.items():
            r, k = sides[n]
            left, right = tiles[readers.index((r, n.attr("prev")))], tiles[writers.index(k)]
            dot = f"tl.dot({left}, tl.trans({right}), {name}, input_precision=PRECISION)"
            self.body.append(f"{name} = tl.where({on_level}, {dot}, {name})")

    def sum(self, n: Expr, table: str, far: str, led: str) -> tuple[str, str, str]:
        """Returns the decay of a level's sums, the vectors that it sums, and the sums; rows in a block's upper half are readers."""
        e = self.exponents[n.attr("prev")]
        vectors = f"tl.where({self.upper}[:, None], {led}, {far})" if led else far
        right = self.once("b_y", f"({vectors} * {e}).to(DT)")
        level = self.once("b_l", f"{self.apart}.to(DT)")  # a product takes fewer registers than a choice
        return e, right, f"tl.dot({table} * {level}, {right}, input_precision=PRECISION)"
