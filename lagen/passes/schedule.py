"""Schedules kernels: the tiles, chunks, warps and stages that a pass takes by rule, and what of them may be chosen instead.

``tiles`` is printed into generated files, so that a call and the tuner have one rule for what nothing was chosen for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lagen.ir.chunk import is_leveled
from lagen.ir.expr import walk
from lagen.ir.plan import Kernel, Plan
from lagen.ir.recurrence import closings
from lagen.ir.tunable import CHUNK, AtMost, Tunable, Tunables

_VALUES = 24
"""Vectors a token that a sweep of vector states computes in tiles of 64 without spilling."""

_SCANNED = 48
"""Vectors and matrices a token that a scan of matrix states computes for 16 tokens without spilling."""

_OPERANDS = 8
"""Matrix operands that a sweep of 64-wide tiles keeps in flight without spilling (8 warps, 128 x 128 states, bf16)."""

FUSED = 1 << 20
"""A segment longer than any sequence: the scan is not cut."""

_STATES = 32_768
"""Floats of states that the registers of one program may hold: half of all that a processor has."""


def widest_tile(k: Kernel) -> int:
    """Returns the widest tile of a kernel's grid dim, judged by the matrices it has in flight."""
    if k.kind in ("scan", "step"):  # a lane of its own for every number of a token: a wider tile has more warps; no matmuls
        return 64
    operands = {n for n in walk(*k.values) if n.op in ("input", "stored") and n.dims}
    if k.kind == "chunks":  # pair sums have a table beside their vectors, which scores become
        return 64 if sum(1 if n.op == "gram" else 2 for n in set(walk(*k.values)) if is_leveled(n)) <= 2 else 32
    matrices = sum(bool(h.carry.x and h.carry.y) for h in k.holds if not h.met)
    values = len({n for n in walk(*k.values) if n.dims and n.token})
    if k.kind == "sweep" and not matrices and values > _VALUES:  # vector states alone: all that a token computes is alive at once
        return 32 if values <= 2 * _VALUES else 16
    met = sum(len(closings(n)) for n in set(walk(*k.values)) if n.op == "suffix" and n.dims)  # states, as the chunk begins
    pairs = sum(n.op == "mix" and bool(n.dims) for n in set(walk(*k.values)))
    tables = pairs if any(n.op == "gram" for n in walk(*k.values)) else 0  # pair scores computed here stay in registers, C x C each
    return 64 if matrices <= 1 and len(operands) + met <= _OPERANDS and tables <= 1 else 32


def default_chunk(kernels: Sequence[Kernel], chunk: int) -> int:
    """Returns the default chunk of a variant's ``kernels``: a scan's tokens lie in the registers of one thread."""
    scans = [k for k in kernels if k.kind == "scan"]
    values = max((len({n for n in walk(*k.values) if n.dims}) for k in scans), default=0)
    return min(chunk, 8 if values > _SCANNED else 16) if scans else chunk


def is_narrow(k: Kernel) -> bool:
    """Tells whether a kernel runs on 4 warps at any size: beside the tables of its pairs, of which every 4 warps hold all rows."""
    return k.parallel and any(n.op == "mix" and len(n.args) == 3 and n.dims for n in walk(*k.values))


def is_sum(k: Kernel) -> bool:
    """Tells whether a kernel adds to a matrix state that nothing decays: where its loop also stores that state, sm_100 wants one stage."""
    carry = k.holds[0].carry
    return bool(carry.x and carry.y) and not carry.factors


def tiles(target: str, chunk: int, itemsize: int, longest: int) -> tuple[int, int, int, int]:
    """Returns chunk, tile on the grid, warps and stages where nothing was chosen; ``longest`` is the longest dim held whole."""
    # what compiles without spills at 128 x 128 in bf16 (chunks of 64 fill a wgmma)
    table = {
        "cuda:90": (64, 64, 8, 2),
        "cuda:100": (64, 64, 8, 2),
        "cuda:120": (16, 32, 8, 2),
        "cuda": (32, 32, 8, 2),
        "hip": (32, 32, 4, 1),
        "interpreter": (64, 64, 4, 1),
    }
    name = target if target in table else target.split(":")[0]
    most, tile, warps, stages = table[name]
    if longest > 128 and name in ("cuda", "cuda:120"):
        most, tile, stages = 16, 16, 1
    if itemsize > 2 and name != "interpreter":
        most, tile, stages = min(most, 32), min(tile, 32), 1
    return min(chunk, most), tile, warps, stages


def held_whole(plan: Plan) -> tuple[str, ...]:
    """Lists the dims of states that kernels hold whole beside a tile of another."""
    carried = ((k, d) for k in plan.forward + plan.backward for h in k.holds for d in (h.carry.x, h.carry.y))
    return tuple(dict.fromkeys(d for k, d in carried if d and d != k.tile))


def place(k: Kernel) -> str:
    """Names the tile that a kernel takes; kernels of a pass that name the same take the same."""
    return f"chunks {k.tile}" if k.kind == "chunks" else k.tile


def widest(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Returns the widest tile by place: of all kernels that share it, the least."""
    found: dict[str, int] = {}
    for k in kernels:
        if k.tile and k.kind != "tokens":
            found[place(k)] = min(found.get(place(k), 64), widest_tile(k))
    return found


def kernels_of(plan: Plan, of: str) -> tuple[Kernel, ...]:
    """Lists the launches that a pass may make."""
    own = {"forward": plan.forward, "backward": plan.backward, "step": plan.step}[of]
    held = {h.carry.state for k in plan.forward for h in k.holds}
    cuts = {"forward": [k for k in plan.borders if k.holds[0].carry.state in held], "backward": plan.borders, "step": ()}[of]
    return (*cuts, *own)


def tunables(plan: Plan, of: str, target: str, chunks: Sequence[int], chunk: int, itemsize: int, sizes: Mapping[str, int]) -> Tunables:
    """Returns what may be chosen of one pass on a GPU: the tile of each dim on the grid, how a scan is cut, warps and stages.

    The chunk is shared with the other passes, for tensors of its shape go from one to the other. ``chunks`` are those that the variant
    allows and ``chunk`` its default; ``sizes`` gives every dim's size.
    """
    kernels = kernels_of(plan, of)
    scans = [k for k in kernels if k.kind not in ("tokens", "torch")]
    if not scans:
        return Tunables(())
    scanned = any(k.kind == "scan" for k in scans)
    whole = max((sizes[d] for d in held_whole(plan)), default=1)
    most, tile, _, stages = tiles(target, default_chunk(plan.forward + plan.backward, chunk), itemsize, whole)
    found: list[Tunable] = []
    limits: list[AtMost] = []
    for where, cap in widest(kernels).items():
        dim = where.rpartition(" ")[2]
        block = min(256, max(16, 1 << (sizes[dim] - 1).bit_length()))
        values = tuple(v for v in (16, 32, 64, 128) if v <= block)
        found.append(Tunable(f"{of} {where}", values, min(block, tile, cap), f"how much of {dim} one program takes"))
        held = max((_held(k, sizes) for k in scans if place(k) == where), default=0)
        if held:
            limits.append(AtMost((f"{of} {where}",), max(16, _STATES // held), f"states of {held} rows would not fit the registers"))
    if of != "step":
        least = 16 if itemsize <= 2 else min(16, most)
        lengths = sorted({c for c in (*chunks, most) if least <= c <= 64}) if not scanned else (4, 8, 16, 32)
        taken = "tokens that are taken together" + ("" if scanned else " by matrix products")
        found.append(Tunable(CHUNK, tuple(lengths), most, taken))
    if plan.borders and of != "step":
        found.append(Tunable(f"{of} segment", (0, 1, 8, 32, FUSED), 0, "chunks that one program runs through; 0: as the shape asks"))
    if not scanned:  # whose tile says how many
        found.append(Tunable(f"{of} warps", (0, 4, 8), 0, "warps of a program; 0: as its largest dim asks", static=False))
    found.append(Tunable(f"{of} stages", tuple(sorted({1, 2, 3, stages})), stages, "chunks whose loads are under way", static=False))
    return Tunables(tuple(found), tuple(limits))


def _held(k: Kernel, sizes: Mapping[str, int]) -> int:
    """Returns how many floats of matrix states a kernel holds for each place of its tile."""
    held = [h.carry for h in k.holds if not h.met and h.carry.x and h.carry.y]
    return sum(math.prod(sizes[d] for d in (c.x, c.y) if d != k.tile) for c in held)
