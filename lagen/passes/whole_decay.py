"""Takes vector decays on a whole dim out of the sweeps: what such a decay makes of a chunk is computed once and stored.

Pair scores and pair sums under a decay of their vectors' dim cost log2(C) matmuls; vectors under decay cost exponents. Inside a sweep
every tile would repeat them, and they would spill. So a launch of their own, parallel over chunks, stores them; sweeps load. So it is with
the tails of pair sums, in which two of them cancel before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import networkx as nx

from lagen.ir import expr as E
from lagen.ir.chunk import COL, SQUARES, TILE_OPS, is_square
from lagen.ir.expr import LEAVES, ONE, Expr, addends, contract, reads, substitute, walk
from lagen.ir.plan import Buffer, Kernel, Store
from lagen.ir.scalar import FUNCTIONS
from lagen.passes.pair_sums import decay_of, is_pair_sum, partners, tables_of

_HELD = 1
"""Pair weights that a sweep which solves computes in its tiles."""

_SCORES, _TABLES = 4, 2
"""How many pair scores one launch makes, and of how many tables its pair sums are."""


def _gate(n: Expr) -> Expr | None:
    """Returns the vector decay that a value puts on a chunk and that makes it worth storing; None for any other value.

    Those are pair scores and pair sums under decay (log2(C) matmuls), vectors under decay, and a whole chunk's decay.
    """
    if n.op == "gram" and len(n.args) == 3:
        return n.args[2]
    if is_pair_sum(n):  # what is solved inside a sweep hangs on what the sweep carries
        return decay_of(addends(n))
    if n.op == "tail":
        return decay_of(reads(n, "mix"))
    if n.op == "lag":
        return next(x.args[3] for x in walk(n) if x.op == "mix")
    if n.op == "whole" and n.dims:
        return n.args[0]
    if n.op == "mul" and n.args[1].op in ("start", "end") and n.args[1].dims and n.args[0].op in (*LEAVES, "lead", *FUNCTIONS):
        return None if any(x.op in TILE_OPS for x in walk(n.args[0])) else n.args[1].args[0]
    return None


_STEMS = {"gram": "scores", "mix": "pairs", "add": "pairs", "lag": "pairs", "tail": "tails", "whole": "decay"}


def take_inverses(sweeps: tuple[Kernel, ...], head: str, taken: set[str]) -> list[Store]:
    """Stores the inverses by which sweeps solve: each is computed once a chunk, not in every tile."""
    weights = (n.args[0] for k in sweeps for n in walk(*k.values) if n.op == "mix" and n.args[1] == ONE)
    weights = (w.args[0] if w.op == "flip" else w for w in weights)  # a reverse state solves by the forward's, flipped
    found = dict.fromkeys(w for w in weights if w.op in SQUARES)
    names = [f"inverse{i or ''}" for i in range(99) if f"inverse{i or ''}" not in taken]
    taken |= {*names[: len(found)]}
    return [Store(Buffer(name, head, n.dims, True, "input"), n) for name, n in zip(names, found, strict=False)]


def take_tables(sweeps: tuple[Kernel, ...], head: str, taken: set[str]) -> list[Store]:
    """Stores pair weights of sweeps that solve and would compute more of them in every tile than their registers hold.

    With them goes what a token scores with itself.
    """
    found: dict[Expr, None] = {}
    for k in sweeps:
        mixes = [n for n in walk(*k.values) if n.op == "mix" and len(n.args) == 3]
        scored = (n for n in mixes if n.args[1] != ONE and any(x.op == "gram" and len(x.args) == 2 for x in walk(n.args[0])))
        tables = dict.fromkeys(map(weighed, scored))
        if len(tables) > _HELD and not k.parallel and any(n.args[1] == ONE for n in mixes):
            found |= tables
            found |= {n: None for n in walk(*k.values) if n.op == "contract" and all(x.op in LEAVES and x.token for x in n.args)}
    stores = []
    for n in found:
        stem, dtype = ("weights", "input") if n.dims else ("dots", "float32")
        name = next(x for i in range(99) if (x := f"{stem}{i or ''}") not in taken)
        taken.add(name)
        stores.append(Store(Buffer(name, head, n.dims, True, dtype), n))
    return stores


def weighed(mix: Expr) -> Expr:
    """Returns the pair weights of a sum, decayed and masked, as a value of their own."""
    return Expr("weigh", mix.args[:2], dims=(COL,), token=True)


def load_tables(k: Kernel, tables: Sequence[Store]) -> Kernel:
    """Lets a kernel load pair weights."""
    table = {s.value: s.buffer.leaf for s in tables}

    def rule(n: Expr) -> Expr | None:
        if n.op != "mix" or len(n.args) != 3 or weighed(n) not in table:
            return table.get(n)
        return replace(n, args=(table[weighed(n)], ONE, E.rewrite(n.args[2], rule)), _hash=0)

    return k.map(lambda e: E.rewrite(e, rule))


def take_out(
    pass_: str, sweeps: tuple[Kernel, ...], head: str, taken: set[str], solved: frozenset[Expr], inverses: Sequence[Store] = ()
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Makes a launch for each vector decay that acts between pairs: what it makes of a chunk is computed once, not in every tile.

    What loads ``solved`` values of a sweep has launches of its own. ``inverses`` are stored along with the pair scores that they are made
    of, or by a launch of their own. Returns the launches, and the sweeps over what these store: tails of one launch are one.
    """
    gated = [n for s in inverses for n in walk(s.value) if n.op == "gram" and _gate(n) is not None]
    gates = dict.fromkeys(_gate(n) for n in (*gated, *(n for k in sweeps for n in walk(*k.values))) if n.op in ("gram", "mix"))
    stores: dict[Expr, list[Store]] = {g: [] for g in gates if g is not None}
    # what a lag or a tail is made of is no value of its own
    nodes = _outside(lambda n: n.op == "lag" or n.op == "tail" and _gate(n) is not None, (v for k in sweeps for v in k.values))
    inside = {n.args[1] for n in nodes if n.op == "add" and is_pair_sum(n)}  # added to what another launch may have stored
    for n in nodes:
        gate = _gate(n)
        if gate is None or gate not in stores or n in inside:
            continue
        stem = _STEMS.get(n.op) or f"{n.args[0].name or 'x'}_{n.args[1].op}"
        name = next(x for i in range(99) if (x := f"{stem}_{gate.dims[0].lower()}" + (str(i) if i else "")) not in taken)
        taken.add(name)
        dtype, per = ("float32", "chunk") if n.op == "whole" else ("input", "")
        stores[gate].append(Store(Buffer(name, head, n.dims, True, dtype, "", per), n))
    for g in stores:
        stores[g] += [s for s in inverses if any(_gate(n) == g for n in walk(s.value) if n.op == "gram")]
    alone = tuple(s for s in inverses if not any(s in found for found in stores.values()))

    solving = [k for k in sweeps if any(s.buffer.leaf in solved for s in k.stores)]
    needed = {n for k in solving for n in walk(*k.values)}

    # what a sweep that solves takes comes before it, the rest after it, where it can share loads with what takes what was solved; under
    # several decays pair sums take pair scores that another decay's launch stores: all scores come first
    def later(s: Store) -> tuple[bool, bool]:
        after = not solved.isdisjoint(walk(s.value)) or bool(solving) and s.value not in needed and not is_square(s.value)
        return after, len(stores) > 1 and (is_pair_sum(s.value) or s.value.op == "tail")

    kinds = sorted({later(s) for found in stores.values() for s in found})
    rounds = [[(g, [s for s in found if later(s) == kind]) for g, found in stores.items()] for kind in kinds]
    table = {s.value: s.buffer.leaf for found in stores.values() for s in found}
    loaded = {n for k in sweeps for v in k.values for n in walk(substitute(v, table)) if n.op == "stored"}
    out: list[Kernel] = []
    for g, found in (x for r in rounds for x in r):
        for group in _launches(found, loaded):
            group, sweeps = _one_tail(group, sweeps)
            group = tuple(sorted(group, key=lambda s: s.value.op != "tail"))
            stem = f"{pass_}_chunks_{g.dims[0]}".lower()
            count = sum(k.name.startswith(stem) for k in out)
            out.append(
                Kernel(
                    stem + (str(count) if count else ""), "chunks", group, f"what the decay on {g.dims[0]} makes of each chunk", g.dims[0]
                )
            )
    if alone:
        out.insert(0, Kernel(f"{pass_}_inverse".lower(), "chunks", alone, "what every chunk is solved with"))
    return tuple(out), sweeps


def _one_tail(group: tuple[Store, ...], sweeps: tuple[Kernel, ...]) -> tuple[tuple[Store, ...], tuple[Kernel, ...]]:
    """Adds up the tails that a launch stores, and in the sweeps those that are added to each other anyway."""
    mine = [s for s in group if s.value.op == "tail"]
    if len(mine) < 2:
        return group, sweeps
    terms = [s.value for s in mine]
    one = replace(terms[0], args=(E.add(*(t.args[0] for t in terms)),), _hash=0)

    def rule(n: Expr) -> Expr | None:
        found = addends(n) if n.op == "add" else []
        if not all(t in found for t in terms):
            return None
        return E.add(*(E.rewrite(t, rule) for t in found if t not in terms), one)

    made = tuple(k.map(lambda e: E.rewrite(e, rule)) for k in sweeps)
    if any(t in walk(*(v for k in made for v in k.values)) for t in terms):
        return group, sweeps
    return (replace(mine[0], value=one), *(s for s in group if s not in mine)), made


def _outside(stop: Callable[[Expr], bool], values: Iterable[Expr]) -> list[Expr]:
    """Lists the nodes of values, operands before users; what stands below one that stops is left out."""
    out: dict[Expr, None] = {}

    def visit(n: Expr) -> None:
        if n not in out:
            for a in () if stop(n) else n.args:
                visit(a)
            out[n] = None

    for v in values:
        visit(v)
    return list(out)


def _launches(stores: list[Store], loaded: set[Expr]) -> list[tuple[Store, ...]]:
    """Deals stores out to launches, so that what pair sums take fits the registers; ``loaded`` is what sweeps load."""
    groups = _scored([s for s in stores if is_square(s.value)])
    newest = {addends(s.value)[-1]: s for s in stores if is_pair_sum(s.value)}  # a longer sum goes on from a shorter one
    led = {newest[own].value: newest[writers] for own, writers in partners(newest)}
    for s in _shorter_first(stores):
        if s in led.values():
            continue
        more = [s, *([led[s.value]] if s.value in led else [])]  # pair sums of one table are one matmul
        values = [addends(x.value)[-1] if is_pair_sum(x.value) else x.value for x in [*groups[-1], *more]]
        scored = any(is_square(x.value) for x in groups[-1])
        if groups[-1] and (len(tables_of(values)) > (1 if scored else _TABLES) or scored and len(_loads(values)) > 4):
            groups.append(more)
        else:
            groups[-1] += more
    for s in stores:
        if s.value.op == "tail":  # where its sums are in registers
            next((g for g in groups if tables_of([s.value]) <= tables_of(x.value for x in g)), groups[-1]).append(s)
        elif not is_square(s.value) and not is_pair_sum(s.value):  # where what it takes is loaded already
            needs = _loads([s.value])
            next((g for g in groups if needs <= _loads([x.value for x in g])), groups[-1]).append(s)
    # where a longer sum of the same launch goes on from a shorter one, only that one is stored
    passed = [{x.value.args[0] for x in g if x.value.op == "add"} for g in groups]
    return [tuple(s for s in g if s.value not in p or s.buffer.leaf in loaded) for g, p in zip(groups, passed, strict=True) if g]


def _shorter_first(stores: Sequence[Store]) -> list[Store]:
    """Orders pair sums by their newest tables, so that what a longer one goes on from is dealt out before it."""
    sums = [s for s in stores if is_pair_sum(s.value)]
    tables = nx.DiGraph()

    def table(x: Expr) -> frozenset[object]:
        return frozenset(tables_of([x])) or frozenset({x})

    for s in sums:
        *older, newest = map(table, addends(s.value))
        tables.add_node(newest)
        tables.add_edges_from((x, newest) for x in older if x != newest)
    order = list(nx.lexicographical_topological_sort(tables, key=list(tables).index))
    return sorted(sums, key=lambda s: order.index(table(addends(s.value)[-1])))


def _scored(squares: list[Store]) -> list[list[Store]]:
    """Deals pair scores out to launches, those of the same writers together."""

    def tables(stores: Iterable[Store]) -> list[Expr]:
        return [n for n in walk(*(s.value for s in stores)) if n.op == "gram" and _gate(n) is not None]

    writers = [n.args[1] for n in tables(squares)]
    out: list[list[Store]] = [[]]
    for s in sorted(squares, key=lambda s: min([writers.index(n.args[1]) for n in tables([s])], default=0)):
        if len(set(tables([*out[-1], s]))) > _SCORES:
            out.append([])
        out[-1].append(s)
    return out


def _loads(values: Iterable[Expr]) -> set[Expr]:
    """Returns the vectors that a launch loads for ``values``, those of the tokens after apart."""
    return {n for n in _outside(lambda n: n.op == "lead", values) if n.op in (*LEAVES, "lead") and n.dims}


def stored(kernels: tuple[Kernel, ...]) -> dict[Expr, Buffer]:
    """Returns what kernels store, by value."""
    return {s.value: s.buffer for k in kernels for s in k.stores}


def others(stored: dict[Expr, Buffer], k: Kernel) -> dict[Expr, Buffer]:
    """Leaves out what ``k`` stores itself."""
    return {n: b for n, b in stored.items() if b not in [s.buffer for s in k.stores]}


def load(k: Kernel, stored: dict[Expr, Buffer]) -> Kernel:
    """Lets a kernel load what is stored instead of computing it; what a token scores with itself stands in the scores that it loads."""
    table = {n: b.leaf for n, b in stored.items()}
    made = k.map(lambda e: substitute(e, table))
    loaded = set(walk(*made.values))
    own = {pair: Expr("diag", (b.leaf,), token=True) for n, b in stored.items() if b.leaf in loaded for pair in _own(n)}
    return made.map(lambda e: substitute(e, own))


def _own(scores: Expr) -> tuple[Expr, ...]:
    """Lists the inner products that stand on the diagonal of scores under decay."""
    if scores.op != "gram" or len(scores.args) != 3 or scores.attr("prev") == "1":
        return ()
    a, b, _ = scores.args
    return contract(a, b), contract(b, a)
