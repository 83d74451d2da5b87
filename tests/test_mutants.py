"""Mutants: one sign, mask or index of the generated kernels is changed, and the comparison with the oracle goes red for each."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lagen import data
from lagen.emit.render import support
from lagen.runtime.build import generate
from lagen.runtime.operator import Operator
from lagen.spec import read
from lagen.verify import cases
from lagen.verify.cases import Extent
from lagen.verify.laws import LawResult, Subject, call, judge
from lagen.verify.sanitize import poisoned

VARIANT = read(data.spec("simple_gla"))
SOURCE = generate(VARIANT, ("triton",))
CASE = cases.make(VARIANT, Extent(VARIANT.chunk_default + 3, batch=1, heads=1, dims=(("K", 9), ("V", 7))), carried=True)

MUTATIONS = {
    "a decay's sign": ("forward_fwd_v", r"e_b = tl\.exp\(", "e_b = tl.exp(-"),
    "a decay of the wrong end": ("forward_fwd_v", r"tl\.exp\(\((b_th - )(b_bh\) \+ \()(b_tl - )", r"tl.exp((\2"),
    "a mask that forgets the token itself": ("forward_fwd_v", r"o_t\[:, None\] >= o_t\[None, :\]", "o_t[:, None] > o_t[None, :]"),
    "a mask that counts the token twice": ("backward_fwd_k", r"tl\.where\(o_t\[:, None\] > o_t", "tl.where(o_t[:, None] >= o_t"),
    "a mask of the wrong triangle": ("backward_rev_v", r"tl\.where\(o_t\[:, None\] <= o_t", "tl.where(o_t[:, None] >= o_t"),
    "one token too few": ("forward_fwd_v", r"m_end = T - ", "m_end = T - 1 - "),
    "one lane too few": ("forward_fwd_v", r"m_k = o_k < K", "m_k = o_k < K - 1"),
    "the wrong head": ("backward_rev_v", r"p_k = k \+ i_b \* k_sb \+ i_h \*", "p_k = k + i_b * k_sb + i_hv *"),
    "a state that is not decayed": ("forward_fwd_v", r"b_S \* e_t", "b_S"),
    "a state that comes a chunk early": ("forward_fwd_v", r"b_S_d, input", "b_S_n, input"),
    "chunks in the wrong order": ("backward_rev_k", r"i_c = count - 1 - i\b", "i_c = i"),
    "a missing scale": ("backward_fwd_k", r"b_A \* scale", "b_A"),
    "pairs around a chunk left out": ("backward_rev_k", r"b_met = tl\.sum\(.*\)", "b_met = 0.0"),
    "the mark of another chunk": ("backward_fwd_k", r"i_c \* K \* V", "0 * i_c"),
    "pairs from the wrong side": ("lg_spans", r"o\[:, None\] < o\[None, :\]", "o[:, None] > o[None, :]"),
    "writers that count themselves": ("lg_suffix", r"tl\.maximum\(o - 1, 0\)", "o"),
    "an initial state left out": ("step", r"b_S = tl\.load\((.*)\)", r"b_S = 0.0 * tl.load(\1)"),
}
"""By name: the kernel, what is looked for in it, and what stands there instead."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Makes an importable folder with the files that generated modules import."""
    name = "mutant_" + re.sub(r"\W+", "_", request.node.name)
    folder = tmp_path / name
    folder.mkdir()
    for file, text in (support() | {"__init__.py": ""}).items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def kernel(name: str) -> str:
    """Returns the text of one kernel."""
    found = re.search(rf"^@triton\.jit.*\ndef {name}\((?:.*\n)*?(?=\n\n\S)", SOURCE, re.MULTILINE)
    assert found is not None, name
    return found[0]


def loaded(folder: Path, source: str) -> Operator:
    """Imports a module's text as the operator of a package."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]  # else what was registered under the same digest would run
    renamed, times = re.subn(r'digest="\w+"', f'digest="{digest}"', source)
    assert times == 1
    (folder / "mutant.py").write_text(renamed)
    operator = importlib.import_module(f"{folder.name}.mutant").operator
    return operator  # type: ignore[no-any-return]


def results(op: Operator) -> list[LawResult]:
    """Compares forward, backward and a few steps with the oracle."""
    from lagen.verify import laws

    subject = Subject(op, VARIANT, "triton")
    with poisoned():
        return [*judge("mutant", subject, CASE, call(subject, None)), *laws.check(op, VARIANT, "triton", laws=("steps",))]


def test_the_module_itself_is_right(package: Path) -> None:
    found = results(loaded(package, SOURCE))
    assert found and all(r.ok for r in found)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mutant_is_caught(package: Path, mistake: str) -> None:
    where, old, new = MUTATIONS[mistake]
    text = kernel(where)
    changed, times = re.subn(old, new, text, count=1)
    assert times == 1 and changed != text, f"{where} has no {old}"
    assert SOURCE.count(text) == 1
    found = results(loaded(package, SOURCE.replace(text, changed)))
    assert any(r.error > 10 * r.limit for r in found)
