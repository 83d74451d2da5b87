"""What a server relies on, of every causal spec, by the backend that serves the CPU: steps are the whole, tokens are verified and
committed, a sequence goes on from where it was left."""

from __future__ import annotations

import itertools
import zlib
from functools import cache

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.runtime.operator import Operator
from lagen.spec import read
from lagen.verify import cases, compare, laws
from lagen.verify.cases import Case, Extent
from lagen.verify.laws import Subject
from lagen.verify.oracle import Tensors

VARIANTS = {p.stem: read(p) for p in data.specs()}
NAMES = [name for name, variant in VARIANTS.items() if variant.causal]
SIZES = (("K", 16), ("V", 24))
TOKENS, WORDS = 1000, 64
LIMIT = 2 * compare.limit(torch.float32)  # two results that may each be as far from the recurrence


@cache
def load(name: str) -> Operator:
    return lagen.load(VARIANTS[name], printed=("cpp",))


def many(x: object) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def one(states: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else states


# ---- token by token -------------------------------------------------------------------------------------------------------------


def logits(outputs: tuple[Tensor, ...], head: Tensor) -> Tensor:
    """Projects all that a token gives to one number a word: [.., WORDS]."""
    flat = torch.cat([o.flatten(2) for o in outputs], -1).double()
    return flat @ head[: flat.shape[-1]]


def greedy(op: Operator, case: Case, head: Tensor, rows: int) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Decodes ``rows`` sequences by steps; returns which tokens of the case each took, outputs, states and the words chosen.

    The case is what the words become: one of its tokens for a word at a place, so that no token comes again soon.
    """
    words, state = torch.arange(rows), None
    taken, made, chosen = [], [], []
    for t in range(TOKENS):
        taken.append((words + 7 * t) % TOKENS)
        o, state = op.step(*(x[0, taken[-1]] for x in case.inputs), *case.params, state=state)
        made.append(many(o))
        words = logits(tuple(x[:, None] for x in made[-1]), head)[:, 0].argmax(-1)
        chosen.append(words)
    outputs = tuple(torch.stack(parts, 1) for parts in zip(*made, strict=True))
    return torch.stack(taken, 1), outputs, many(state), torch.stack(chosen, 1)


def drawn() -> list[object]:
    """Lists specs with the regimes that their gates have; where an open gate lets nothing be written there is nothing to compare."""
    quick = ("mild", "no decay", "resets")
    pairs = [(n, r) for n in NAMES for r in cases.regimes(VARIANTS[n]) if (n, r) not in (("hgrn", "no decay"), ("metala", "no decay"))]
    return [pytest.param(n, r, marks=() if r in quick else pytest.mark.slow) for n, r in pairs]


@pytest.mark.parametrize(("name", "regime"), drawn())
def test_greedy_decoding_is_the_chunked_form_over_a_thousand_tokens(name: str, regime: str) -> None:
    variant, op = VARIANTS[name], load(name)
    case = cases.make(variant, Extent(TOKENS, batch=1, heads=2, dims=SIZES), regime)
    head = torch.randn(4096, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    taken, outputs, states, words = greedy(op, case, head, 2)
    o, finals = op(*(x[0, taken] for x in case.inputs), *case.params, output_final_state=True)
    for got, wanted in zip((*outputs, *states), (*many(o), *many(finals)), strict=True):
        assert compare.error(got, wanted) <= LIMIT
    again = logits(many(o), head)
    rounding = 2 * LIMIT * torch.cat([x.flatten(2) for x in many(o)], -1).norm(dim=-1)
    top = again.topk(2).values
    sure = top[..., 0] - top[..., 1] > rounding
    assert torch.equal(again.argmax(-1)[sure], words[sure])
    assert sure.double().mean() > 0.99
    assert len(words.unique()) > 10, "a sequence that says something"


# ---- speculated tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, (3, 0, -1, 5)], ids=["own", "slots"])
@pytest.mark.parametrize("name", NAMES)
def test_verified_tokens_leave_the_state_and_committed_ones_are_steps(name: str, slots: tuple[int, ...] | None) -> None:
    """To the bit, against rows that are alone in their batch and take one token a call."""
    variant, op, tokens, accepted = VARIANTS[name], load(name), 5, (0, 5, 2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.make(variant, Extent(tokens, batch=4, heads=2, dims=SIZES), dtype=dtype)
        pool = cases.make(variant, Extent(1, batch=6 if slots else 4, heads=2, dims=SIZES), carried=True).initial_states
        assert pool is not None
        served = {} if slots is None else {"slots": torch.tensor(slots)}
        mine, left = (tuple(s.clone() for s in pool) for _ in range(2))
        speculated = many(op.verify(*case.inputs, *case.params, one(mine), **served))
        assert all(map(torch.equal, mine, pool))
        op.commit(*case.inputs, *case.params, one(mine), accepted=torch.tensor(accepted), **served)
        for b, place in enumerate(range(4) if slots is None else slots):
            if place < 0:
                assert not any(o[b].any() for o in speculated)
                continue
            own = tuple(s[place : place + 1].clone() for s in pool)
            after = [tuple(s.clone() for s in own)]
            for t in range(tokens):
                o = many(op.step(*(x[b : b + 1, t] for x in case.inputs), *case.params, state=one(own))[0])
                assert all(torch.equal(x[b, t], y[0]) for x, y in zip(speculated, o, strict=True))
                after.append(tuple(s.clone() for s in own))
            for s, row in zip(left, after[accepted[b]], strict=True):
                s[place] = row[0]
        assert all(map(torch.equal, mine, left))
        assert not all(map(torch.equal, mine, pool))


# ---- going on from a state ------------------------------------------------------------------------------------------------------


def stretches(run: laws.Run, lengths: list[int]) -> laws.Run:
    """Runs stretches of tokens one after the other, each from the state that the last one left."""

    def cut(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        made = []
        for part in zip(*(x.split(lengths, 1) for x in inputs), strict=True):
            outputs, states = run(part, params, states)
            made.append(outputs)
        return tuple(torch.cat(parts, 1) for parts in zip(*made, strict=True)), states

    return cut


def ragged(subject: Subject, cuts: tuple[int, ...]) -> laws.Run:
    """Runs the tokens before each row's cut packed in one call, and those behind it in another."""

    def cut(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        time, made = inputs[0].shape[1], []
        for edges in ([(0, c) for c in cuts], [(c, time) for c in cuts]):
            lengths = tuple(end - start for start, end in edges)
            packed = tuple(torch.cat([x[b, start:end] for b, (start, end) in enumerate(edges)])[None] for x in inputs)
            outputs, states = laws.call(subject, None, lengths)(packed, params, states)
            made.append([o[0].split(lengths) for o in outputs])
        rows = [zip(before, behind, strict=True) for before, behind in zip(*made, strict=True)]
        return tuple(torch.stack([torch.cat(pair) for pair in row]) for row in rows), states

    return cut


@pytest.mark.parametrize("name", NAMES)
def test_any_segmentation_is_the_whole_gradients_included(name: str) -> None:
    variant = VARIANTS[name]
    subject, c = Subject(load(name), variant), variant.chunk_default
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for regime in ("mild", "resets"):
        if regime not in cases.regimes(variant):
            continue
        case = cases.make(variant, Extent(2 * c + 9, batch=2, heads=2, dims=SIZES), regime, carried=True)
        whole = laws.tensors(laws.call(subject, None), variant, case)
        anywhere = torch.randint(2 * c + 10, (4,), generator=generator).sort().values.tolist()
        for edges in (anywhere, [1, 2, 2, c, c + 1], [c - 1, 2 * c], "ragged"):
            if edges == "ragged":
                run = ragged(subject, (c + 3, 1))
            else:
                run = stretches(laws.call(subject, None), [b - a for a, b in itertools.pairwise([0, *edges, 2 * c + 9])])
            for key, got in laws.tensors(run, variant, case).items():
                assert compare.error(got, whole[key]) <= LIMIT, (regime, edges, key)
