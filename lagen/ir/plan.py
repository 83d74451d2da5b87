"""Plan: which launches a pass makes, what each holds, loads and stores. No tile sizes (they are a launch's config) and no text.

A *sweep* runs over the chunks of a sequence, forward or reversed, with its carries in registers; one dim (``tile``) is on the grid, all
others are whole. Where all carries are kept elsewhere it is *parallel*: a program has one chunk. A *tokens* kernel has no carry:
token-wise work before (prepare) or after (finish) the sweeps. Work that changes a vector's size runs as torch operations (*torch*),
which is a fact of the plan, not of a failure. A *chunks* kernel stores what a decay on a whole dim makes of a chunk (pair scores,
vectors under decay), looping over that dim; sweeps then need no exponents for it.
A *scan* is for states that have no matmul form (passes/scans): its values are those of ir/recurrence, not lowered to pairs.

Who makes it: passes/plan. Who reads it: passes/schedule, emit/, explain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lagen.ir.chunk import Carry
from lagen.ir.expr import Expr, reads, show, walk
from lagen.ir.recurrence import State, closings


@dataclass(frozen=True)
class Buffer:
    """A tensor that launches read or write.

    ``token``: [B, T, head, *dims]; else [B, head, *dims] for states, [head, *dims] for params. ``partial`` names the tile dim whose
    programs each store their share, in a leading axis. ``dtype``: input (that of the first input), float32, or own (the tensor's).
    """

    name: str
    head: str
    dims: tuple[str, ...]
    token: bool
    dtype: str
    partial: str = ""
    per: str = ""  # "chunk": one row a chunk, not a token

    @property
    def leaf(self) -> Expr:
        """Returns the buffer as an operand."""
        attrs = tuple((k, v) for k, v in (("partial", self.partial), ("per", self.per)) if v)
        token = self.token and not self.per
        return Expr("stored", name=self.name, dims=tuple(sorted(self.dims)), head=self.head, token=token, attrs=attrs)


@dataclass(frozen=True)
class Store:
    """One value written to a buffer; ``summed`` over all tokens of the program (a param's gradient)."""

    buffer: Buffer
    value: Expr
    summed: bool = False


@dataclass(frozen=True)
class Hold:
    """A carry with the buffers it starts from and ends in ("" for none): initial and final states, or their gradients.

    ``mark`` is the buffer that keeps it as each chunk begins, for who meets it there (suffix in ir/chunk); of a carry that is read from
    such a buffer, chunk by chunk, that is the source.
    """

    carry: Carry
    source: str
    sink: str
    mark: str = ""

    @property
    def met(self) -> bool:
        """Tells whether the carry is read from what was kept as each chunk begins: it needs no registers across chunks."""
        return self.source.startswith("mark_")


@dataclass(frozen=True)
class Kernel:
    """One launch. ``kind``: sweep, scan, chunks, tokens, torch or step. ``why`` says in words what made the plan choose it."""

    name: str
    kind: str
    stores: tuple[Store, ...]
    why: str
    tile: str = ""
    reverse: bool = False
    holds: tuple[Hold, ...] = ()
    states: tuple[State, ...] = ()  # of a step: what it advances by a token
    launch: str = ""  # sweeps that name the same are roles of one launch

    @property
    def values(self) -> list[Expr]:
        """Lists what the kernel computes: what it stores, and what its carries take."""
        carries = [h.carry for h in self.holds]
        terms = [x for c in carries for t in c.terms for x in (t.near, t.far)]
        stepped = [x for s in self.states for x in s.operands]
        return [s.value for s in self.stores] + terms + [f for c in carries for f in c.factors] + stepped

    @property
    def runs(self) -> bool:
        """Tells whether programs go from chunk to chunk with states in their registers."""
        return self.kind in ("sweep", "scan")

    @property
    def late(self) -> bool:
        """Tells whether a step's launch only advances what several programs of an earlier one read."""
        return self.kind == "step" and not self.stores

    @property
    def tile_key(self) -> tuple[bool, str]:
        """Returns what tells a pass's sweeps apart: the direction, and the dim on the grid."""
        return self.reverse, self.tile

    @property
    def parallel(self) -> bool:
        """Tells whether nothing runs from chunk to chunk: a program has one."""
        return self.kind == "sweep" and bool(self.holds) and not any(h.carry.updated for h in self.holds)

    def map(self, f: Callable[[Expr], Expr]) -> Kernel:
        """Returns the kernel with ``f`` applied to every value."""
        holds = tuple(replace(h, carry=h.carry.map(f)) for h in self.holds)
        stores, states = tuple(replace(s, value=f(s.value)) for s in self.stores), tuple(s.map(f) for s in self.states)
        return replace(self, stores=stores, holds=holds, states=states)

    def __str__(self) -> str:
        way = "reverse " if self.reverse else "parallel " if self.parallel else ""
        where = (f", {self.tile} on the grid" if self.tile else "") + (f", a role of {self.launch}" if self.launch else "")
        lines = [f"{self.name}: {way}{self.kind}{where}   # {self.why}"]
        lines += [f"    hold  {h.carry}" + (", marked" if h.mark else "") for h in self.holds]
        lines += [f"    move  {s}" for s in self.states]
        for s in self.stores:
            lines.append(f"    {'sum  ' if s.summed else 'store'} {s.buffer.name} = {show(s.value)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """The launches of forward, backward and step, in order.

    ``saved`` are buffers that forward keeps for backward; ``states`` are forward and reverse states over what is prepared.
    """

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    step: tuple[Kernel, ...]
    saved: tuple[Buffer, ...]
    states: tuple[State, ...]
    borders: tuple[Kernel, ...] = ()  # by state, what a scan cut into segments launches first; none where it cannot be cut

    def verify(self) -> None:
        """Raises AssertionError naming a launch that loads what no earlier one stored, a value stored twice, or a tile that is no dim."""
        made = _made(self.forward, set())
        kept = {b.name for b in self.saved}
        assert kept <= made, f"{self.name}: saved but never stored: {sorted(kept - made)}"
        assert len(kept) == len(self.saved), f"{self.name}: saved twice: {[b.name for b in self.saved]}"
        # outputs come back to the backward whether they were saved or not
        undone = _made(self.backward, kept | {s.buffer.name for k in self.forward for s in k.stores if s.buffer.dtype == "input"})
        _made(self.step, set())
        _made(self.borders, made | undone)

    def __str__(self) -> str:
        parts = [f"plan {self.name}"]
        for title, kernels in (("borders", self.borders), ("forward", self.forward), ("backward", self.backward), ("step", self.step)):
            parts += [title, *(f"  {line}" for k in kernels for line in str(k).splitlines())]
        return "\n".join(parts)


def _made(kernels: tuple[Kernel, ...], given: set[str]) -> set[str]:
    """Checks the launches of one pass in order and returns the names of all that they store; raises AssertionError."""
    made: set[str] = set()
    for k in kernels:
        dims = {d for s in k.stores for d in s.buffer.dims} | {d for h in k.holds for d in (h.carry.x, h.carry.y)}
        dims |= {d for v in k.values for n in walk(v) for d in n.dims} | {n.attr("dim") for v in k.values for n in reads(v, "readout")}
        assert k.tile in dims | {""}, f"{k.name}: {k.tile} is on the grid and none of its dims"
        for n in (n for v in k.values for n in reads(v, "stored")):
            assert n.name in made | given, f"{k.name} loads {n.name}, which no earlier launch stored"
            beside = [x.name for x in kernels if k.launch and x.launch == k.launch and n.name in {s.buffer.name for s in x.stores}]
            assert not beside, f"{k.name} loads {n.name}, which {beside[0]} stores at the same time"
        met = [s for v in k.values for n in reads(v, "suffix") for s, _ in closings(n)]
        for name in (*met, *(h.carry.state for h in k.holds if h.met)):
            assert f"mark_{name}" in made | given, f"{k.name} meets {name}, which no earlier launch kept"
        assert all(s.buffer.partial in ("", k.tile) for s in k.stores), f"{k.name}: shares of a dim that is not on its grid"
        wide = [s.buffer.name for s in k.stores if s.buffer.partial and s.buffer.partial in s.buffer.dims]
        assert not wide, f"{k.name}: of {wide} a program has its own elements, and no share of the others'"
        assert all(h.carry.y in (k.tile, "") for h in k.holds), f"{k.name}: a carry that is not tiled along {k.tile}"
        own = [s.buffer.name for s in k.stores] + [x for h in k.holds for x in (h.sink, h.mark) if x]
        assert len({*own}) == len(own) and not made & {*own}, f"{k.name} stores again what is stored: {own}"
        made |= {*own}
    return made
