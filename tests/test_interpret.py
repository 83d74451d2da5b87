"""bfloat16 in interpreted kernels agrees with torch's, bit for bit where one operation rounds once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import planted  # noqa: E402

from lagen.verify.interpret import faithful, narrow, widen  # noqa: E402


def test_rounding_is_torchs_for_every_kind_of_number() -> None:
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, 1e-40, -1e-45, 3.4e38, float("inf"), -float("inf"), 1.00390625, 1.01171875])
    numbers = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), special])
    patterns = torch.from_numpy(narrow(numbers.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(patterns, numbers.bfloat16())
    assert torch.equal(torch.from_numpy(widen(narrow(numbers.numpy()))), numbers.bfloat16().float())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()


def test_arithmetic_and_products_are_a_devices() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    o, p = torch.empty_like(a), torch.empty(16, 16)
    with faithful():
        planted.bfloat16_kernel[(1,)](a, b, o, p, C=16)
    assert torch.equal(o, a * b + torch.where(a < b, a, -b))
    below = torch.ones(16, 16).tril() @ b.float()
    assert torch.allclose(p, below + torch.arange(16.0)[:, None] - a.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_go_row_by_row(axis: int, reverse: bool) -> None:
    torch.manual_seed(2)
    a, b = torch.rand(2, 8, 8)
    o = torch.empty(8, 8)
    with faithful():
        planted.scan_kernel[(1,)](a, b, o, C=8, AXIS=axis, REVERSE=reverse)
    state = torch.zeros(8)
    for t in reversed(range(8)) if reverse else range(8):
        state = a.select(axis, t) * state + b.select(axis, t)
        assert torch.allclose(o.select(axis, t), state, rtol=1e-6)


def test_a_scan_of_numbers_takes_one_a_row() -> None:
    a, b = torch.rand(2, 8)
    o = torch.empty(8)
    with faithful():
        planted.scan_numbers_kernel[(1,)](a, b, o, C=8)
    state = torch.zeros(())
    for t in range(8):
        state = a[t] * state + b[t]
        assert torch.allclose(o[t], state, rtol=1e-6)
