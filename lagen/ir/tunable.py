"""Tunables: what may be chosen of a schedule; Config: what was chosen. Where it was chosen for is a Target (targets/).

What it is: names with the values they may take, the default among them, and the limits on their combinations, as data. What it is not:
nothing here knows how to search, time or print. Who makes Tunables: the plan of each device language (passes/schedule for GPU
kernels, emit/cpp_plan for C++). Who reads them: tune/space, which turns them into distributions, and whoever judges a stored entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Values by name, sorted. A name that is left out takes its default."""

    values: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Config:
        """Makes a config of a table."""
        return cls(tuple(sorted(values.items())))

    @property
    def table(self) -> dict[str, int]:
        """Returns the values by name."""
        return dict(self.values)

    def of_pass(self, pass_: str) -> Config:
        """Returns what concerns one pass: its own values and the shared ones, without the pass's name in front."""
        own = {n.removeprefix(f"{pass_} "): v for n, v in self.values if n.startswith(f"{pass_} ")}
        shared = {n: v for n, v in self.values if n.partition(" ")[0] not in PASSES}
        return Config.of(shared | own)

    def __str__(self) -> str:
        return ", ".join(f"{n}={v}" for n, v in self.values) or "defaults"


PASSES = ("forward", "backward", "step")

CHUNK = "chunk"
"""The tunable that passes share: tensors of its shape go from the forward to the backward."""


@dataclass(frozen=True)
class Tunable:
    """One choice. ``values`` ascend; ``static`` tells that bytes, FLOPs or serial length depend on it, so that a model may choose it."""

    name: str
    values: tuple[int, ...]
    default: int
    why: str
    static: bool = True

    def __post_init__(self) -> None:
        assert self.default in self.values and list(self.values) == sorted(set(self.values)), self


@dataclass(frozen=True)
class AtMost:
    """A limit on a product of tunables."""

    names: tuple[str, ...]
    limit: int
    why: str

    def excess(self, config: Mapping[str, int]) -> int:
        """Returns by how much a config breaks the limit: 0 or less where it keeps it."""
        return math.prod(config[n] for n in self.names) - self.limit


@dataclass(frozen=True)
class Tunables:
    """What one search may choose, and the limits it must keep. Names begin with a pass, or are shared by all passes of the search."""

    tunables: tuple[Tunable, ...]
    limits: tuple[AtMost, ...] = ()

    @property
    def default(self) -> Config:
        """Returns what is taken where nothing was tuned."""
        return Config.of({t.name: t.default for t in self.tunables})

    @property
    def size(self) -> int:
        """Returns how many configs there are, broken limits included."""
        return math.prod(len(t.values) for t in self.tunables)

    def complaint(self, config: Config) -> str:
        """Returns what is wrong with a config, "" where nothing is: an unknown name, a value that may not be chosen, a broken limit."""
        allowed = {t.name: t for t in self.tunables}
        for name, value in config.values:
            if name not in allowed:
                return f"nothing here is called {name!r}"
            if value not in allowed[name].values:
                return f"{name}={value} is none of {', '.join(map(str, allowed[name].values))}"
        whole = self.default.table | config.table
        return next((limit.why for limit in self.limits if limit.excess(whole) > 0), "")

    def neighbours(self) -> Iterator[Config]:
        """Yields the configs that differ from the default in one value, by one place."""
        for t in self.tunables:
            at = t.values.index(t.default)
            for place in (at - 1, at + 1):
                if 0 <= place < len(t.values):
                    config = Config.of(self.default.table | {t.name: t.values[place]})
                    if not self.complaint(config):
                        yield config

    def all(self) -> Iterator[Config]:
        """Yields every config that keeps the limits."""
        for values in itertools.product(*(t.values for t in self.tunables)):
            config = Config.of(dict(zip((t.name for t in self.tunables), values, strict=True)))
            if not self.complaint(config):
                yield config

    def only_static(self) -> Tunables:
        """Returns the tunables that a model may choose; the others keep their defaults."""
        fixed = (t if t.static else Tunable(t.name, (t.default,), t.default, t.why, False) for t in self.tunables)
        return Tunables(tuple(fixed), self.limits)

    def __add__(self, other: Tunables) -> Tunables:
        """Joins two spaces; what both call the same is one tunable, over the values that both have."""
        mine = {t.name: t for t in self.tunables}
        joined = dict(mine)
        for t in other.tunables:
            if t.name in mine:
                assert t.default == mine[t.name].default, (t, mine[t.name])
                both = tuple(v for v in mine[t.name].values if v in t.values)
                joined[t.name] = Tunable(t.name, both, t.default, t.why, t.static)
            else:
                joined[t.name] = t
        return Tunables(tuple(joined.values()), self.limits + other.limits)

    def __str__(self) -> str:
        lines = [f"{t.name}: {', '.join(f'[{v}]' if v == t.default else str(v) for v in t.values)}   # {t.why}" for t in self.tunables]
        return "\n".join([*lines, *(f"{' * '.join(x.names)} <= {x.limit}   # {x.why}" for x in self.limits)])
