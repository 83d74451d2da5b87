"""Arranges the printed statements of a kernel whose programs have one chunk, so that few tiles are alive at once (passes/live).

Inside a loop addresses stay in registers whatever the order, and compilers move what they like; here the order of loads, matmuls and
stores decides what is alive. Sizes are those of a chunk, 128 of a whole dim and 32 of the one on the grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lagen.passes.live import Step, arrange

_NAME = re.compile(r"(\w+) = (.*)", re.S)
_TILE = re.compile(r"  # \[(.*)\]$")
_PAIRS = re.compile(r"lg_spans\((.*), (\w+), BT, DT, PRECISION\)")


def arranged(lines: Sequence[str], tile: str, chunk: int) -> list[str]:
    """Returns the statements ``lines`` in an order that keeps few tiles alive; ``tile`` is the dim on the grid, ``chunk``
    the tokens of a chunk by default.

    Loads and what a token's numbers give each other stand just before their first use, stores just after what they store.
    """
    blocks = _blocks(lines)
    names = {m[1]: i for i, b in enumerate(blocks) if (m := _NAME.match(b[0]))}
    texts = [_TILE.sub("", "\n".join(b)) for b in blocks]
    needs = [[names[w] for w in dict.fromkeys(re.findall(r"\w+", t)) if w in names and names[w] != i] for i, t in enumerate(texts)]
    sizes = [_size(b[0], tile, min(chunk, 64)) for b in blocks]
    unseen = _unseen(texts, names, needs)
    sizes = [0.0 if i in unseen else size for i, size in enumerate(sizes)]
    steps = [
        Step(sizes[i], frozenset(needs[i]), frozenset(j for j in needs[i] if sizes[j] and not (_loads(texts[j]) and "tl.dot(" in t)))
        for i, t in enumerate(texts)
    ]
    out: list[str] = []
    done: set[int] = set()

    def put(i: int) -> None:
        if i not in done:
            done.add(i)
            for j in sorted(needs[i]):
                put(j)
            out.extend(blocks[i])

    lazy = {i for i, s in enumerate(steps) if not s.size and i in names.values() and not s.holds}
    for i in arrange(steps):
        if i not in lazy:
            put(i)
    for i in range(len(blocks)):
        put(i)
    return out


def _blocks(lines: Sequence[str]) -> list[list[str]]:
    """Keeps a condition and what it governs together."""
    out: list[list[str]] = []
    for line in lines:
        if line.startswith(" "):
            out[-1].append(line)
        else:
            out.append([line])
    return out


def _loads(text: str) -> bool:
    m = _NAME.match(text)
    return m is not None and m[2].startswith("tl.load(")


def _size(line: str, tile: str, chunk: int) -> float:
    """Returns how many registers of four bytes a statement's tile needs over all threads; numbers of a token count as none."""
    m = _TILE.search(line)
    dims = m[1].split(", ") if m else []
    if len(dims) < 2:
        return 0.0
    whole = math.prod({"BT": chunk, f"B{tile}": 32}.get(d, 128) for d in dims)
    return whole / 2 if _loads(line) or line.endswith(f".to(DT)  # [{m[1]}]") else float(whole)  # type: ignore[index]


def _unseen(texts: Sequence[str], names: dict[str, int], needs: Sequence[Sequence[int]]) -> set[int]:
    """Lists what only the pairs of spans need: in half precision nothing looks at those (lg_spans)."""
    found: set[int] = set()
    users: dict[int, set[int]] = {}
    for i, needed in enumerate(needs):
        for j in needed:
            users.setdefault(j, set()).add(i)
    for i, t in enumerate(texts):
        m = _PAIRS.search(t)
        if m and users.get(names.get(m[2], -1)) == {i}:
            found.add(names[m[2]])
    grown = True
    while grown:
        more = {j for i in found for j in needs[i] if j not in found and users[j] <= found}
        grown = bool(more)
        found |= more
    return found
