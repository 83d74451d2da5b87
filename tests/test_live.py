"""Orders of statements: valid, never worse than as they stand, and where all orders can be tried as good as the best."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from lagen.emit.arrange import arranged
from lagen.passes.live import Step, arrange, peak


def drawn(seed: int, count: int) -> list[Step]:
    """Draws steps that take what earlier ones make."""
    rng = random.Random(seed)
    steps: list[Step] = []
    for i in range(count):
        after = frozenset(j for j in range(i) if rng.random() < 0.4)
        steps.append(Step(rng.choice((0.0, 1.0, 2.0, 4.0)), after, frozenset(j for j in after if rng.random() < 0.8)))
    return steps


def valid(steps: list[Step], order: tuple[int, ...]) -> bool:
    place = {i: n for n, i in enumerate(order)}
    return sorted(order) == list(range(len(steps))) and all(place[j] < place[i] for i, s in enumerate(steps) for j in s.after)


@pytest.mark.parametrize("seed", range(20))
def test_of_few_statements_the_best_order_is_found(seed: int) -> None:
    steps = drawn(seed, 7)
    order = arrange(steps)
    assert valid(steps, order)
    assert peak(steps, order) == min(peak(steps, o) for o in permutations(range(len(steps))) if valid(steps, o))


@pytest.mark.parametrize("seed", range(5))
def test_no_order_is_worse_than_the_given_one(seed: int) -> None:
    steps = drawn(seed, 60)
    for width in (1, 8):
        order = arrange(steps, width)
        assert valid(steps, order) and peak(steps, order) <= peak(steps, range(len(steps)))


def test_what_is_complete_is_stored_before_the_next_tile_is_made() -> None:
    lines = [
        "b_a = tl.load(p_a)  # [BT, BK]",
        "b_s = tl.load(p_s)",
        "b_x = tl.dot(b_a, b_a)  # [BT, BT]",
        "b_y = tl.dot(b_a, b_a) * b_s  # [BT, BT]",
        "if alone:",
        "    tl.store(p_y, b_y)",
        "tl.store(p_x, b_x)",
    ]
    assert arranged(lines, "K", 64) == [lines[0], lines[2], lines[6], lines[1], lines[3], lines[4], lines[5]]
