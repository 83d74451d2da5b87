"""Chooses Triton's interpreter for the whole test process, with a bfloat16 that a device would agree with.

Triton decides between compiling and interpreting when a kernel is defined, so this stands before anything imports triton. Tests that
compile go through lagen.targets.compile, whose workers run without the variable.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("LAGEN_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"lagen-tests-{os.getuid()}"))
# One thread a worker: pytest-xdist already fills the cores, and two pools of threads on one core stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def bfloat16() -> Iterator[None]:
    """Computes with bfloat16 in interpreted kernels as a device does."""
    from lagen.verify.interpret import faithful

    with faithful():
        yield
