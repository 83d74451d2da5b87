"""Job: one search, as plain data: which passes of which variant, on which device, for which dtype and sizes.

Passes that share a tunable are searched together: on GPUs the forward leaves tensors of chunk shape to the backward, so the chunk is one
choice. On the CPU nothing is shared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lagen.ir.tunable import Config
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.digest import digest
from lagen.runtime.choice import bucket
from lagen.spec.read import read_text
from lagen.targets.tuned import Entry, How


@dataclass(frozen=True)
class Job:
    """``device`` as entries name it; ``here`` tells whether it is in this machine. ``source`` is the spec's text."""

    name: str
    source: str
    digest: str
    device: str
    here: bool
    passes: tuple[str, ...]
    dtype: str
    dims: tuple[tuple[str, int], ...]
    batch: int
    tokens: int
    heads: int
    threads: int = 1

    @property
    def variant(self) -> Variant:
        """Reads the spec; raises SpecErrors."""
        return read_text(self.source, self.name)

    @property
    def study(self) -> str:
        """Names the study: everything that makes two searches different."""
        dims = "-".join(f"{d}{n}" for d, n in self.dims)
        size = f"T{bucket(self.tokens)}-BH{bucket(self.batch * self.heads)}" + (f"-{self.threads}threads" if self.threads > 1 else "")
        how = "" if self.here else "-modelled"
        return f"{self.name}-{self.digest[:8]}-{self.device.replace(':', '-')}-{'+'.join(self.passes)}-{self.dtype}-{dims}-{size}{how}"

    def entries(self, config: Config, how: How = "measured", device: str = "", **told: Any) -> tuple[Entry, ...]:
        """Returns a config as the entries of its passes; ``told`` are the other fields of an entry."""
        size = {"tokens": bucket(self.tokens), "heads": bucket(self.batch * self.heads)}
        given: dict[str, Any] = {"device": device or self.device, "dtype": self.dtype, "dims": self.dims, "how": how, **size, **told}
        return tuple(Entry(of=of, config=config.of_pass(of), **given) for of in self.passes)

    def to_json(self) -> str:
        """Returns the job as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Reads a job back."""
        held = json.loads(text)
        return cls(**{**held, "passes": tuple(held["passes"]), "dims": tuple((d, n) for d, n in held["dims"])})


def job(
    variant: Variant,
    device: str,
    here: bool,
    passes: Sequence[str],
    dtype: str,
    sizes: dict[str, int],
    batch: int,
    tokens: int,
    heads: int,
    threads: int = 1,
) -> Job:
    """Makes the job of a variant; ``sizes`` gives dims by name, those that the variant lacks are left out."""
    derived = {d for d, _ in variant.sizes}
    own = sorted({d for t in variant.inputs + variant.params for d in t.dims} - derived)
    dims = tuple((d, sizes.get(d, sizes["K"])) for d in own)
    algebra = digest(canonicalise(variant))
    return Job(variant.name, variant.source, algebra, device, here, tuple(passes), dtype, dims, batch, tokens, heads, threads)
