"""The C++ backend: generated code against the float64 oracle, its building and its calling conventions."""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.emit.cpp import fallback, render_cpp, whole
from lagen.emit.cpp_fit import Fallback
from lagen.emit.cpp_plan import Sweep, plan_backward, plan_forward, split_dim, tile, tunables
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.passes.simplify import simplify
from lagen.runtime import cpp
from lagen.runtime.operator import ArgumentError, Operator
from lagen.runtime.prebuild import prebuild
from lagen.spec.read import read, read_text
from lagen.verify.cases import Case, Extent, make
from lagen.verify.oracle import oracle

pytestmark = pytest.mark.skipif(not cpp.compilers(), reason="no C++ compiler")
Tensors = tuple[Tensor, ...]
SPECS = ("simple_gla", "gla", "rwkv6", "linear_attention", "mamba2", "based", "efficient_attention", "gated_deltanet", "rwkv7")
SPECS = (*SPECS, "performer", "gated_rfa", "mamba1", "longhorn")  # with a param of two dims, with a decay for every element
MIXED = """
name: mixed
inputs: {q: [H, M], k: [H, K], v: [H, V]}
params: {W: [K, M]}
recurrence:
  S: S[t-1] + outer(k @ exp(W), v)
  o: q @ S[t]
"""
BY_VALUE = """
name: by_value
inputs: {q: [H, K], k: [H, K], v: [HV, V], gk: [H, K], gv: [HV, V], g: [HV]}
assume:
  - gk <= 0
  - gv <= 0
  - g <= 0
recurrence:
  S: exp(gk) * (exp(gv) * (exp(g) * S[t-1])) + outer(k, v)
  z: exp(gk) * (exp(g) * z[t-1]) + k
  o: scale * (q @ S[t]) + (q @ z[t]) * v
"""


def error(got: Tensor, wanted: Tensor) -> float:
    """Returns |got - wanted| / |wanted|."""
    assert got.shape == wanted.shape and bool(got.isfinite().all())
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)) if wanted.numel() else 0.0


def run(op: Operator, case: Case, states: bool = True) -> dict[str, Tensor]:
    """Runs forward and backward through the operator's C++; returns outputs, final states and gradients by name."""
    leaves = [x.clone().requires_grad_() for x in (*case.inputs, *case.params, *(case.initial_states or ()))]
    n = len(case.inputs) + len(case.params)
    initial = tuple(leaves[n:]) or None
    out = op(*leaves[:n], initial_state=initial, output_final_state=states and op.spec.causal, backend="cpp")
    o, final = out if states and op.spec.causal else (out, ())
    made = (*(o if isinstance(o, tuple) else (o,)), *(final if isinstance(final, tuple) else (final,)))
    return collect(op, made, leaves, (*case.d_outputs, *case.d_states))


def reference(op: Operator, variant: lagen.ir.variant.Variant, case: Case) -> dict[str, Tensor]:
    """Evaluates the same in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (*case.inputs, *case.params, *(case.initial_states or ()))]
    n, m = len(case.inputs), len(case.params)
    outputs, final = oracle(variant, tuple(leaves[:n]), tuple(leaves[n : n + m]), None, tuple(leaves[n + m :]) or None)
    return collect(op, (*outputs, *(final or ())), leaves, (*case.d_outputs, *case.d_states))


def collect(op: Operator, made: Tensors, leaves: list[Tensor], cotangents: Tensors) -> dict[str, Tensor]:
    """Names results and gradients."""
    spec = op.spec
    loss = sum((x * d.to(x.dtype)).sum() for x, d in zip(made, cotangents, strict=False))
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [a.name for a in spec.outputs + spec.states]
    table = {n: x.detach() for n, x in zip(names, made, strict=False)}
    given = [f"d{a.name}" for a in spec.inputs + spec.params] + [f"d initial {a.name}" for a in spec.states]
    return table | {n: torch.zeros_like(x) if g is None else g for n, g, x in zip(given, gradients, leaves, strict=False)}


def agree(op: Operator, variant: lagen.ir.variant.Variant, case: Case, limit: float = 5e-7, gradients: float = 1e-5) -> None:
    """Compares every result of a case with the oracle's."""
    got, wanted = run(op, case), reference(op, variant, case)
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        assert error(x, wanted[name]) < (gradients if name.startswith("d") else limit), f"{name}: {error(x, wanted[name])}, {case}"


@functools.cache
def loaded(name: str) -> tuple[Operator, lagen.ir.variant.Variant]:
    """Loads a shipped spec, or BY_VALUE."""
    variant = read_text(BY_VALUE, "by_value.yaml") if name == "by_value" else read(data.spec(name))
    return lagen.load(variant, printed=("cpp",)), variant


# ---- meaning --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [0, 1, 15, 16, 17, 53])
@pytest.mark.parametrize("name", [*SPECS, "by_value"])
def test_agrees_with_the_oracle_at_every_length(name: str, time: int) -> None:
    op, variant = loaded(name)
    if name == "efficient_attention" and time < 2:
        pytest.skip("a mean over one token has gradients that are zero but for noise")
    agree(op, variant, make(variant, Extent(time, heads=1), carried=bool(time % 2)), gradients=2e-5 if name == "mamba2" else 1e-5)


@pytest.mark.parametrize(
    "dims", [{"K": 1, "V": 1}, {"K": 64, "V": 64}, {"K": 16, "V": 96}, {"K": 70, "V": 33}, {"K": 33, "V": 130}], ids=str
)
@pytest.mark.parametrize("name", ["gla", "by_value"])
def test_any_size_of_state(name: str, dims: dict[str, int]) -> None:
    op, variant = loaded(name)
    agree(op, variant, make(variant, Extent(37, dims=tuple(dims.items())), carried=True))


@pytest.mark.parametrize("dims", [{"K": 64, "V": 64, "M": 64}, {"K": 33, "V": 17, "M": 70}], ids=str)
@pytest.mark.parametrize("name", ["performer", "gated_rfa"])
def test_a_param_of_two_dims_of_any_size(name: str, dims: dict[str, int]) -> None:
    op, variant = loaded(name)
    agree(op, variant, make(variant, Extent(37, dims=tuple(dims.items())), carried=True))


@pytest.mark.parametrize("gate", [None, -1.0, -5.0, -20.0])
@pytest.mark.parametrize(
    "name, time, regime, limit",
    [("mamba2", 200, "resets", 2e-5), ("retnet", 133, "resets", 2e-5), ("retnet", 133, "mild", 1e-5), ("retnet", 63, "mild", 1e-5)],
)
def test_a_param_that_sums_what_a_decays_gradient_rounds(name: str, time: int, regime: str, limit: float, gate: float | None) -> None:
    """The sum over tokens may cancel by chance, as in the first of retnet's resets (to a thirtieth), and is still this near."""
    op, variant = loaded(name)
    param = {"mamba2": "dA_log", "retnet": "dg_gamma"}[name]
    for seed in range(4):
        case = make(variant, Extent(time, batch=1, heads=2, group=1, dims=(("K", 64), ("V", 64))), regime, carried=True, seed=seed)
        case = case if gate is None else decayed_by(variant, case, gate)
        off = error(run(op, case)[param], reference(op, variant, case)[param])
        assert off < limit, f"{off}, seed {seed}"


def decayed_by(variant: lagen.ir.variant.Variant, case: Case, gate: float) -> Case:
    """Gives every token the same log-decay: retnet's param, or mamba2's -exp(A_log) softplus(dt_raw + dt_bias) with a step of 1."""
    fixed = {"g_gamma": gate, "A_log": math.log(-gate), "dt_raw": math.log(math.e - 1), "dt_bias": 0.0}
    given = zip(variant.inputs + variant.params, case.inputs + case.params, strict=True)
    filled = tuple(torch.full_like(x, fixed[a.name]) if a.name in fixed else x for a, x in given)
    n = len(case.inputs)
    return replace(case, inputs=filled[:n], params=filled[n:])


ENTERS_ITSELF = """
name: enters_itself
inputs: {x: [E], a: [E], b: [N], q: [N]}
assume:
  - a <= 0
  - b >= 0
recurrence:
  S: exp(outer(a, b)) * S[t-1] + outer(x, b)
  o: (S[t] @ q) * (S[t-1] @ q)
"""


def test_a_decay_for_every_element_is_walked_back_only_where_one_walk_gives_all() -> None:
    recurrence, adjoint = compiled(ENTERS_ITSELF)
    forward, backward = fallback(recurrence, adjoint)
    assert not forward and "comes back to it" in backward


@pytest.mark.parametrize("dims", [{"E": 64, "N": 16}, {"E": 5, "N": 33}, {"E": 130, "N": 1}], ids=str)
def test_a_decay_for_every_element_of_any_size(dims: dict[str, int]) -> None:
    op, variant = loaded("mamba1")
    agree(op, variant, make(variant, Extent(37, dims=tuple(dims.items())), carried=True))


@pytest.mark.parametrize("time, sizes", [(40, (20, 12)), (1, (16, 16)), (70, (64, 64)), (40, (128, 128))], ids=str)
@pytest.mark.parametrize("gate", [0.0, -5.0, -20.0, -50.0, -200.0, -float("inf")])
@pytest.mark.parametrize("name", ["simple_gla", "gla", "by_value", "kda"])
def test_any_gate_and_a_gradient_that_does_not_cancel(name: str, gate: float, time: int, sizes: tuple[int, int]) -> None:
    op, variant = loaded(name)
    case = make(variant, Extent(time, dims=tuple(zip("KV", sizes, strict=True))), carried=True)
    closed = tuple(torch.full_like(x, gate) if a.name.startswith("g") else x for a, x in zip(variant.inputs, case.inputs, strict=True))
    case = Case(case.regime, case.dtype, closed, case.params, case.initial_states, case.d_outputs, case.d_states)
    got, wanted = run(op, case), reference(op, variant, case)
    for key, x in got.items():
        if key.startswith("dg") and gate < -40:  # under 1e-18 of what stands beside it: zero
            assert float(x.abs().max()) < 1e-15, key
        else:
            assert error(x, wanted[key]) < (1e-5 if key.startswith("dg") else 5e-7), f"{key}: {error(x, wanted[key])}"


def test_gates_that_close_one_token_alone() -> None:
    for name in ("gla", "rwkv6"):
        op, variant = loaded(name)
        case = make(variant, Extent(50), "resets", carried=True)
        agree(op, variant, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["simple_gla", "linear_attention"])
def test_half_precision_in_and_out(name: str, dtype: torch.dtype) -> None:
    op, variant = loaded(name)
    case = make(variant, Extent(37), dtype=dtype, carried=True)
    got = run(op, case)
    assert got["o"].dtype == dtype and got["dv"].dtype == dtype and got["S"].dtype == torch.float32
    agree(op, variant, case, limit=4e-3, gradients=4e-3)


def test_any_strides() -> None:
    op, variant = loaded("gla")
    case = make(variant, Extent(21, heads=3))
    plain = op(*case.inputs, backend="cpp")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs[:-1]]
    last = torch.empty(*case.inputs[-1].shape, 2)[..., 0]
    last.copy_(case.inputs[-1])
    assert torch.equal(op(*turned, last, backend="cpp"), plain)


# ---- decode -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [{"K": 13, "V": 11}, {"K": 64, "V": 64}, {"K": 70, "V": 130}], ids=str)
@pytest.mark.parametrize(
    "name", ["simple_gla", "gla", "rwkv6", "linear_attention", "mamba2", "by_value", "gated_deltanet", "rwkv7", "kda", "gated_oja"]
)
def test_token_by_token_is_the_whole(name: str, dims: dict[str, int]) -> None:
    op, variant = loaded(name)
    case = make(variant, Extent(5, dims=tuple(dims.items()), group=2), carried=True)
    o, final = op(*case.inputs, *case.params, initial_state=case.initial_states, output_final_state=True, backend="cpp")
    state = tuple(s.clone() for s in case.initial_states or ())
    with torch.no_grad():
        for t in range(5):
            one, after = op.step(*(x[:, t] for x in case.inputs), *case.params, state=state, backend="cpp")
            assert error(one, o[:, t].double()) < 1e-6
    for x, y in zip(state, final if isinstance(final, tuple) else (final,), strict=True):
        assert error(x, y.double()) < 1e-6


@pytest.mark.parametrize("name", ["simple_gla", "linear_attention", "rwkv6"])
def test_a_step_like_one_before_goes_past_the_dispatcher(name: str) -> None:
    op, variant = loaded(name)
    case = make(variant, Extent(6, group=2, dims=(("K", 13), ("V", 20))), carried=True)
    slow = tuple(s.clone() for s in case.initial_states or ())
    fast = tuple(s.clone() for s in slow)
    again = op.backends["cpp"].again
    assert again is not None
    with torch.no_grad():
        for t in range(6):
            given = (*(x[:, t] for x in case.inputs), *case.params)
            versions = [s._version for s in fast]
            wanted, _ = op.step(*given, state=slow, backend="cpp")
            got, after = op.step(*given, fast if len(fast) > 1 else fast[0])
            assert torch.equal(got, wanted) and all(map(torch.equal, slow, fast))
            assert all(s._version > v for s, v in zip(fast, versions, strict=True))
            assert after is fast[0] or all(a is b for a, b in zip(after, fast, strict=True))
        assert again(given, fast) is not None


def test_steps_of_many_batch_sizes_are_remembered() -> None:
    op, variant = loaded("simple_gla")
    again = op.backends["cpp"].again
    assert again is not None
    given = []
    for batch in range(1, 21):
        case = make(variant, Extent(1, batch=batch, dims=(("K", 16), ("V", 16))), carried=True)
        given.append((tuple(x[:, 0] for x in case.inputs), tuple(s.clone() for s in case.initial_states or ())))
        op.step(*given[-1][0], *given[-1][1])
    assert all(again(*one) is not None for one in given)


def test_a_step_that_is_not_plain_goes_through_the_dispatcher() -> None:
    op, variant = loaded("simple_gla")
    case = make(variant, Extent(2, dims=(("K", 16), ("V", 16))), carried=True)
    q, k, v, g = (x[:, 0].contiguous() for x in case.inputs)
    (state,) = (s.clone() for s in case.initial_states or ())
    op.step(q, k, v, g, state)
    again = op.backends["cpp"].again
    assert again is not None and again((q, k, v, g), (state,)) is not None
    negative = torch.complex(q, -q).conj().imag
    assert negative.is_neg() and negative.shape == q.shape
    assert again((q.clone().requires_grad_(), k, v, g), (state,)) is None
    assert again((negative, k, v, g), (state,)) is None
    assert again((q, state[:, :, 0], v, g), (state,)) is None  # the state's own memory
    assert again((q.bfloat16(), k, v, g), (state,)) is None
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert again((q, k, v, g), (state,)) is None
    assert torch.func.vmap(lambda x: torch.as_tensor(again((x, k, v, g), (state,)) is None))(torch.stack([q, q])).all()
    with pytest.raises(ArgumentError, match="no gradient"):
        op.step(q.clone().requires_grad_(), k, v, g, state)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert again((q, k, v, g), (state,)) is None
    finally:
        torch.set_num_threads(before)


# ---- threads, forks -------------------------------------------------------------------------------------------------------------


def test_threads_change_no_bit() -> None:
    op, variant = loaded("simple_gla")
    case = make(variant, Extent(50, batch=3, heads=2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(op, case)
        torch.set_num_threads(5)
        together = run(op, case)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone[n], together[n]) for n in alone)


@pytest.mark.parametrize("name", ["gla", "linear_attention", "rwkv6", "mamba2", "mamba1"])
def test_threads_that_share_a_head_agree(name: str) -> None:
    op, variant = loaded(name)
    before = torch.get_num_threads()
    try:
        first, second = ("E", "N") if name == "mamba1" else ("V", "K")
        for dims in (((second, 13), (first, 50)), ((second, 20), (first, 7))):
            case = make(variant, Extent(37, batch=1, heads=1, group=1, dims=dims), carried=True)
            torch.set_num_threads(1)
            alone = op(*case.inputs, *case.params, initial_state=case.initial_states, backend="cpp")
            torch.set_num_threads(3)
            assert torch.equal(op(*case.inputs, *case.params, initial_state=case.initial_states, backend="cpp"), alone)
            agree(op, variant, case, gradients=2e-5 if name == "mamba2" else 1e-5)
    finally:
        torch.set_num_threads(before)


def test_what_mixes_the_values_is_not_split() -> None:
    mixing = BY_VALUE.replace("o: scale * (q @ S[t])", "o: l2norm(scale * (q @ S[t]))")
    split = [split_dim(r, p) for r, _ in (compiled(BY_VALUE), compiled(mixing)) if not isinstance(p := plan_forward(r), Fallback)]
    assert split == ["V", ""]


def test_a_call_releases_the_interpreter_lock() -> None:
    op, variant = loaded("simple_gla")
    case = make(variant, Extent(6000, batch=4, heads=4, dims=(("K", 64), ("V", 64))))
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    op(*(x[:, :2] for x in case.inputs), backend="cpp")
    other = threading.Thread(target=tick)
    other.start()
    op(*case.inputs, backend="cpp")
    counted = ticks[0]
    done.set()
    other.join()
    assert counted > 3


def _in_child(op: Operator, case: Case, queue: multiprocessing.Queue[float]) -> None:
    queue.put(float(op(*case.inputs, backend="cpp").double().sum()))


def test_a_forked_child_computes_the_same() -> None:
    op, variant = loaded("simple_gla")
    case = make(variant, Extent(40, batch=4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        mine = float(op(*case.inputs, backend="cpp").double().sum())
        fork = multiprocessing.get_context("fork")
        queue: multiprocessing.Queue[float] = fork.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = fork.Process(target=_in_child, args=(op, case, queue))
            child.start()
        theirs = queue.get(timeout=60)
        child.join(60)
    finally:
        torch.set_num_threads(before)
    assert theirs == mine


# ---- building -------------------------------------------------------------------------------------------------------------------

TINY = 'extern "C" int lagen_tiny(const long* x) { return (int)x[0]; }\n'


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    counter = tmp_path / "c++"
    real = cpp.compilers()[0]
    counter.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo >> {tmp_path}/count ;; esac\nexec {real} "$@"\n')
    counter.chmod(0o755)
    code = f"from lagen.runtime import cpp; import ctypes; print(ctypes.CDLL(str(cpp.build({TINY!r}, 'tiny'))).lagen_tiny)"
    environment = os.environ | {"CXX": str(counter), "LAGEN_CACHE_DIR": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)
    ]
    for process in started:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told.decode()
    assert (tmp_path / "count").read_text().count("\n") == 1
    assert [p.suffix for p in (tmp_path / "cache" / "cpp").iterdir() if p.suffix != ".lock"] == [".so"]


def test_two_compilers_halve_a_file_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = tmp_path / "calls", cpp.compilers()[0]
    counter = tmp_path / "c++"
    counter.write_text(f'#!/bin/sh\necho "$*" >> {seen}\nexec {real} "$@"\n')
    counter.chmod(0o755)
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(counter))
    other = {1: 2, 2: 1}
    halves = "".join(f'#if LG_PART != {other[i]}\nextern "C" int half_{i}() {{ return {i}; }}\n#endif\n' for i in cpp.PARTS)
    built = cpp.build(halves, "halves")
    assert isinstance(built, Path)
    library = ctypes.CDLL(str(built))
    assert [library.half_1(), library.half_2()] == [1, 2]
    assert sorted(word for line in seen.read_text().splitlines() for word in line.split() if "PART" in word) == [
        "-DLG_PART=1",
        "-DLG_PART=2",
    ]
    broken = cpp.build(halves.replace("return 2;", "return two;"), "halves")
    assert isinstance(broken, cpp.Missing) and "two" in broken.reason


def test_what_the_compiler_is_told_makes_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path))
    first, again = cpp.build(TINY, "tiny"), cpp.build(TINY, "tiny")
    other = cpp.build(TINY + "// changed\n", "tiny")
    assert isinstance(first, Path) and first == again and first != other


def test_what_is_built_ahead_is_what_the_operator_loads() -> None:
    op, variant = loaded("simple_gla")
    served = op.backends["cpp"].forward.__self__  # type: ignore[attr-defined]
    assert prebuild(variant) == cpp.build(served.source, variant.name)
    told = prebuild(read_text(MIXED, "mixed.yaml"))
    assert isinstance(told, cpp.Missing) and "W" in told.reason


def test_without_a_compiler_torch_serves_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    op, variant = loaded("simple_gla")
    case = make(variant, Extent(9))
    wanted = op(*case.inputs, backend="torch")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path))
    served = op.backends["cpp"].forward.__self__  # type: ignore[attr-defined]
    monkeypatch.setattr(served, "loaded", None)
    with pytest.warns(UserWarning, match="/nowhere/c\\+\\+") as told:
        assert torch.equal(op(*case.inputs), wanted)
        assert torch.equal(op(*case.inputs), wanted)
    assert len(told) == 1


def test_large_memory_is_asked_to_have_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(cpp, "_madvise", lambda start, size, how: asked.append((start, size)) or 0)
    small, large = cpp.roomy(torch.empty(1000)), cpp.roomy(torch.empty(1 << 21))
    (start, size), end = asked[0], large.data_ptr() + large.numel() * 4
    assert len(asked) == 1 and small.numel() == 1000
    assert start % cpp.PAGE == 0 and large.data_ptr() <= start < large.data_ptr() + cpp.PAGE and start + size == end


def test_a_file_that_does_not_compile_is_a_reason_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAGEN_CACHE_DIR", str(tmp_path))
    built = cpp.build("this is no C++\n", "broken")
    assert isinstance(built, cpp.Missing) and "error" in built.reason


# ---- the plan and the text ------------------------------------------------------------------------------------------------------


def compiled(text: str) -> tuple[lagen.ir.recurrence.Recurrence, lagen.ir.recurrence.Adjoint]:
    recurrence = canonicalise(read_text(text, "spec.yaml"))
    return recurrence, simplify(differentiate(recurrence))


def test_backward_takes_three_sweeps_of_a_plain_state() -> None:
    recurrence, adjoint = compiled(data.spec("simple_gla").read_text())
    forward, backward = plan_forward(recurrence), plan_backward(adjoint)
    assert not isinstance(forward, Fallback) and not isinstance(backward, Fallback)
    assert [s.label for p in forward.passes for s in p.steps if isinstance(s, Sweep)] == ["S_K_"]
    assert sorted(s.label for p in backward.passes for s in p.steps if isinstance(s, Sweep)) == ["S_V_", "dS_K_", "dS_V_"]
    assert [p.reverse for p in backward.passes] == [False, True]


@pytest.mark.parametrize("name, tokens", [("retnet", 16), ("gated_deltanet", 16), ("hgrn", 16), ("gla", 8), ("rwkv7", 8)])
def test_a_tile_is_shorter_where_a_matrix_decays_on_a_dim(name: str, tokens: int) -> None:
    recurrence, adjoint = compiled(data.spec(name).read_text())
    forward, backward = plan_forward(recurrence), plan_backward(adjoint)
    text = render_cpp(recurrence, adjoint)
    assert not isinstance(forward, Fallback) and not isinstance(backward, Fallback) and not isinstance(text, Fallback)
    assert tile(forward) == tile(backward) == tokens and f"#define LG_TILE {tokens}\n" in text
    assert tunables(forward, "forward").default.table["forward tile"] == tokens


def test_two_renders_give_the_same_bytes() -> None:
    recurrence, adjoint = compiled(BY_VALUE)
    first = render_cpp(recurrence, adjoint)
    assert not isinstance(first, Fallback) and first == render_cpp(recurrence, adjoint)
    assert whole(first).count("struct Matrix") == 1


def test_what_the_fast_form_cannot_carry_is_a_fact_with_a_reason() -> None:
    recurrence, adjoint = compiled(MIXED)
    told = render_cpp(recurrence, adjoint)
    assert isinstance(told, Fallback) and (told.reason,) * 2 == fallback(recurrence, adjoint) and "W" in told.reason


def test_forward_scratch_does_not_grow_with_time() -> None:
    recurrence, _ = compiled(data.spec("gla").read_text())
    forward = plan_forward(recurrence)
    assert not isinstance(forward, Fallback) and forward.kept == ()
