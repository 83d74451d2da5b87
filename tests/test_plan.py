"""Plans: goldens for one spec a family, facts that hold of every plan, the cut against brute force, and what verify refuses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, combinations

import networkx as nx
import pytest
from random_specs import Recipe
from syrupy.assertion import SnapshotAssertion

from lagen import data
from lagen.ir import expr as E
from lagen.ir.chunk import chunk_graph
from lagen.ir.expr import Expr, walk
from lagen.ir.plan import Buffer, Kernel, Plan, Store
from lagen.ir.recurrence import Adjoint, Recurrence, State, Write, closings, readout
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.cut import cut
from lagen.passes.differentiate import differentiate
from lagen.passes.plan import plan
from lagen.spec import read, read_text

NAMES = [path.stem for path in data.specs()]
PER_VALUE = read_text(Recipe(decay="value").settled().text())


def derived(variant: Variant) -> tuple[Recurrence, Adjoint]:
    recurrence = canonicalise(variant)
    return recurrence, differentiate(recurrence)


def plan_of(name: str) -> Plan:
    return plan(*derived(PER_VALUE if name == "per value" else read(data.spec(name))))


# ---- goldens --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["simple_gla", "gla", "rwkv6", "linear_attention", "mamba2", "efficient_attention", "hedgehog", "per value", "gated_deltanet"]
)
def test_a_plan_reads_as_before(name: str, snapshot: SnapshotAssertion) -> None:
    assert str(plan_of(name)) == snapshot


# ---- facts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simple_gla", "retnet", "lightning"])
def test_a_number_for_a_decay_costs_one_launch_forward_and_few_backward(name: str) -> None:
    made = plan_of(name)
    assert [k.kind for k in made.forward] == ["sweep"]
    assert sum(k.kind == "sweep" for k in made.backward) == 3 and len(made.backward) <= 4
    assert made.saved == ()


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_gets_a_gradient_and_every_output_a_store(name: str) -> None:
    recurrence, adjoint = derived(read(data.spec(name)))
    made = plan(recurrence, adjoint)
    backward = [s.buffer for k in made.backward for s in k.stores]
    for t in recurrence.inputs + recurrence.params:
        (buffer,) = (b for b in backward if b.name == f"d{t.name}")
        assert (buffer.dims, buffer.token) == (t.dims, t.token)
    for kernels in (made.forward, *([made.step] if made.step else [])):
        stored = [s.buffer.name for k in kernels for s in k.stores]
        assert all(stored.count(o) == 1 for o, _ in recurrence.outputs)
    assert bool(made.step) == all(s.causal for s in recurrence.states)


@pytest.mark.parametrize("name", NAMES)
def test_states_begin_and_end_where_they_should(name: str) -> None:
    recurrence, adjoint = derived(read(data.spec(name)))
    made = plan(recurrence, adjoint)
    if not made.step:
        return
    sinks = [h.sink for k in made.forward for h in k.holds if h.sink]
    assert sorted(sinks) == sorted(f"final_{s.name}" for s in recurrence.states)
    back = [h.sink for k in made.backward for h in k.holds if h.sink]
    assert sorted(back) == sorted(f"dinitial_{s.name}" for s in recurrence.states)
    if made.borders:
        assert {k.holds[0].carry.state for k in made.borders} == {s.name for s in recurrence.states + adjoint.states}


@pytest.mark.parametrize("name", ["delta_rule", "gated_deltanet", "comba", "kda", "gated_oja"])
def test_beside_a_sweep_that_solves_no_tile_is_swept_both_ways(name: str) -> None:
    made = plan_of(name)
    swept = [(k.tile, k.reverse) for k in made.backward if k.kind == "sweep" and k.stores and not k.parallel]
    (met,) = [k for k in made.backward if k.parallel]
    assert all((met.tile, way) not in swept for way in (False, True))
    assert {h.carry.state for h in met.holds} == {h.carry.state for k in made.backward for h in k.holds if h.mark}
    late = replace(made, backward=(met, *(k for k in made.backward if k != met)))
    with pytest.raises(AssertionError):
        late.verify()


def test_pair_sums_that_are_taken_off_together_are_loaded_as_one() -> None:
    (met,) = [k for k in plan_of("rwkv7").backward if k.parallel]
    loaded = {n.name for n in walk(*met.values) if n.op == "stored" and n.name.startswith("pairs")}
    assert len(loaded) == 4  # of reads, of both writes, and of the removal key's own read, which is taken off


@pytest.mark.parametrize("name", ["gla", "hgrn2", "metala", "rwkv6", "kda", "gdn2", "dplr", "rwkv7", "gated_oja"])
def test_what_cancels_in_a_decays_gradient_cancels_before_it_is_stored(name: str) -> None:
    backward = plan_of(name).backward
    (gradient,) = {n for n in nodes(backward) if n.op == "suffix"}
    assert all(not n.name.startswith("pairs") for n in walk(*gradient.args) if n.op == "stored")
    tails = [s.value for k in backward if k.kind == "chunks" for s in k.stores if s.value.op == "tail"]
    assert tails and all(x.op in ("tail", "between", "twins", "add", "neg", "mul") or not x.token for t in tails for x in outer(t))


def outer(e: Expr) -> Iterator[Expr]:
    """Yields what a value is made of, without what twins are."""
    yield e
    for a in e.args if e.op != "twins" else ():
        yield from outer(a)


def test_a_pair_sum_takes_in_what_a_token_gives_itself() -> None:
    sweeps = [k for k in plan_of("gla").backward if k.runs]
    assert len(sweeps) == 3 and not [n for n in nodes(tuple(sweeps)) if n.op == "contract"]


def test_both_directions_share_their_pair_weights_where_one_kernel_reads_them() -> None:
    (met,) = [k for k in plan_of("gated_deltanet").backward if k.parallel]
    mixes = {n for s in met.stores for n in walk(s.value) if n.op == "mix"}
    tables = {n.args[0] for n in mixes if n.args[0].op == "flip"}
    assert len(mixes) == 4 and len(tables) == 2
    assert {t.args[0].args for t in tables} == {n.args[:2] for n in mixes if n.args[0] not in tables}
    assert not [n for n in walk(*met.values) if n.op == "pairs" and n.attr("reverse") == "1"]


def nodes(kernels: tuple[Kernel, ...]) -> list[Expr]:
    return list(walk(*(v for k in kernels for v in k.values)))


def test_what_readers_of_the_undecayed_state_sum_is_that_of_the_token_before() -> None:
    for name, launches in (("rwkv6", 1), ("rwkv7", 2), ("dplr", 2)):
        made = plan_of(name)
        assert any(n.op == "lag" for n in nodes(made.backward)), name
        assert not any(n.op == "mix" and len(n.args) == 4 and n.attr("prev") == "1" for n in nodes(made.backward)), name
        assert sum(k.kind == "chunks" for k in made.backward) == launches, name


def test_an_inverse_lies_above_the_scores_of_its_launch() -> None:
    for name in ("kda", "gdn2"):
        made = plan_of(name)
        assert [s.buffer.name for k in made.forward for s in k.stores if s.value.op in ("pack", "inverse")] == ["scores_k"], name
        assert all("inverse" not in b.name for b in made.saved) and any(n.op == "above" for n in nodes(made.backward)), name


def test_a_sweep_that_solves_loads_its_pair_weights_where_they_are_several() -> None:
    made = plan_of("iplr")
    for k in (k for k in made.forward + made.backward if k.kind == "sweep" and not k.parallel):
        assert not any(n.op == "gram" for n in walk(*k.values)), k.name


def test_row_functions_cross_memory_as_numbers() -> None:
    made = plan_of("efficient_attention")
    assert {b.name: b.dims for b in made.saved if b.token} == {"x0": (), "x1": ()}, "a softmax's maximum and sum, not its vector"
    unit = read_text(Recipe(map="unit", decay="scalar").settled().text())
    prepared = [s.buffer for k in plan(*derived(unit)).forward if k.name.startswith("prepare") for s in k.stores]
    assert prepared and all(b.dims == () for b in prepared)


def test_what_changes_a_vectors_size_is_said_to_run_in_torch() -> None:
    made = plan_of("hedgehog")
    torch = [k for k in made.forward + made.backward if k.kind == "torch"]
    assert torch and all("sizes change" in k.why for k in torch)


@pytest.mark.parametrize("name", NAMES)
def test_no_sweep_has_work_that_changes_a_vectors_size(name: str) -> None:
    made = plan_of(name)
    for k in (k for k in made.forward + made.backward + made.borders if k.kind in ("sweep", "chunks")):
        assert not any(n.op in ("concat", "taylor2", "quad", "rename", "part", "softmax", "readout") for n in walk(*k.values)), k.name


@pytest.mark.parametrize("name", ["gla", "mamba2", "rwkv6", "linear_attention"])
def test_the_graph_of_a_chunk_is_acyclic_and_printed(name: str) -> None:
    made = plan_of(name)
    roots = {s.buffer.name: s.value for k in made.forward + made.backward if k.kind == "sweep" for s in k.stores}
    graph = chunk_graph(roots)
    assert nx.is_directed_acyclic_graph(graph)
    assert {text for _, text in graph.nodes(data="output") if text} <= set(roots)
    assert all(text for _, text in graph.nodes(data="text"))
    order = list(nx.topological_sort(graph))
    assert all(order.index(a) < order.index(n) for n in order for a in n.args)


# ---- the cut --------------------------------------------------------------------------------------------------------------------


def leaf(name: str, *dims: str) -> Expr:
    return E.leaf("input", name, dims, token=True)


def size(n: Expr) -> float:
    return (4.0, 256.0, 65536.0)[len(n.dims)]


def test_a_number_is_stored_where_a_vector_would_do() -> None:
    x = leaf("x", "K")
    peak = E.reduce("rowmax", x)
    y = E.call("exp", E.sub(x, peak))
    total = E.reduce("sum", y)
    found = cut([E.div(y, total)], early=lambda n: n.op in ("sum", "rowmax"), cost=lambda n: size(n) if n == x else 2 * size(n))
    assert found == {x, peak, total}


def test_a_vector_is_stored_where_it_is_less_than_what_it_is_made_of() -> None:
    x, y, z = (leaf(n, "K") for n in "xyz")
    total = E.add(x, y, z)
    assert cut([E.call("exp", total)], early=lambda n: False, cost=size) != {x, y, z}
    assert len(cut([E.call("exp", total)], early=lambda n: False, cost=size)) == 1


def test_what_is_wanted_early_alone_is_stored() -> None:
    number = E.reduce("sum", leaf("x", "K"))
    assert cut([number], early=lambda n: n.op == "sum", cost=size) == {number}
    assert cut([E.ONE], early=lambda n: False, cost=size) == set()


def enough(chosen: set[Expr], wanted: list[Expr], early: Callable[[Expr], bool]) -> bool:
    """Tells whether ``wanted`` can be computed late from what is chosen."""

    def late(n: Expr) -> bool:
        return n in chosen or (bool(n.args) and not early(n) and all(late(a) for a in n.args))

    return all(late(n) for n in wanted)


@pytest.mark.parametrize("seed", range(25))
def test_the_cut_is_the_cheapest_of_all_choices(seed: int) -> None:
    draw = random.Random(seed)
    nodes = [leaf(f"x{i}", *draw.choice(((), ("K",)))) for i in range(3)]
    while len(nodes) < 9:
        a, b = draw.choice(nodes), draw.choice(nodes)
        single = E.reduce("sum", a) if a.dims else E.call("sin", a)
        nodes.append(draw.choice([E.call("add", a, b), E.call("exp", a), E.call("mul", a, b), single]))
    wanted = list(dict.fromkeys(draw.sample(nodes[3:], 2)))
    reached = [n for n in walk(*wanted)]
    prices = {n: size(n) * draw.choice((1, 2, 3)) + draw.random() for n in reached}

    def early(n: Expr) -> bool:
        return n.op == "sum"

    found = cut(wanted, early, prices.__getitem__)
    assert enough(found, wanted, early)
    choices = chain.from_iterable(combinations(reached, n) for n in range(len(reached) + 1))
    best = min(sum(prices[n] for n in c) for c in choices if enough(set(c), wanted, early))
    assert sum(prices[n] for n in found) == pytest.approx(best)


# ---- verify ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gla", "mamba2", "hedgehog", "efficient_attention"])
def test_a_plan_that_loses_a_launch_or_a_saved_value_is_refused(name: str) -> None:
    made = plan_of(name)
    made.verify()
    needed = 0
    for pass_ in ("forward", "backward"):
        kernels: tuple[Kernel, ...] = getattr(made, pass_)
        for i in range(len(kernels)):
            broken = replace(made, **{pass_: kernels[:i] + kernels[i + 1 :]})
            feeds = {s.buffer.name for s in kernels[i].stores} | {h.sink for h in kernels[i].holds if h.sink}
            feeds |= {h.mark for h in kernels[i].holds if h.mark}
            nodes = [n for k in (*kernels[i + 1 :], *(made.borders if pass_ == "backward" else ())) for n in walk(*k.values)]
            later = {n.name for n in nodes} | {f"mark_{s}" for n in nodes if n.op == "suffix" for s, _ in closings(n)}
            if feeds & (later | ({b.name for b in made.saved} if pass_ == "forward" else set())):
                needed += 1
                with pytest.raises(AssertionError):
                    broken.verify()
        if len(kernels) > 1:
            with pytest.raises(AssertionError):
                replace(made, **{pass_: (*kernels, kernels[0])}).verify()
    assert needed >= 1


def test_a_plan_with_a_foreign_tile_or_a_value_from_nowhere_is_refused() -> None:
    made = plan_of("simple_gla")
    (sweep,) = made.forward
    with pytest.raises(AssertionError, match="on the grid"):
        replace(made, forward=(replace(sweep, tile="Q", holds=()),)).verify()
    stray = Buffer("stray", "H", ("K",), True, "input")
    with pytest.raises(AssertionError, match="which no earlier launch stored"):
        replace(made, forward=(replace(sweep, stores=(Store(replace(stray, name="o"), stray.leaf),)),)).verify()
    with pytest.raises(AssertionError, match="saved but never stored"):
        replace(made, saved=(stray,)).verify()
    with pytest.raises(AssertionError, match="not tiled along"):
        replace(made, forward=(replace(sweep, tile="K"),)).verify()


K, V, G = leaf("k", "K"), leaf("v", "V"), leaf("g")


def with_state(recurrence: Recurrence, **changes: object) -> Recurrence:
    state = State("S", "H", ("K", "V"), (G,), (Write(K, V),))
    return replace(recurrence, states=(replace(state, **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"writes": (Write(V, K),)},
        {"writes": (Write(K, E.ONE),)},
        {"decay": (leaf("w", "M"),)},
        {"decay": (E.outer(K, V), leaf("g", ""))},
        {"decay": (readout(State("Z", "H", ("K",), (), ()), K, "K", "now"),)},
        {"writes": (Write(K, readout(State("S", "H", ("K", "V"), (), ()), K, "K", "now")),)},
    ],
    ids=[
        "sides swapped",
        "a side missing",
        "decay on a strange dim",
        "a dense decay beside another",
        "reads what is not there",
        "reads itself",
    ],
)
def test_a_recurrence_that_is_not_canonical_is_refused(changes: dict[str, object]) -> None:
    recurrence, _ = derived(read(data.spec("simple_gla")))
    with_state(recurrence).verify()
    with pytest.raises(AssertionError):
        with_state(recurrence, **changes).verify()


def test_an_output_that_is_not_canonical_is_refused() -> None:
    recurrence, _ = derived(read(data.spec("simple_gla")))
    never = replace(readout(recurrence.states[0], K, "K", "now"), attrs=(("dim", "K"), ("at", "never")))
    for bad in (E.leaf("past", "S", ("K", "V"), "H", True), E.outer(K, V), never):
        with pytest.raises(AssertionError):
            replace(recurrence, outputs=(("o", bad),)).verify()
