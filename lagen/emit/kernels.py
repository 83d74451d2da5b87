"""Prints one planned kernel as Triton source: signature, pointers, states, chunk body, in the skeleton that its kind has."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lagen.emit.arrange import arranged
from lagen.emit.levels import print_levels
from lagen.emit.peaks import next_peak, store_before
from lagen.emit.statements import Statements, Tile
from lagen.emit.step_statements import StepStatements
from lagen.emit.sweep_statements import SweepStatements
from lagen.emit.templates import environment
from lagen.ir import expr as E
from lagen.ir.chunk import COL, ROW, Carry, is_leveled, is_square
from lagen.ir.expr import Expr
from lagen.ir.plan import Buffer, Hold, Kernel, Store
from lagen.ir.recurrence import Recurrence, State, closings


@dataclass(frozen=True)
class Printed:
    """A kernel's source and what its launcher must know: arguments in order (each with the Python text that makes it)."""

    kernel: Kernel
    source: str
    signature: tuple[str, ...]
    tensors: tuple[tuple[str, Buffer | None], ...]  # pointer arguments with strides: inputs, stored, outputs
    states: tuple[tuple[str, State], ...]  # pointer arguments of states (name, layout)
    prelude: tuple[str, ...]
    scaled: bool
    dims: tuple[str, ...]
    sizes: tuple[str, ...]  # dims of which only the size is used
    exactly: bool = False  # some matmuls keep float32's digits whatever the inputs are


def print_kernel(
    kernel: Kernel, recurrence: Recurrence, states: dict[str, State], heads: dict[str, str], top: str, exact: frozenset[str]
) -> Printed:
    """Prints ``kernel``; ``heads`` gives every tensor's head dim, ``top`` is the program's, ``exact`` are the tensors in float32."""
    return KernelPrinter(kernel, recurrence, states, heads, top, exact).print()


def is_looped(kernel: Kernel) -> bool:
    """Tells whether a chunks kernel sums over tiles of its dim in a loop."""
    return kernel.kind == "chunks" and bool(kernel.tile) and any(is_square(s.value) for s in kernel.stores)


class KernelPrinter:
    """The parts of one kernel while it is printed."""

    def __init__(
        self, kernel: Kernel, recurrence: Recurrence, states: dict[str, State], heads: dict[str, str], top: str, exact: frozenset[str]
    ) -> None:
        self.kernel, self.recurrence, self.states, self.heads, self.top = kernel, recurrence, states, heads, top
        self.out = self.statements()
        self.out.exact = exact
        self.out.storage = {t.name: t.dims for t in recurrence.inputs + recurrence.params if len(t.dims) == 2}
        self.before: list[str] = []
        self.exact_matmuls = False
        self.after: list[str] = []
        self.pointers: list[tuple[str, State]] = []
        self.parts: dict[str, list[str]] = {}  # lines that the skeleton of one kind has beside the others

    def statements(self) -> Statements:
        """Makes the statements that the kernel's kind has."""
        roots, names = self.kernel.values, self.recurrence.names
        if self.kernel.kind == "step":
            return StepStatements(names, [s.value for s in self.kernel.stores], self.states)
        if self.kernel.kind == "sweep":
            return SweepStatements(self.kernel, names, roots)
        return Statements(names, roots, rows_end="T - first * BT")

    def body(self) -> list[str]:
        """Prints what the kernel's kind has in its middle."""
        return {"sweep": self.sweep, "step": self.step, "tokens": self.tokens, "chunks": self.chunks}[self.kernel.kind]()

    def print(self) -> Printed:
        """Prints the whole kernel."""
        body = self.body()
        dims = self.dims()
        offsets = self.offsets(dims)
        if self.kernel.kind == "chunks" and self.kernel.tile:  # offsets of the dim that the kernel loops over change with the loop
            body = [x for x in offsets if x.startswith((f"o_{self.kernel.tile.lower()} ", f"m_{self.kernel.tile.lower()} "))] + body
            offsets = [x for x in offsets if x not in body]
        if self.kernel.kind == "chunks":
            offsets = [x for x in offsets if not x.startswith("o_c ")]
        before = offsets + self.out.head + self.bases() + self.before
        signature = self.signature(dims)
        prelude = sorted(self.out.prelude | ({"lg_sequence"} if self.out.rows else set()))
        template = environment().get_template(f"triton/{self.kernel.kind}.py.j2")
        text = "\n".join([*before, *body, *self.after, *(x for lines in self.parts.values() for x in lines)])
        source = template.render(
            kernel=self.kernel,
            looped=is_looped(self.kernel),
            role=bool(self.kernel.launch),
            signature=signature,
            doc=self.doc(),
            used=frozenset(re.findall(r"\w+", text)),
            before=before,
            body=body,
            after=self.after,
            **self.parts,
        )
        tensors = tuple((n, self.buffer(n)) for n in self.tensor_names())
        named = tuple(signature), tensors, tuple(self.pointers), tuple(prelude), self.out.scaled, dims, self.extra(dims)
        return Printed(self.kernel, source, *named, self.exact_matmuls)

    # -- parts --------------------------------------------------------------------------------------------------------------------

    def dims(self) -> tuple[str, ...]:
        """Lists the dims that the kernel's tiles have."""
        found = {d for e in self.out.tiles for d in e.dims} | {d for s in self.kernel.stores for d in s.buffer.dims}
        found |= {d for h in self.kernel.holds for d in (h.carry.x, h.carry.y) if d}
        found |= {d for _, s in self.pointers for d in s.dims}
        return tuple(sorted(found - {COL}))

    def offsets(self, dims: tuple[str, ...]) -> list[str]:
        """Prints offsets and masks."""
        lines = ["o_c = tl.arange(0, BT)"] if self.out.rows else []
        for d in dims:
            tile = f"i_y * B{d} + " if d == self.kernel.tile else ""
            lines += [f"o_{d.lower()} = {tile}tl.arange(0, B{d})", f"m_{d.lower()} = o_{d.lower()} < {d}"]
        return lines

    def buffer(self, name: str) -> Buffer | None:
        """Returns the buffer of a name that the kernel stores, else None."""
        return next((s.buffer for s in self.kernel.stores if s.buffer.name == name), None)

    def tensor_names(self) -> list[str]:
        """Lists the tensors with strides: loads in order of use, then stores."""
        return list(dict.fromkeys([*self.out.loads, *(s.buffer.name for s in self.kernel.stores)]))

    def bases(self) -> list[str]:
        """Prints the pointer of each tensor to this program's batch element and head (and tile, where tiles store their shares)."""
        lines = []
        partial = {s.buffer.name for s in self.kernel.stores if s.buffer.partial}
        for name in self.tensor_names():
            leaf = self.out.loads.get(name)
            stored = self.buffer(name)
            token = stored.token if stored else (leaf.token if leaf is not None else False)
            head = self.index(stored.head if stored else self.heads[name])
            if stored and not token:
                continue
            per = stored.per if stored else dict(leaf.attrs).get("per", "") if leaf is not None else ""
            token = token or bool(per)
            share = name in partial or (leaf is not None and ("partial", self.kernel.tile) in leaf.attrs and self.kernel.tile)
            if token:
                batch = f" + i_b * {name}_sb" + (f" + {head} * {name}_sh" if head else "")
                batch += f" + {'c_0' if per else 't_0'} * {name}_st" if self.out.rows else ""
                lines.append(f"p_{name} = {name}" + batch + (f" + i_y.to(tl.int64) * {name}_sp" if share else ""))
            else:
                assert leaf is not None
                size = " * ".join(leaf.dims)
                if leaf.op == "stored":  # one for each batch element and head
                    state = State(name, self.heads[name], leaf.dims, (), ())
                    lines.append(f"p_{name} = {self.point(name, state, 'i_n')}")
                    continue
                lines.append(f"p_{name} = {name}" + (f" + {head} * {size}" if head and size else f" + {head}" if head else ""))
        return lines

    def index(self, head: str) -> str:
        """Names the head index of a tensor on ``head``."""
        return "" if not head else "i_hv" if head == self.top else "i_h"

    def doc(self) -> list[str]:
        """Prints the kernel's docstring: what it computes."""
        names = {e: n for n, e in self.recurrence.names}
        lines = [f"{self.kernel.why[0].upper()}{self.kernel.why[1:]}."]
        lines += [f"    {x}" for s in self.kernel.states for x in (*s.solves, s)] + [f"    {h.carry}" for h in self.kernel.holds]
        lines += [f"    {s.buffer.name} {'+=' if s.summed else '='} {E.show(s.value, names)}" for s in self.kernel.stores]
        out = []
        for line in lines:
            while len(line) > 130:
                at = line.rfind(" ", 0, 130)
                out.append(line[:at])
                line = "        " + line[at + 1 :]
            out.append(line)
        out[0] = f'"""{out[0]}'
        return [out[0], "", *out[1:], '"""'] if len(out) > 1 else [f'{out[0]}"""']

    def signature(self, dims: tuple[str, ...]) -> list[str]:
        """Prints the parameters, a line a tensor."""
        lines = []
        for name in self.tensor_names():
            leaf, stored = self.out.loads.get(name), self.buffer(name)
            token = stored.token if stored else (leaf.token or bool(dict(leaf.attrs).get("per")) if leaf is not None else False)
            if not token:
                lines.append(name)
                continue
            head = stored.head if stored else self.heads[name]
            part = stored.partial if stored else dict(leaf.attrs).get("partial", "") if leaf is not None else ""
            strides = [f"{name}_sb", f"{name}_st", *([f"{name}_sh"] if head else []), *([f"{name}_sp"] if part else [])]
            lines.append(", ".join([name, *strides]))
        lines += [name for name, _ in self.pointers]
        if self.out.scaled:
            lines.append("scale")
        lines.append("cu_seqlens, NSEQ" if self.out.rows else "slots")
        if self.kernel.kind == "step":
            shared = not self.kernel.late and any(self.alone(s.head, s.dims) for s in self.states.values())
            lines.append("HV, G" + ", NY" * bool(self.kernel.tile) + ", APART: tl.constexpr" * shared)
        elif self.kernel.kind == "chunks":
            lines.append("T, HV, G, NY, NC, LEVELS")
        elif self.kernel.kind == "tokens":
            lines.append("T, HV, G, NC" + (", NY" if self.kernel.tile else "") + "".join(f", N{p}" for p in sorted(self.shares())))
        else:
            lines.append(self.counts())
        if self.out.rows:
            lines.append("BT: tl.constexpr")
        if dims:
            lines += [", ".join(f"{d}: tl.constexpr" for d in dims), ", ".join(f"{b}: tl.constexpr" for b in self.blocks(dims))]
        if self.extra(dims):
            lines.append(", ".join(f"{d}: tl.constexpr" for d in self.extra(dims)))
        lines.append("DT: tl.constexpr, PRECISION: tl.constexpr" + (", EXACT: tl.constexpr" if self.exact_matmuls else ""))
        flags = self.flags()
        if flags:
            lines.append(", ".join(f"{f}: tl.constexpr" for f in flags))
        return lines

    def counts(self) -> str:
        """Lists the parameters that say how a sweep is cut."""
        names = {name.partition("_")[0] for name, _ in self.pointers}
        return "T, HV, G, NY, NSEG, SEG, LEVELS" + (", EVERY, NB" if "border" in names else ", NC" if "mark" in names else "")

    def blocks(self, dims: tuple[str, ...]) -> list[str]:
        """Lists the parameters that say how much of each dim a tile takes."""
        return [f"B{d}" for d in dims]

    def extra(self, dims: tuple[str, ...]) -> tuple[str, ...]:
        """Lists dims that no tile has but whose size a value uses."""
        return tuple(sorted(self.out.sizes - set(dims)))

    def flags(self) -> list[str]:
        """Lists the compile-time facts about optional operands."""
        if not self.kernel.runs:
            return ["IS_VARLEN" if self.out.rows else "HAS_SLOTS"]
        return ["IS_VARLEN", "IS_WIDE", *(f"HAS_{name.upper()}" for name, _ in self.pointers if not name.startswith("mark_"))]

    def shares(self) -> set[str]:
        """Lists the dims whose tiles' shares the kernel sums."""
        return {p for leaf in self.out.loads.values() if (p := dict(leaf.attrs).get("partial", ""))}

    # -- sweeps -------------------------------------------------------------------------------------------------------------------

    def declare(self, carry: Carry) -> Tile:
        """Names a carry's tile."""
        tile = Tile(f"b_{carry.state}", tuple(d for d in (carry.x, carry.y) if d))
        self.out.used.add(tile.text)
        self.out.tiles[carry.value] = tile
        return tile

    def alone(self, head: str, dims: tuple[str, ...] | None = None) -> str:
        """Prints what holds in one program of those that compute one value, on ``head`` and of ``dims``; "" where each has its own."""
        tiled = dims is not None and (self.kernel.runs or self.kernel.kind == "step") and self.kernel.tile not in ("", *dims)
        shared = [] if head == self.top else ["i_hv % G == 0" if head else "i_hv == 0"]
        found = (["i_y == 0"] if tiled else []) + shared
        return found[0] if len(found) == 1 else " & ".join(f"({x})" for x in found)

    def place(self, state: State, carry: Carry) -> str:
        """Prints the offset of a carry's elements in the state's storage [*dims]."""
        if len(state.dims) < 2:
            return f"o_{state.dims[0].lower()}" if state.dims else ""
        row, col = state.dims
        rows, cols = (f"o_{row.lower()}", f"o_{col.lower()}")
        if carry.x == row:
            return f"({rows}[:, None] * {col} + {cols}[None, :])"
        return f"({rows}[None, :] * {col} + {cols}[:, None])"

    def point(self, name: str, state: State, at: str) -> str:
        """Prints the pointer to one state of this program; ``at`` is its row: i_n, the sequence's, or i_r, the segment's."""
        head = self.index(state.head)
        heads = {"i_hv": "HV", "i_h": "(HV // G)", "": "1"}[head]
        index = f"({at}) * {heads} + {head}" if head and " " in at else f"{at} * {heads} + {head}" if head else at
        size = " * ".join(state.dims)
        return f"{name} + ({index}) * {size}" if size else f"{name} + {index}"

    def sweep(self) -> list[str]:
        """Prints a sweep's body, and what stands before and after its loop."""
        out = self.out
        assert isinstance(out, SweepStatements)
        for hold in self.kernel.holds:
            self.start(hold)
            if hold.sink.startswith("border_"):
                self.border(hold)
        for hold in self.kernel.holds:
            if hold.mark:
                self.mark(hold)
        for n in dict.fromkeys(n for s in self.kernel.stores for n in E.reads(s.value, "suffix")):
            self.meet(n)
        news = [(h, self.update(h.carry)) for h in self.kernel.holds if h.carry.updated]
        for store in self.kernel.stores:
            self.store(store)
        body = arranged(out.lines, self.kernel.tile, self.recurrence.chunk_default) if self.kernel.parallel else out.lines
        lines = [*body, *(f"b_{h.carry.state} = {new}" for h, new in news)]
        for hold in self.kernel.holds:
            if not hold.sink.startswith("border_"):
                self.finish(hold)
        return lines

    def start(self, hold: Hold) -> None:
        """Prints how a carry begins: from a given state, else from zeros."""
        carry, state = hold.carry, self.states[hold.carry.state]
        tile = self.declare(carry)
        if hold.met:
            self.take(hold, tile)
            return
        shape = ", ".join(f"B{a}" for a in tile.axes)
        zero = f"tl.full([{shape}], {state.init!r}, tl.float32)" if shape else repr(state.init)
        zero = zero if state.init or not shape else f"tl.zeros([{shape}], tl.float32)"
        if not hold.source:
            self.before.append(f"{tile.text} = {zero}")
            return
        load = self.given(hold)
        self.before += [f"if HAS_{hold.source.upper()}:", f"    {tile.text} = {load}", "else:", f"    {tile.text} = {zero}"]

    def given(self, hold: Hold) -> str:
        """Prints the load of a given state."""
        carry, state = hold.carry, self.states[hold.carry.state]
        self.pointers.append((hold.source, state))
        place, mask = self.place(state, carry), self.out.mask(tuple(d for d in (carry.x, carry.y) if d))
        at = self.point(hold.source, state, "i_r" if carry.updated else "i_n")
        load = f"tl.load({at} + {place}, mask={mask}, other=0.0)" if place else f"tl.load({at})"
        if carry.reverse and state.head != self.top:  # one of the heads that share a state takes its gradient
            load += f" * tl.where({self.alone(state.head)}, 1.0, 0.0)"
        return load

    def take(self, hold: Hold, tile: Tile) -> None:
        """Prints the load of a carry that is kept as the chunk begins."""
        at, mask = self.marked(hold.source, hold.carry), self.out.mask(tile.axes)
        load = f"tl.load({at}, mask={mask}, other=0.0)" if mask else f"tl.load({at})"
        shape = ", ".join(f"B{a}" for a in tile.axes)
        self.out.lines.append(f"{tile.text} = {load}  # [{shape}]" if len(tile.axes) == 2 else f"{tile.text} = {load}")
        raw = Tile(tile.text, tile.axes, raw=True)
        self.out.tiles |= {hold.carry.value: raw, Expr("cast", (hold.carry.value,), dims=hold.carry.value.dims): raw}

    def border(self, hold: Hold) -> None:
        """Prints the store of a carry where a segment begins (reversed: ends)."""
        carry, state = hold.carry, self.states[hold.carry.state]
        axes = tuple(d for d in (carry.x, carry.y) if d)
        place, mask = self.place(state, carry), self.out.mask(axes)
        self.out.head.append("r_0 = bos // (EVERY * BT) + i_n if IS_VARLEN else i_b * NB  # the sequence's first row of borders")
        when = "(i == 0) | ((i_c + 1) % EVERY == 0)" if carry.reverse else "i_c % EVERY == 0"

        def store(row: str) -> str:
            at = self.point(hold.sink, state, row)
            return f"tl.store({at} + {place}, b_{carry.state}, mask={mask})" if place else f"tl.store({at}, b_{carry.state})"

        self.out.lines += [f"if {when}:", f"    {store('r_0 + i_c // EVERY')}"]
        self.after += ["if IS_VARLEN:", "    if count == 0:  # an empty sequence", f"        {store('r_0')}"]
        self.pointers.append((hold.sink, state))

    def mark(self, hold: Hold) -> None:
        """Prints the store of a carry as the chunk begins."""
        carry = hold.carry
        axes = tuple(d for d in (carry.x, carry.y) if d)
        held = self.out.operand_of(carry.value) if len(axes) == 2 else self.out.tiles[carry.value]
        alone, mask = self.alone(self.top, axes), self.out.mask(axes)
        store = f"tl.store({self.marked(hold.mark, carry)}, {held.text}" + (f", mask={mask})" if mask else ")")
        self.out.lines += [f"if {alone}:", f"    {store}"] if alone else [store]

    def marked(self, name: str, carry: Carry) -> str:
        """Prints the pointer to what is kept of a carry as this chunk begins."""
        state = replace(self.states[carry.state], name=name, head=self.top)
        out = self.out
        if (name, state) not in self.pointers:
            self.pointers.append((name, state))
        base = f"p_{name} = {name} + ((i_b * HV + i_hv) * NC + c_0)" + "".join(f" * {d}" for d in state.dims)
        if base not in out.head:
            out.head.append(base)
        # the chunk's share of the offset stands with the lanes', or all of them would hold registers across the loop
        place = self.place(state, carry).removeprefix("(").removesuffix(")")
        chunk = " * ".join(["i_c", *state.dims]) if out.chunked else ""
        at = " + ".join(x for x in (chunk, place) if x)
        return f"p_{name} + ({at})" if at else f"p_{name}"

    def meet(self, n: Expr) -> None:
        """Prints what spans the whole chunk: the state as it begins, met with the reverse state at its end."""
        out = self.out
        assert isinstance(out, SweepStatements)
        parts = []
        for name, back in closings(n):
            carry = next(h.carry for h in self.kernel.holds if h.carry.state == back)
            held, mask = out.wide(carry.value), out.mask(tuple(d for d in (carry.x, carry.y) if d))
            inner = [f for f in carry.factors if not set(f.dims) <= set(n.dims)]
            load = f"tl.load({self.marked(f'mark_{name}', replace(carry, state=name))}" + (f", mask={mask}, other=0.0)" if mask else ")")
            kept = next((out.wide(h.carry.value).text for h in self.kernel.holds if h.carry.state == name), load)
            text = " * ".join([kept, held.text, *(out.spread(out.wide(f), held.axes) for f in inner)])
            axes = list(held.axes)
            for axis in reversed(held.axes):
                if axis not in n.dims:
                    text = f"tl.sum({text}, axis={axes.index(axis)})"
                    axes.remove(axis)
            outer = [out.spread(out.wide(f), n.dims) for f in carry.factors if f not in inner]
            parts.append(out.let("b_met", " * ".join([text, *outer]), n.dims).text)
        out.meetings[n] = parts[0] if len(parts) == 1 else out.let("b_met", " + ".join(parts), n.dims).text

    def update(self, carry: Carry) -> str:
        """Prints a carry's next value, in place of the accumulator, and names it."""
        out = self.out
        held = out.tiles[carry.value]
        if carry.peak is not None:
            return next_peak(out, carry)
        if carry.terms and len(held.axes) == 2 and self.kernel.stores:  # keep the old value as an operand before it is overwritten
            out.operand_of(carry.value)
        text = " * ".join([held.text, *(out.spread(out.wide(f), held.axes) for f in carry.factors)])
        name = text
        for term in carry.terms:
            if carry.x and carry.y:
                left, right = out.operand(term.near), out.operand(term.far)
                text = f"tl.dot(tl.trans({left}), {right}, {name}, input_precision=PRECISION)"
            elif carry.x:
                text = f"{name} + {self.summed(term.near, term.far)}"
            else:
                value = out.guarded(term.far)
                full = (ROW, *held.axes)
                spread = out.spread(value, full) if value.axes else f"tl.where(m_t, {value.text}, 0.0)"
                text = f"{name} + tl.sum({spread}, axis=0)"
            name = out.let(f"{held.text}_n", text, held.axes).text
        return name

    def summed(self, near: Expr, number: Expr) -> str:
        """Prints the sum over a chunk of vectors times a number each: a matmul with 16 equal columns (see make_inter)."""
        out = self.out
        left = out.operand(near)
        text = out.spread(out.guarded(number), (ROW,)) if number != E.ONE else "m_t.to(tl.float32)"
        if number != E.ONE and not out.guarded(number).axes:
            text = f"tl.where(m_t, {text}, 0.0)"
        kept = out.let("b_w", text, (ROW,)).text
        columns = f"tl.broadcast_to({kept}[:, None], [BT, 16]).to(DT)"
        return f"tl.sum(tl.dot(tl.trans({left}), {columns}, input_precision=PRECISION), axis=1) * 0.0625"

    def store(self, store: Store) -> None:
        """Prints a store; partial sums go to their tile's share."""
        out, b = self.out, store.buffer
        if store.value.op == "peak" and store.value.attr("at") == "previous":
            peak = next(h.carry for h in self.kernel.holds if h.carry.peak is not None)
            assert peak.peak is not None, peak
            lines, alone = store_before(out, b, out.tile(peak.peak), out.tiles[peak.value]), self.alone(b.head, b.dims)
            out.lines += [f"if {alone}:", *(f"    {x}" for x in lines)] if alone else lines
            return
        axes = ((ROW,) if out.rows and b.token and not b.per else ()) + tuple(sorted(b.dims))
        value = out.wide(store.value)
        self.write(b, axes, value)

    def write(self, b: Buffer, axes: tuple[str, ...], value: Tile) -> None:
        """Prints the store of a tile."""
        out = self.out
        text = out.spread(value, axes)
        if not value.axes and axes:
            text = value.text
        at = [f"p_{b.name}"]
        if b.per:
            at += [f"i_c * {b.name}_st"] * out.chunked
        elif b.token and out.rows:
            at.append(out.spread(Tile("o_t", (ROW,)), axes) + f" * {b.name}_st")
        at += out.lanes(b.dims, axes)
        alone = "" if b.partial else self.alone(b.head, b.dims)
        mask = out.mask(axes)
        where = " + ".join([at[0]] + ([f"({' + '.join(at[1:])})"] if len(at) > 2 else at[1:]))
        line = f"tl.store({where}, {text}" + (f", mask={mask})" if mask else ")")
        out.lines += [f"if {alone}:", f"    {line}"] if alone else [line]

    def finish(self, hold: Hold) -> None:
        """Prints the store of a carry after the last chunk."""
        if not hold.sink:
            return
        carry, state = hold.carry, self.states[hold.carry.state]
        self.pointers.append((hold.sink, state))
        axes = tuple(d for d in (carry.x, carry.y) if d)
        place, mask = self.place(state, carry), self.out.mask(axes)
        full = carry.reverse  # gradients of states are stored per program head, and summed over the heads that share one
        head = self.top if full else state.head
        at = self.point(hold.sink, State(state.name, head, state.dims, (), ()), "i_n")
        end = "0" if carry.reverse else "last"
        held = self.held(carry)
        text = f"tl.store({at}" + (f" + {place}, {held}, mask={mask})" if place else f", {held})")
        alone = self.alone(head, axes)
        conditions = [f"if HAS_{hold.sink.upper()}:", f"if i_s == {end}:", *([f"if {alone}:"] if alone else [])]
        self.after += ["    " * depth + line for depth, line in enumerate(conditions)]
        self.after += ["    " * len(conditions) + line for line in self.gone_through(carry, text)]

    def held(self, carry: Carry) -> str:
        """Names what a carry holds."""
        return f"b_{carry.state}"

    def gone_through(self, carry: Carry, line: str) -> list[str]:
        """Prints a statement about all that a carry holds."""
        return [line]

    # -- the other skeletons ------------------------------------------------------------------------------------------------------

    def step(self) -> list[str]:
        """Prints one token: old, decayed and new states, then the outputs."""
        out = self.out
        for state in self.states.values():
            name = f"b_{state.name}"
            out.used |= {name, f"{name}_d", f"{name}_n"}
            self.pointers.append((f"state_{state.name}", state))
            axes = state.dims
            at, mask = self.step_place(state, f"state_{state.name}")
            out.lines.append(f"{name} = tl.load({at}, mask={mask}, other=0.0)" if mask else f"{name} = tl.load({at})")
            if state.peak:
                past = " + ".join([name, *(out.spread(out.wide(g), axes) for g in state.decay)])
                out.lines.append(f"{name}_n = tl.maximum({past}, {out.spread(out.wide(state.writes[0].row), axes)})")
                continue
            factors = [out.spread(Tile(f"tl.exp({out.wide(g).text})", out.axes(g)), axes) for g in state.decay]
            out.lines.append(f"{name}_d = " + " * ".join([name, *factors]))
            for u in state.solves:
                out.tiles[u.leaf] = out.let(f"b_{u.leaf.name}", out.wide(u.value).text, out.axes(u.leaf))
            terms = [f"{name}_d"]
            for w in state.writes:
                sides = [out.spread(out.wide(x), axes) for x in (w.row, w.col) if x != E.ONE]
                terms.append(" * ".join(sides or ["1.0"]))
            out.lines.append(f"{name}_n = " + " + ".join(terms))
        for store in self.kernel.stores:
            self.store(store)
        for state in self.states.values():
            alone = self.alone(state.head, state.dims)
            at, mask = self.step_place(state, f"state_{state.name}")
            line = f"tl.store({at}, b_{state.name}_n" + (f", mask={mask})" if mask else ")")
            if alone and not self.kernel.late:  # where several programs read a state, a later launch writes it, once all have
                out.lines += ["if not APART:", f"    {line}"]
            elif not alone:
                out.lines.append(line)
        return out.lines

    def step_place(self, state: State, name: str) -> tuple[str, str]:
        """Prints pointer and mask of a state's tile in the step kernel; ``name`` is the tensor's."""
        out, axes = self.out, state.dims
        place = " + ".join(
            out.spread(Tile(f"o_{d.lower()}", (d,)), axes) + (f" * {axes[1]}" if len(axes) == 2 and i == 0 else "")
            for i, d in enumerate(axes)
        )
        at = self.point(name, state, "i_n")
        return (f"{at} + {place}" if place else at), out.mask(axes)

    def chunks(self) -> list[str]:
        """Prints what a decay makes of a chunk: tiles of its dim are stored in passing, pair scores are summed over them."""
        out = self.out
        summed = [s for s in self.kernel.stores if is_square(s.value)]
        names = {s.value.args[0] if s.value.op == "pack" else s.value: s.buffer.name for s in summed}
        # what takes no level comes first, so that a loop finds few tiles alive
        for store in (plain := [s for s in self.kernel.stores if s not in summed and not any(map(is_leveled, E.walk(s.value)))]):
            self.store(store)
        self.before += (begun := print_levels(out, self.kernel.values, names))
        for store in (s for s in self.kernel.stores if s not in plain):
            if store in summed and begun:  # what is summed over the loop is stored after it
                lines, out.lines = out.lines, []
                self.write(store.buffer, (ROW, COL), out.wide(store.value))
                self.after += out.lines
                out.lines = lines
            else:
                self.store(store)
        self.exact_matmuls = out.exactly or any("EXACT" in x for x in self.after)
        return out.lines

    def tokens(self) -> list[str]:
        """Prints token-wise work; shares of tiles are added up at the load."""
        out = self.out
        for store in self.kernel.stores:
            for n in E.walk(store.value):
                part = dict(n.attrs).get("partial", "") if n.op == "stored" else ""
                if part and n not in out.tiles:
                    single = Statements((), ())
                    single.used = out.used
                    tile = single.load(n)
                    out.loads[n.name] = n
                    shape = ", ".join({ROW: "BT"}.get(a, f"B{a}") for a in tile.axes)
                    load = single.lines[0].split(" = ", 1)[1].split("  #")[0]
                    out.lines += [
                        f"{tile.text} = tl.zeros([{shape}], tl.float32)",
                        f"for i in range(N{part}):",
                        f"    {tile.text} += {load}",
                        f"    p_{n.name} += {n.name}_sp",
                    ]
                    out.tiles[n] = Tile(tile.text, tile.axes)
        for store in self.kernel.stores:
            if store.summed:
                self.add(store)
            else:
                self.store(store)
        return out.lines

    def add(self, store: Store) -> None:
        """Prints the store of a sum over the program's tokens: [blocks, B, head, *dims]."""
        out, b = self.out, store.buffer
        axes = tuple(sorted(b.dims))
        value = out.guarded(store.value)
        full = (ROW, *axes)
        rows = out.spread(value, full)
        text = f"tl.sum({rows if value.axes == full else f'tl.where({out.mask(full)}, {rows}, 0.0)'}, axis=0)"
        size = " * ".join(axes)
        programs = "tl.num_programs(0) // NY" if self.kernel.tile else "tl.num_programs(0)"
        index = f"(c_0 * ({programs} // NC) + i_b * HV + i_hv)"
        at = f"{b.name} + {index}" + (f" * {size} + o_{axes[0].lower()}" if axes else "")
        mask = out.mask(axes)
        out.lines.append(f"tl.store({at}, {text}" + (f", mask={mask})" if mask else ")"))
