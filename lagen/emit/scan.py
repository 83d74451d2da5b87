"""Prints a scan: every state of a pass in registers, a block of tokens at a time (passes/scans).

A block's tokens lie in the registers of one thread, so that tl.associative_scan over them is a loop without exchange: a multiply-add a
number. What stands on the rows of matrix states is printed inside the loop that takes a few rows at a time, what they take before it,
what sums over them after it: three sections, and each value goes to its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lagen.emit.kernels import KernelPrinter, Printed
from lagen.emit.statements import Statements, Tile, finite, zero_preserving
from lagen.ir import expr as E
from lagen.ir.chunk import ROW, Carry
from lagen.ir.expr import Expr
from lagen.ir.plan import Hold, Kernel, Store
from lagen.ir.recurrence import Recurrence, State, Write
from lagen.passes.logs import decay
from lagen.passes.scans import row_sums


def print_scan(
    kernel: Kernel, recurrence: Recurrence, states: dict[str, State], heads: dict[str, str], top: str, exact: frozenset[str]
) -> Printed:
    """This function prints ``kernel``; its arguments are those of kernels.print_kernel."""
    return _ScanKernel(kernel, recurrence, states, heads, top, exact).print()


def rows_of(kernel: Kernel) -> str:
    """This function names the dim of a scan's states that is gone through a few rows at a time; "" where they are vectors."""
    return next((h.carry.x for h in kernel.holds if h.carry.x), "")


@dataclass(frozen=True)
class _Scanned:
    """What a block makes of a state: its value after each token, before it, and the factor by which it came there."""

    now: Tile
    before: Tile
    factor: str
    own: str  # of a reverse state: what the token itself sends back


class ScanStatements(Statements):
    """Statements of a block of tokens, in three sections: before, while and after the rows are gone through."""

    def __init__(self, kernel: Kernel, names: Iterable[tuple[str, Expr]], roots: Iterable[Expr], states: dict[str, State]) -> None:
        super().__init__(names, roots, chunked=True)
        self.states = states
        self.tiled = kernel.tile
        self.dim = rows_of(kernel)
        self.first = self.lines
        self.inside: list[str] = []
        self.last: list[str] = []
        self.edges: dict[str, str] = {}  # the states as the block begins, or ends where they are reversed
        self.scanned: dict[str, _Scanned] = {}
        held = {h.carry.state for h in kernel.holds}
        operands = [x for s in states.values() if s.name in held for x in s.operands]
        self.exclusive = {n.name for e in (*kernel.values, *operands) for n in E.reads(e, "readout") if n.attr("at") != "now"}
        self.sums: dict[Expr, int] = {}

    # -- sections -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def section(self, dims: tuple[str, ...], *values: Expr) -> Iterator[None]:
        """Prints into the section of a value on ``dims`` that takes ``values``."""
        kept = self.lines
        if self.dim and self.dim in dims:
            self.lines = self.inside
        elif any(row_sums(v, self.dim, self.states, self.sums) for v in values):
            self.lines = self.last
        else:
            self.lines = self.first
        yield
        self.lines = kept

    def axes(self, n: Expr) -> tuple[str, ...]:
        """Returns the axes of the tile of ``n``: tokens, rows, and the tile last, whose lanes are the threads'."""
        return ((ROW,) if n.token else ()) + self.order(n.dims)

    def order(self, dims: Iterable[str]) -> tuple[str, ...]:
        """Returns dims with the tile last."""
        return tuple(sorted(dims, key=lambda d: (d == self.tiled, d)))

    def make(self, n: Expr) -> Tile:
        """Prints a value that is not yet there, in its section."""
        with self.section(n.dims, n):
            return super().make(n)

    def wide(self, n: Expr) -> Tile:
        """Prints ``n`` in float32, in its section."""
        with self.section(n.dims, n):
            return super().wide(n)

    def guarded(self, n: Expr, raw: bool = False) -> Tile:
        """Prints ``n`` with zeros on padding, in its section."""
        with self.section(n.dims, n):
            return super().guarded(n, raw)

    # -- values -------------------------------------------------------------------------------------------------------------------

    def make_outer(self, n: Expr) -> Tile:
        """Prints the matrix of two vectors' products."""
        axes = self.axes(n)
        return Tile("(" + " * ".join(self.spread(self.wide(a), axes) for a in n.args) + ")", axes)

    def make_contract(self, n: Expr) -> Tile:
        """Prints a sum of products over the rows or over the tile."""
        return self.added(n, *n.args)

    def make_sum(self, n: Expr) -> Tile:
        """Prints a sum over the rows or over the tile."""
        return self.added(n, *n.args)

    def added(self, n: Expr, *factors: Expr) -> Tile:
        """Prints the sum of a product over a dim, padding left out."""
        over = n.attr("dim")
        clean = next((f for f in factors if zero_preserving(f)), factors[0])
        parts = [self.without(f, over) if f is clean or not finite(f) else self.wide(f) for f in factors]
        axes = ((ROW,) if any(f.token for f in factors) else ()) + self.order({d for f in factors for d in f.dims})
        return self.reduce(over, " * ".join(self.spread(tile, axes) for tile in parts), axes)

    def without(self, n: Expr, over: str) -> Tile:
        """Prints ``n`` with zeros where the axis ``over`` is padding."""
        tile = self.wide(n)
        if zero_preserving(n) or over not in tile.axes:
            return tile
        with self.section(n.dims, n):
            lanes = self.spread(Tile("m_t" if over == ROW else f"m_{over.lower()}", (over,)), tile.axes)
            return self.let("b_m", f"tl.where({lanes}, {tile.text}, 0.0)", tile.axes)

    def reduce(self, over: str, text: str, axes: tuple[str, ...]) -> Tile:
        """Prints the sum of ``text`` over one of its axes; over the rows it adds up while they are gone through."""
        rest = tuple(a for a in axes if a != over)
        if over != self.dim:
            return self.let("b_s", f"tl.sum({text}, axis={axes.index(over)})", rest)
        name = self.fresh("b_a")
        self.first.append(f"{name} = tl.zeros([{self.shape(rest)}], tl.float32)")
        self.inside.append(f"{name} += tl.sum({text}, axis={axes.index(over)})")
        return Tile(name, rest)

    @staticmethod
    def shape(axes: tuple[str, ...]) -> str:
        """Prints the shape of a tile."""
        return ", ".join({ROW: "BT"}.get(a, f"B{a}") for a in axes)

    def make_readout(self, n: Expr) -> Tile:
        """Prints what each token reads of a state."""
        state, over = self.states[n.name], n.attr("dim")
        held = self.value(state, n.attr("at"))
        if not over:
            if n.args[0] == E.ONE:
                return held
            return self.let("b_r", f"{self.spread(self.wide(n.args[0]), held.axes)} * {held.text}", held.axes)
        vector = self.spread(self.guarded(n.args[0]), held.axes)
        return self.reduce(over, f"{vector} * {held.text}", held.axes)

    def value(self, s: State, at: str) -> Tile:
        """Prints a state as a token meets it."""
        found = self.scan(s)
        if at in ("now", "previous", "later"):
            return found.now if at == "now" else found.before
        key = Expr("held", name=s.name, dims=s.dims, token=True, attrs=(("at", at),))
        if key not in self.tiles:
            text = f"{found.factor} * {found.before.text}" if at == "decayed" else f"{found.before.text} + {found.own}"
            with self.section(s.dims, *s.operands):
                self.tiles[key] = self.let(f"b_{s.name}_{at[0]}", text, found.before.axes)
        return self.tiles[key]

    # -- states -------------------------------------------------------------------------------------------------------------------

    def scan(self, s: State) -> _Scanned:
        """Prints the scan of a state over the block's tokens."""
        if s.name not in self.scanned:
            with self.section(s.dims, *s.operands):
                self.scanned[s.name] = self.peak(s) if s.peak else self.linear(s)
        return self.scanned[s.name]

    def linear(self, s: State) -> _Scanned:
        """Prints a linear state: S = f S + w; reversed, what leaves a token is f (R + v) + z of what comes to it."""
        axes, edge = (ROW, *self.order(s.dims)), self.edges[s.name]
        factor = self.factor(s, axes)
        own = self.written(s, axes, "v", [w for w in s.writes if w.decayed]) if s.reverse else ""
        rest = self.written(s, axes, "w", [w for w in s.writes if not (s.reverse and w.decayed)])
        met = " + ".join(x for x in (f"{factor} * {own}" if own else "", rest) if x)
        start = f"{factor} * {edge}" if len(axes) == 1 else f"{factor} * {self.spread(Tile(edge, axes[1:]), axes)}"
        given = self.let(f"b_{s.name}_g", f"tl.where({self.edge(s, axes)}, {start} + {met}, {met})", axes)
        return self.associate(s, axes, "lg_scan", (factor, given.text), ("1.0", "0.0"), own)

    def peak(self, s: State) -> _Scanned:
        """Prints a running maximum: m = max(m + a, b)."""
        axes, edge = (ROW, *self.order(s.dims)), self.edges[s.name]
        mask = self.mask(axes)
        shift = self.spread(self.wide(E.add(*s.decay)), axes) if s.decay else "0.0"
        a = self.let(f"b_{s.name}_a", f"tl.where({mask}, {shift}, 0.0)", axes)
        b = self.let(f"b_{s.name}_b", f"tl.where({mask}, {self.spread(self.wide(s.writes[0].row), axes)}, float('-inf'))", axes)
        start = f"tl.maximum({self.spread(Tile(edge, axes[1:]), axes)} + {a.text}, {b.text})"
        given = self.let(f"b_{s.name}_g", f"tl.where({self.edge(s, axes)}, {start}, {b.text})", axes)
        return self.associate(s, axes, "lg_peak", (a.text, given.text), ("0.0", "float('-inf')"), "")

    def associate(
        self, s: State, axes: tuple[str, ...], device: str, taken: tuple[str, str], neutral: tuple[str, str], own: str
    ) -> _Scanned:
        """Prints the scan: what is there after each token, and before it where something reads that."""
        name, way = f"b_{s.name}", ", reverse=True" if s.reverse else ""
        step, now = self.fresh(f"{name}_x"), Tile(self.fresh(f"{name}_t"), axes)
        if s.name not in self.exclusive:
            self.prelude.add(device)
            self.lines.append(f"{step}, {now.text} = tl.associative_scan(({', '.join(taken)}), 0, {device}{way})")
            return _Scanned(now, now, taken[0], own)
        self.prelude.add(f"{device}_before")
        none = f"tl.full([{self.shape(axes)}], {neutral[0]}, tl.float32)"
        edge = f"tl.where({self.edge(s, axes)}, {self.spread(Tile(self.edges[s.name], axes[1:]), axes)}, {neutral[1]})"
        last, before = self.fresh(f"{name}_y"), Tile(self.fresh(f"{name}_p"), axes)
        self.lines += [
            f"{step}, {now.text}, {last}, {before.text} = tl.associative_scan(",
            f"    ({', '.join(taken)}, {none}, {edge}), 0, {device}_before{way}",
            ")",
        ]
        return _Scanned(now, before, taken[0], own)

    def edge(self, s: State, axes: tuple[str, ...]) -> str:
        """Prints where a block's tokens meet what was there before them."""
        return self.spread(Tile("(o_c == BT - 1)" if s.reverse else "(o_c == 0)", (ROW,)), axes)

    def factor(self, s: State, axes: tuple[str, ...]) -> str:
        """Prints the factor by which each token's state shrinks; 1 on padding rows."""
        if not s.decay:
            return self.let(f"b_{s.name}_f", f"tl.full([{self.shape(axes)}], 1.0, tl.float32)", axes).text
        g = E.add(*s.decay)
        key = Expr("factor", (g,), dims=s.dims, token=True)
        if key not in self.tiles:
            whole = g.token and self.axes(g) == axes
            mask = self.spread(Tile("m_t", (ROW,)), axes) if whole and finite(g) else self.mask(axes)
            factor = self.spread(self.wide(decay(g)), axes)
            self.tiles[key] = self.let(f"b_{s.name}_f", f"tl.where({mask}, {factor}, 1.0)", axes)
        return self.tiles[key].text

    def written(self, s: State, axes: tuple[str, ...], stem: str, writes: list[Write]) -> str:
        """Prints what each token writes; "" where it writes nothing."""
        terms = []
        for w in writes:
            sides = [x for x in (w.row, w.col) if x != E.ONE] or [E.ONE]
            text = " * ".join(self.spread(self.guarded(x) if x.dims or x.token else self.wide(x), axes) for x in sides)
            bare = not any(x.token for x in sides) or {d for x in sides for d in x.dims} != set(s.dims)
            terms.append(f"tl.where({self.mask(axes)}, {text}, 0.0)" if bare else text)
        return self.let(f"b_{s.name}_{stem}", " + ".join(terms), axes).text if terms else ""


class _ScanKernel(KernelPrinter):
    """The parts of a scan while it is printed."""

    def statements(self) -> Statements:
        """Makes the statements of a scan."""
        held = [x for h in self.kernel.holds for x in self.states[h.carry.state].operands]
        self.block = ScanStatements(self.kernel, self.recurrence.names, [*self.kernel.values, *held], self.states)
        return self.block

    @property
    def rows(self) -> str:
        """Names the dim that is gone through a few rows at a time."""
        return self.block.dim

    def offsets(self, dims: tuple[str, ...]) -> list[str]:
        """Prints offsets and masks; those of the rows at hand change with the loop over them, the j-th of ``o_g``."""
        lines = super().offsets(tuple(d for d in dims if d != self.rows))
        return [*lines, f"o_g = tl.arange(0, G{self.rows})"] if self.rows else lines

    def counts(self) -> str:
        """Lists the parameters that say how a scan is cut, and how often it takes some rows."""
        marked = any(name.startswith("mark_") for name, _ in self.pointers)
        return "T, HV, G, NY, NSEG, SEG" + (", NC" if marked else "") + (", ROWS" if self.rows else "")

    def blocks(self, dims: tuple[str, ...]) -> list[str]:
        """Lists the parameters that say how much of each dim a tile takes, and how many tiles the rows are."""
        return [*super().blocks(dims), *([f"G{self.rows}"] if self.rows else [])]

    def start(self, hold: Hold) -> None:
        """Prints how a carry begins; a matrix a few rows at a time, for its lanes are to be those of the scan."""
        carry, state = hold.carry, self.states[hold.carry.state]
        if not carry.x:
            super().start(hold)
            return
        name = self.declare(carry).text
        self.before.append(f"{name} = tl.full([{self.whole(carry)}], {state.init!r}, tl.float32)")
        taken = self.gone_through(carry, f"{name} = {self.put_in(name, self.given(hold))}")
        self.before += [f"if HAS_{hold.source.upper()}:", *(f"    {line}" for line in taken)]

    def whole(self, carry: Carry) -> str:
        """Prints the shape of all that a carry holds."""
        return f"G{carry.x}, B{carry.x}, B{carry.y}" if carry.x else ", ".join(f"B{d}" for d in (carry.y,) if d)

    def held(self, carry: Carry) -> str:
        """Prints what a carry holds; of a matrix the rows at hand."""
        name = super().held(carry)
        return f"tl.sum(tl.where((o_g == j)[:, None, None], {name}, 0.0), axis=0)" if carry.x else name

    @staticmethod
    def put_in(name: str, rows: str) -> str:
        """Prints a matrix with its rows at hand replaced."""
        return f"tl.where((o_g == j)[:, None, None], {rows}[None, :, :], {name})"

    def gone_through(self, carry: Carry, line: str) -> list[str]:
        """Prints a statement about all that a carry holds, a few rows at a time."""
        return ["for j in range(ROWS):", *(f"    {x}" for x in (*self.at_hand, line))] if carry.x else [line]

    @property
    def at_hand(self) -> list[str]:
        """Prints offsets and masks of the rows at hand."""
        row = self.rows.lower()
        return [f"o_{row} = j * B{self.rows} + tl.arange(0, B{self.rows})", f"m_{row} = o_{row} < {self.rows}"]

    def body(self) -> list[str]:
        """Prints a block of tokens, and what stands before and after its loop."""
        out, k = self.block, self.kernel
        own = [h for h in k.holds if not h.met]
        for hold in own:
            self.start(hold)
        for hold in k.holds:
            self.begin(hold)
        # what reads only states that are made again goes first, and they are gone when the others come; what is handed on is one row
        # of what a scan makes, so it goes right behind it
        for store in (x for x in k.stores if not self.reads_carried(x.value)):
            self.put(store)
        for hold in own:
            self.hand_on(hold.carry)
        for store in (x for x in k.stores if self.reads_carried(x.value)):
            self.put(store)
        for hold in own:
            self.finish(hold)
        self.parts |= {"rows": [*self.at_hand, *out.inside] if self.rows else [], "last": out.last}
        return out.first

    def reads_carried(self, e: Expr) -> bool:
        """Tells whether a value reads a state that goes from block to block."""
        return any(self.states[n.name].reverse == self.kernel.reverse for n in E.reads(e, "readout"))

    def put(self, store: Store) -> None:
        """Prints a store, or a part of the sum that is stored after the last block."""
        out = self.block
        if store.summed:
            self.add(store)
            return
        value = out.wide(store.value)
        with out.section(store.buffer.dims, store.value):
            self.write(store.buffer, (ROW, *out.order(store.buffer.dims)), value)

    def begin(self, hold: Hold) -> None:
        """Prints the state that the block begins from: what is carried, or what the forward kept."""
        out, carry, state = self.block, hold.carry, self.states[hold.carry.state]
        axes = out.order(state.dims)
        with out.section(state.dims, *state.operands):
            if hold.met:
                mask = out.mask(axes)
                load = f"tl.load({self.marked(hold.source, carry)}" + (f", mask={mask}, other=0.0)" if mask else ")")
                out.edges[state.name] = out.let(f"b_{state.name}_0", f"{load}.to(tl.float32)", axes).text
                return
            held = self.held(carry)
            held = out.let(f"b_{state.name}_0", held, axes).text if carry.x else held
            out.edges[state.name] = held
            if hold.mark:
                alone, mask = self.alone(self.top, axes), out.mask(axes)
                store = f"tl.store({self.marked(hold.mark, carry)}, {held}" + (f", mask={mask})" if mask else ")")
                out.lines += [f"if {alone}:", f"    {store}"] if alone else [store]

    def hand_on(self, carry: Carry) -> None:
        """Prints what the next block begins from."""
        out, state = self.block, self.states[carry.state]
        now = out.scan(state).now
        end = out.spread(Tile("(o_c == 0)" if carry.reverse else "(o_c == BT - 1)", (ROW,)), now.axes)
        with out.section(state.dims, *state.operands):
            out.prelude.add("lg_row")
            new = f"lg_row({now.text}, {end})"
            out.lines.append(f"b_{state.name} = {self.put_in(f'b_{state.name}', new) if carry.x else new}")

    def add(self, store: Store) -> None:
        """Prints the sum of a value over the program's tokens, stored after the last block."""
        out, b = self.block, store.buffer
        axes = out.order(b.dims)
        carry = Carry(b.name, out.dim if out.dim in b.dims else "", out.tiled, False, (), ())
        value, full = out.without(store.value, ROW), (ROW, *axes)
        text = out.spread(value, full)
        text = f"tl.sum({text if value.axes == full else f'tl.where({out.mask(full)}, {text}, 0.0)'}, axis=0)"
        out.used.add(name := f"b_{b.name}")
        self.before.append(f"{name} = tl.zeros([{self.whole(carry)}], tl.float32)")
        with out.section(b.dims, store.value):
            out.lines.append(f"{name} += tl.where((o_g == j)[:, None, None], {text}[None, :, :], 0.0)" if carry.x else f"{name} += {text}")
        place = self.place(State(b.name, b.head, b.dims, (), ()), carry)
        at = f"{b.name} + (i_r * HV + i_hv) * {' * '.join(b.dims)} + {place}"
        self.after += self.gone_through(carry, f"tl.store({at}, {self.held(carry)}, mask={out.mask(axes)})")
