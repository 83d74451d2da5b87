"""Digests of a recurrence: ``digest`` is the same for every spelling of the same algebra, ``identity`` tells operators apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from lagen.ir.recurrence import Recurrence
from lagen.ir.variant import Tensor
from lagen.passes.normal_form import Algebra, text


def digest(recurrence: Recurrence) -> str:
    """This function returns the sha256 of the recurrence's normal form: names of define, order and grouping of terms are irrelevant.

    Relevant are the declared tensors, the states and outputs (names, order, dims, heads) and what is computed.
    """
    return _sha(_lines(recurrence))


def identity(recurrence: Recurrence) -> str:
    """This function returns the sha256 of digest, name and chunk sizes: what a built operator is."""
    return _sha([digest(recurrence), recurrence.name, repr(recurrence.chunk_sizes), repr(recurrence.chunk_default)])


def _sha(lines: Iterator[str] | list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor(kind: str, t: Tensor) -> str:
    return f"{kind} {t.name} {t.head} {t.dims} {t.token}"


def _lines(r: Recurrence) -> Iterator[str]:
    algebra = Algebra(r.states)
    yield from (_tensor("input", t) for t in r.inputs)
    yield from (_tensor("param", t) for t in r.params)
    yield from (f"size {dim} {text(algebra.of(e))}" for dim, e in sorted(r.sizes, key=lambda s: s[0]))
    for s in r.states:
        yield f"state {s.name} {s.head} {s.dims} {s.causal} {s.init!r}" + (" peak" if s.peak else "")
        yield f"decay {text(algebra.decay(s))}"
        yield f"writes {text(algebra.writes(s))}"
    for (name, e), dims in zip(r.outputs, r.output_dims, strict=True):
        yield f"output {name} {e.head} {dims} {text(algebra.of(e))}"
