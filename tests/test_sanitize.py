"""The sanitizer finds every planted fault by its line, and nothing in a clean kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import planted  # noqa: E402

from lagen.verify.sanitize import Finding, sanitize  # noqa: E402

SOURCE = Path(planted.__file__).read_text().splitlines()


def line_of(kernel: str, text: str) -> int:
    """Returns the number of the first line of a kernel that holds ``text``."""
    start = next(i for i, line in enumerate(SOURCE) if line.startswith(f"def {kernel}("))
    return next(i for i, line in enumerate(SOURCE) if i > start and text in line) + 1


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(f) for f in findings]
    return findings[0]


def test_a_clean_kernel_has_no_findings_and_the_right_result() -> None:
    a, b = torch.randn(100), torch.randn(100)
    with sanitize() as findings:
        o = planted.add(a, b, BT=32)
    assert findings == []
    assert torch.equal(o, a * 0.5 + b)


def test_views_are_checked_by_what_they_cover() -> None:
    whole = torch.randn(3, 64)
    with sanitize() as findings:
        o = planted.add(whole[1], whole[2], BT=64)
    assert findings == [] and torch.equal(o, whole[1] * 0.5 + whole[2])
    with sanitize() as findings:  # the row's neighbour lies in the same storage, and is still out of bounds
        planted.unmasked_load_kernel[(1,)](whole[0], torch.empty(64), 64, BT=128)
    assert one(findings).argument == "a" and findings[0].count == 64 and findings[0].index == 64


def test_an_unmasked_load_is_found_by_its_line() -> None:
    o = torch.empty(20)
    with sanitize() as findings:
        planted.unmasked_load_kernel[(1,)](torch.arange(20.0), o, 20, BT=32)
    found = one(findings)
    assert (found.kind, found.access, found.argument, found.index, found.count) == ("out of bounds", "load", "a", 20, 12)
    assert found.kernel == "unmasked_load_kernel" and Path(found.file).name == "planted.py"
    assert found.line == line_of("unmasked_load_kernel", "planted: no mask")
    assert torch.equal(o, torch.arange(20.0))
    assert "b_a = tl.load(a + i_t)" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_shifted_store_is_found_and_left_out(dtype: torch.dtype) -> None:
    whole = torch.zeros(16, dtype=dtype)
    with sanitize() as findings:
        planted.shifted_store_kernel[(1,)](torch.ones(8, dtype=dtype), whole[:8], 8, BT=8)
    found = one(findings)
    assert (found.kind, found.access, found.argument, found.index, found.count) == ("out of bounds", "store", "o", 8, 1)
    assert found.line == line_of("shifted_store_kernel", "planted: off by one")
    assert whole.tolist() == [0] + [1] * 7 + [0] * 8


def test_programs_that_write_one_number_race() -> None:
    with sanitize() as findings:
        planted.shared_sum_kernel[(4,)](torch.ones(32), torch.zeros(1), BT=8)
    assert {f.kind for f in findings} == {"race"} and {f.argument for f in findings} == {"o"}
    assert {(f.access, f.line) for f in findings} == {
        ("load", line_of("shared_sum_kernel", "tl.load(o)")),
        ("store", line_of("shared_sum_kernel", "planted")),
    }
    assert findings[0].program == (1, 0, 0) and "program (0, 0, 0)" in findings[0].other


def test_reading_what_another_program_writes_is_a_race_in_either_order() -> None:
    with sanitize() as findings:
        planted.neighbour_kernel[(2,)](torch.ones(16), BT=8)
    found = one(findings)
    assert (found.kind, found.access, found.count) == ("race", "store", 8)
    assert f"the load by program (0, 0, 0) at line {line_of('neighbour_kernel', 'planted')}" in found.other


def test_one_program_and_two_launches_race_with_nobody() -> None:
    with sanitize() as findings:
        total = torch.zeros(1)
        for _ in range(2):
            planted.shared_sum_kernel[(1,)](torch.ones(8), total, BT=8)
    assert findings == [] and total.item() == 16


def test_atomics_are_no_race_among_themselves() -> None:
    with sanitize() as findings:
        total = torch.zeros(1)
        planted.atomic_sum_kernel[(4,)](torch.ones(32), total, BT=8)
    assert findings == [] and total.item() == 32


def test_what_a_kernel_leaves_unwritten_is_nan() -> None:
    with sanitize() as findings:
        o = torch.empty(8)
        planted.half_written_kernel[(1,)](torch.ones(8), o, 8, BT=8)
    assert findings == [] and o[:7].eq(1).all() and o[7].isnan()


def test_a_tensor_passed_twice_is_one_storage() -> None:
    a = torch.ones(64)
    with sanitize() as findings:
        planted.add_kernel[(2,)](a, a, a, 64, BT=32)
    assert findings == [] and torch.equal(a, torch.full((64,), 1.5))


def test_everything_is_as_before_afterwards() -> None:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    def watched() -> tuple[object, ...]:
        return InterpreterBuilder.create_masked_load, GridExecutor._init_args_hst, torch.empty, torch.Tensor.new_empty

    before = watched()
    with pytest.raises(ZeroDivisionError), sanitize():
        assert watched() != before
        raise ZeroDivisionError
    assert watched() == before
