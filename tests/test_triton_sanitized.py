"""Generated kernels under the sanitizer: no stray access, no race, nothing unwritten; odd sizes, several tiles, shared heads."""

from __future__ import annotations

import pytest
import torch

import lagen
from lagen import data
from lagen.ir.variant import Variant
from lagen.runtime.operator import Operator
from lagen.spec import read, read_text
from lagen.verify import cases, compare
from lagen.verify.cases import Case, Extent
from lagen.verify.laws import Subject, call, judge
from lagen.verify.sanitize import sanitize

SIZES = (("K", 13), ("V", 70), ("M", 6))
"""Odd dims; two tiles of V."""

SHARED = {
    "keys_of_several_queries": """
name: keys_of_several_queries
inputs: {q: [HV, K], k: [H, K], v: [H, V], g: [H]}
assume:
  - g <= 0
recurrence:
  S: exp(g) * S[t-1] + outer(k, v)
  z: exp(g) * z[t-1] + k
  o: (q @ S[t]) / max(abs(q @ z[t]), 1)
""",
    "keys_without_heads": """
name: keys_without_heads
inputs: {q: [H, K], k: [K], v: [V], g: []}
assume:
  - g <= 0
recurrence:
  S: exp(g) * S[t-1] + outer(k, v)
  z: exp(g) * z[t-1] + k
  o: (q @ S[t]) / max(abs(q @ z[t]), 1)
""",
    "sums_over_all_tokens": """
name: sums_over_all_tokens
causal: false
inputs: {q: [HV, K], k: [H, K], v: [H, V]}
recurrence:
  S: outer(exp(k), v)
  z: exp(k)
  o: (exp(q) @ S[t]) / (exp(q) @ z[t])
""",
    "an_output_on_fewer_heads": """
name: an_output_on_fewer_heads
inputs: {q: [HV, K], k: [H, K], v: [H, V], c: [K]}
recurrence:
  S: S[t-1] + outer(k, v)
  z: z[t-1] + c
  o: q @ S[t]
  p: (k @ z[t]) * v
  n: c @ z[t]
""",
}


def variant_of(name: str) -> Variant:
    return read_text(SHARED[name], name) if name in SHARED else read(data.spec(name))


def step(op: Operator, case: Case, backend: str) -> list[torch.Tensor]:
    """Returns what one token gives and leaves behind."""
    states = tuple(s.clone() for s in case.initial_states or ())
    with torch.no_grad():
        outputs, _ = op.step(*(x[:, 0] for x in case.inputs), *case.params, state=states if len(states) > 1 else states[0], backend=backend)
    return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *states]


WATCHED = ("gla", "simple_gla", "rwkv6", "linear_attention", "mamba2", "hgrn2", "efficient_attention", "mamba1")


@pytest.mark.parametrize("name", [*WATCHED, *SHARED])
def test_no_access_is_stray_and_no_two_programs_meet(name: str) -> None:
    variant = variant_of(name)
    op = lagen.load(variant)
    assert "triton" in op.backends
    case = cases.make(variant, Extent(variant.chunk_default + 5, batch=1, heads=2, dims=SIZES), carried=True)
    with sanitize() as findings:
        results = list(judge("sanitized", Subject(op, variant, "triton"), case, call(Subject(op, variant, "triton"), None)))
    assert [str(f) for f in findings] == []
    assert [r for r in results if not r.ok] == []


STEPPED = ("gla", "mamba2", "linear_attention", "rwkv6", "hedgehog", "longhorn")


@pytest.mark.parametrize("name", [*STEPPED, *(n for n in SHARED if "all" not in n)])
def test_a_step_reads_no_state_that_it_has_written(name: str) -> None:
    variant = variant_of(name)
    op = lagen.load(variant)
    case = cases.make(variant, Extent(1, batch=2, heads=2, dims=SIZES), carried=True)
    with sanitize() as findings:
        got = step(op, case, "triton")
    assert [str(f) for f in findings] == []
    for mine, wanted in zip(got, step(op, case, "oracle"), strict=True):
        assert compare.error(mine, wanted) < compare.FLOAT32_LIMIT


def test_a_segmented_scan_has_no_findings() -> None:
    import sys

    variant = read(data.spec("simple_gla"))
    op = lagen.load(variant)
    module = next(m for n, m in sys.modules.items() if n.startswith("lagen_cache_simple_gla_") and getattr(m, "operator", None) is op)
    case = cases.make(variant, Extent(2 * variant.chunk_default + 3, batch=1, heads=1, dims=(("K", 9), ("V", 7))), carried=True)
    with pytest.MonkeyPatch.context() as patch, sanitize() as findings:
        patch.setattr(module, "FORM", 1)
        results = list(judge("split", Subject(op, variant, "triton"), case, call(Subject(op, variant, "triton"), None)))
    assert [str(f) for f in findings] == []
    assert [r for r in results if not r.ok] == []
