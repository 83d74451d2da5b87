"""The laws for generated Triton kernels, in the interpreter: every shipped spec, strong gates, every form of a scan, random specs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_specs import Recipe, recipes

import lagen
from lagen import data
from lagen.ir.variant import Variant
from lagen.runtime.operator import Operator
from lagen.spec import read, read_text
from lagen.verify import cases, laws
from lagen.verify.cases import Case, Extent
from lagen.verify.compare import limit
from lagen.verify.laws import LawResult, Subject
from lagen.verify.sanitize import poisoned, sanitize

PATHS = {path.stem: path for path in data.specs()}
GATED = ("gla", "simple_gla", "rwkv6", "mamba2")
SMALL = (("K", 9), ("V", 7), ("M", 6))


def module_of(op: Operator) -> ModuleType:
    """Returns the generated module of an operator."""
    return next(m for n, m in sys.modules.items() if n.startswith("lagen_cache_") and getattr(m, "operator", None) is op)


@contextmanager
def form(op: Operator, chunks: int | None) -> Iterator[None]:
    """Cuts scans into segments of ``chunks`` chunks; None leaves the choice to the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of(op), "FORM", chunks)
        yield


def judged(op: Operator, variant: Variant, case: Case) -> list[LawResult]:
    """Compares all that comes of a case with the oracle; what a kernel leaves unwritten is NaN."""
    subject = Subject(op, variant, "triton")
    with poisoned():
        return list(laws.judge("interpreted", subject, case, laws.call(subject, None)))


def broken(results: list[LawResult]) -> list[LawResult]:
    """Lists the results beyond their limits."""
    assert results
    return [r for r in results if not r.ok]


@pytest.mark.parametrize("name", ["rwkv7", "gated_deltaproduct"])
def test_row_sums_over_more_than_one_tile(name: str) -> None:
    variant = read(PATHS[name])
    assert broken(judged(lagen.load(variant), variant, cases.make(variant, Extent(7, batch=1, heads=1, dims=(("K", 70), ("V", 5)))))) == []


@pytest.mark.parametrize("name", sorted(PATHS))
def test_forward_and_backward_are_the_recurrence(name: str) -> None:
    variant = read(PATHS[name])
    op = lagen.load(variant)
    assert "triton" in op.backends
    case = cases.make(variant, Extent(variant.chunk_default + 3, batch=2, heads=1, dims=SMALL), carried=True)
    assert broken(judged(op, variant, case)) == []


@pytest.mark.parametrize("name", sorted(PATHS))
def test_step_and_short_sequences_are_the_recurrence(name: str) -> None:
    variant = read(PATHS[name])
    op = lagen.load(variant)
    with poisoned():
        results = list(laws.check(op, variant, "triton", laws=("steps", "heads")))
    for time in (0, 1):
        results += judged(op, variant, cases.make(variant, Extent(time, batch=1, heads=1, dims=SMALL), carried=time == 0))
    assert broken(results) == []


@pytest.mark.parametrize("regime", ["gates at -5", "gates at -20", "resets", "no decay"])
@pytest.mark.parametrize("name", GATED)
def test_strong_gates_keep_their_digits(name: str, regime: str) -> None:
    variant = read(PATHS[name])
    case = cases.make(variant, Extent(variant.chunk_default + 3, batch=1, heads=1, dims=SMALL), regime, carried=True)
    assert broken(judged(lagen.load(variant), variant, case)) == []


@pytest.mark.parametrize("name", [*GATED, "linear_attention"])
def test_every_form_of_a_scan_gives_the_same(name: str) -> None:
    variant = read(PATHS[name])
    op = lagen.load(variant)
    case = cases.make(variant, Extent(2 * variant.chunk_default + 2, batch=1, heads=1, dims=SMALL), carried=True)
    run = laws.call(Subject(op, variant, "triton"), None)
    found: dict[int | None, dict[str, torch.Tensor]] = {}
    for chunks in (1, 2, 3):
        with form(op, chunks), poisoned():
            found[chunks] = laws.tensors(run, variant, case)
    for chunks in (1, 2):
        for tensor, x in found[chunks].items():
            wanted = found[3][tensor]
            # a gate's gradient is a sum of many signs: what is carried through the whole sequence rounds more often
            bound = 1e-6 if tensor in ("o", "dq", "dk", "dv", "S[T]") else 2e-5
            assert (x - wanted).norm() <= bound * wanted.norm(), (chunks, tensor)
    with form(op, 1):
        assert broken(judged(op, variant, case)) == []


@pytest.mark.parametrize("name", ["simple_gla", "kda", "rwkv7", "comba", "gated_oja", "gated_deltaproduct"])
def test_several_tiles_give_the_recurrence(name: str) -> None:
    variant = read(PATHS[name])
    op = lagen.load(variant)
    dims = tuple((d, size) for d, size in (("K", 33), ("V", 20)))
    case = cases.make(variant, Extent(variant.chunk_default + 3, batch=1, heads=1, dims=dims), carried=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of(op), "_tiles", lambda target, chunk, itemsize, longest: (chunk, 16, 4, 1))
        assert broken(judged(op, variant, case)) == []


@pytest.mark.parametrize("name", ["gla", "mamba2"])
def test_half_precision_is_no_worse_than_the_recurrence(name: str) -> None:
    variant = read(PATHS[name])
    case = cases.make(variant, Extent(variant.chunk_default + 3, batch=1, heads=1, dims=SMALL), dtype=torch.bfloat16, carried=True)
    assert broken(judged(lagen.load(variant), variant, case)) == []


@pytest.mark.parametrize("name", ["gla", "hgrn2", "rwkv6", "kda"])
def test_half_precision_gives_decays_gradients_as_exact_as_others(name: str) -> None:
    variant = read(PATHS[name])
    op = lagen.load(variant)
    dims = (("K", 64), ("V", 32))
    case = cases.make(variant, Extent(2 * variant.chunk_default + 5, batch=1, heads=1, dims=dims), "gates at -20", torch.bfloat16)
    subject = Subject(op, variant, "triton")
    with sanitize() as findings:
        results = list(laws.judge("interpreted", subject, case, laws.call(subject, None)))
    assert findings == [] and [r for r in results if r.error > limit(torch.bfloat16)] == []


def test_views_in_any_order_and_repeats_give_the_same() -> None:
    variant = read(PATHS["simple_gla"])
    assert broken(list(laws.check(lagen.load(variant), variant, "triton", laws=("strides", "repeats")))) == []


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes())
def test_random_specs_keep_the_laws(recipe: Recipe) -> None:
    variant = read_text(recipe.text(), recipe.name)
    op = lagen.load(variant)
    if "triton" not in op.backends:
        assert recipe.read == "exclusive", "only what the next token's read wants has no Triton form"
        return
    case = cases.make(variant, Extent(19, batch=1, heads=2, dims=SMALL), carried=True)
    assert broken(judged(op, variant, case)) == []
