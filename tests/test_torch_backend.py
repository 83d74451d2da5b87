"""The torch backend: chunked states against a loop over tokens, and whole variants against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lagen
from lagen import data
from lagen.runtime.chunked import State, taylor2, taylor2_adjoint
from lagen.runtime.operator import Operator
from lagen.spec.read import read, read_text
from lagen.verify.cases import Case, Extent, make

SIZES = {"K": 5, "V": 3}
SUBSETS = [s for n in range(4) for s in itertools.combinations(("", "K", "V"), n)]


# ---- one state ------------------------------------------------------------------------------------------------------------------


def loop(dims: tuple[str, ...], writes: list[tuple], decay: dict[str, Tensor], edge: Tensor, reverse: bool) -> dict[str, list[Tensor]]:
    """Runs a state token by token; returns what each token may read of it, and the state behind the last one under "end"."""
    tokens = writes[0][0].shape[1]
    reads: dict[str, list] = {at: [None] * tokens for at in ("now", "decayed", "previous", "later")}
    state = edge

    def on(x: Tensor, dim: str) -> Tensor:
        for missing in [d for d in dims if d != dim]:
            x = x.unsqueeze(-2 if dim and missing == dims[0] else -1)
        return x

    row, col = (*dims, "", "")[:2]
    for t in reversed(range(tokens)) if reverse else range(tokens):
        reads["later" if reverse else "previous"][t] = state
        factor = torch.ones_like(state)
        for dim, g in decay.items():
            factor = factor * on(g[:, t].clamp(min=-104).exp(), dim)
        state = state * factor
        reads["decayed"][t] = state
        for w in writes:
            part = on(w[0][:, t], row) * on(w[1][:, t], col)
            state = state + (part * factor if reverse and w[2] else part)
        reads["now"][t] = state
    return reads | {"end": [state]}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 37, 64, 130])
@pytest.mark.parametrize("decayed_on", SUBSETS, ids=lambda s: "+".join(d or "head" for d in s) or "none")
def test_chunks_read_what_a_loop_over_tokens_reads(decayed_on: tuple[str, ...], tokens: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    dims, lead = ("K", "V"), (2, tokens, 2, 3)
    writes: list[tuple] = [(draw(2, tokens, 2, 1, 5), draw(*lead, 3), True)]
    if reverse:
        writes.append((draw(*lead, 5), draw(*lead, 3), False))
    for strength in (1.0, 20.0):
        decay = {d: -strength * draw(*lead, *([SIZES[d]] if d else [])).abs() for d in decayed_on}
        if strength == 20.0 and decay:
            next(iter(decay.values()))[:, :1] = -torch.inf  # a hard reset
        edge = draw(2, 2, 3, 5, 3)
        wanted = loop(dims, writes, decay, edge, reverse)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
            given = [(a.to(dtype), b.to(dtype), flag) for a, b, flag in writes]
            state = State(
                dims, (2, 2, 3, 5, 3), tokens, given, {d: g.to(dtype) for d, g in decay.items()}, edge.to(dtype), edge.to(dtype), reverse
            )
            assert distance(state.final, wanted["end"][0]) < bound
            if not reverse:
                assert distance(state.decayed_final, wanted["decayed"][-1]) < bound
            for over, at in itertools.product(dims, ["later"] if reverse else ["now", "decayed", "previous"]):
                vector = draw(*lead, SIZES[over])
                spelled = "bthgk,bthgkv->bthgv" if over == "K" else "bthgv,bthgkv->bthgk"
                want = torch.einsum(spelled, vector, torch.stack(wanted[at], 1))
                assert distance(state.read(vector.to(dtype), over, at), want) < bound, (over, at)


def test_a_vector_state_is_read_whole_and_a_number_is_a_state() -> None:
    h = State(("K",), (1, 1, 1, 4), 3, [(torch.ones(1, 3, 1, 1, 4), 1.0)], {"K": torch.full((1, 3, 1, 1, 4), -1.0)}, None, torch.ones(()))
    powers = torch.tensor([1.0, 1 + 0.36787944, 1 + 0.36787944 + 0.13533528])
    torch.testing.assert_close(h.read(1.0, "", "now")[0, :, 0, 0], powers[:, None].expand(3, 4))
    n = State((), (1, 1, 1), 3, [(1.0, 1.0)], {}, None, torch.ones(()))
    torch.testing.assert_close(n.read(2.0, "", "now").flatten(), torch.tensor([2.0, 4.0, 6.0]))


def test_taylor2_has_the_products_it_promises_and_its_adjoint() -> None:
    a, b = torch.randn(2, 3, 7, dtype=torch.float64)
    product = (taylor2(a) * taylor2(b)).sum(-1)
    dot = (a * b).sum(-1)
    torch.testing.assert_close(product, 1 + dot + dot**2 / 2)
    a.requires_grad_()
    d = torch.randn(3, 1 + 7 + 28, dtype=torch.float64)
    torch.testing.assert_close(taylor2_adjoint(d, a.detach()), torch.autograd.grad(taylor2(a), a, d)[0])


def distance(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest error over the largest value; inf where shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


# ---- whole variants -------------------------------------------------------------------------------------------------------------

NOVEL = {
    "value_decay_exclusive_grouped_queries": """
name: value_decay
inputs: {q: [HV, K], k: [H, K], v: [H, V], g: [H, V]}
assume:
  - g <= 0
recurrence:
  S: exp(g) * S[t-1] + outer(silu(k), v)
  o: scale * (silu(q) @ S[t-1])
""",
    "key_and_value_decay_grouped_values": """
name: both_decays
inputs: {q: [H, K], k: [H, K], v: [HV, V], a: [H, K], b: [HV, V], c: [HV]}
assume:
  - a <= 0
  - b <= 0
recurrence:
  S: exp(a) * (exp(b) * (sigmoid(c) * S[t-1])) + outer(k, v)
  o: scale * (q @ S[t]) + tanh(c) * v
""",
    "vector_state_without_heads": """
name: averages
inputs: {x: [D], y: [D], f: [D]}
params: {w: [D]}
recurrence:
  h: sigmoid(f) * h[t-1] + (1 - sigmoid(f)) * x
  n: n[t-1] + dot(x, w)
  o: dot(y, h[t]) * w / sqrt(1 + n[t] * n[t])
  p: dot(h[t-1], x)
init: {h: 0.5}
""",
    "two_states_and_a_projection": """
name: pair
inputs: {q: [H, K], k: [H, K], v: [H, V], g: [H]}
params: {W: [K, M], D: [HV]}
assume:
  - g <= 0
define:
  phi(x): softmax(x @ W)
recurrence:
  A: exp(g) * A[t-1] + outer(phi(k), v)
  B: B[t-1] + outer(k, v) + outer(g * q, v)
  o: (phi(q) @ A[t]) / (1 + dot(q, q)) + D * (q @ B[t-1])
""",
    "not_causal": """
name: whole
causal: false
inputs: {q: [H, K], k: [H, K], v: [HV, V]}
recurrence:
  S: outer(softmax(k), v)
  o: softmax(q) @ S[t]
""",
}


def compute(op: Operator, case: Case, backend: str) -> list[Tensor | None]:
    """Returns outputs, final states and all gradients of a case."""
    given = [x.detach().clone().requires_grad_() for x in (*case.inputs, *case.params, *(case.initial_states or ()))]
    n = len(case.inputs) + len(case.params)
    if op.spec.causal:
        initial = tuple(given[n:]) or None
        outputs, finals = op(*given[:n], initial_state=initial, output_final_state=True, backend=backend)
    else:
        outputs, finals = op(*given[:n], backend=backend), ()
    outputs, finals = ((x,) if isinstance(x, Tensor) else x for x in (outputs, finals))
    loss = sum((x.double() * d.double()).sum() for x, d in zip((*outputs, *finals), (*case.d_outputs, *case.d_states), strict=False))
    return [*outputs, *finals, *torch.autograd.grad(loss, given, allow_unused=True)]


def doubled(case: Case) -> Case:
    """Returns a case in float64."""
    wide = {n: tuple(x.double() for x in getattr(case, n)) for n in ("inputs", "params", "d_outputs", "d_states")}
    return Case(case.regime, torch.float64, **wide, initial_states=case.initial_states and tuple(x.double() for x in case.initial_states))


@pytest.mark.parametrize("tokens", [0, 1, 65, 133])
@pytest.mark.parametrize("name", NOVEL)
def test_a_variant_that_no_shipped_spec_resembles_agrees_with_the_oracle(name: str, tokens: int) -> None:
    variant = read_text(NOVEL[name])
    op = lagen.load(variant, printed=())
    case = doubled(make(variant, Extent(tokens), carried=variant.causal))
    for got, wanted in zip(compute(op, case, "torch"), compute(op, case, "oracle"), strict=True):
        if wanted is not None:
            assert got is not None
            assert distance(got, wanted) < 1e-10


@pytest.mark.parametrize("path", data.specs(), ids=lambda p: p.stem)
def test_a_shipped_variant_agrees_with_the_oracle(path) -> None:
    variant = read(path)
    op = lagen.load(variant, printed=())
    case = doubled(make(variant, Extent(70), carried=variant.causal))
    for got, wanted in zip(compute(op, case, "torch"), compute(op, case, "oracle"), strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert distance(got, wanted) < 1e-9


@pytest.mark.parametrize("regime", ["gates at -5", "gates at -20", "resets"])
@pytest.mark.parametrize("name", ["gla", "simple_gla", "hgrn2", "rwkv6"])
def test_strong_gates_keep_their_digits_in_float32(name: str, regime: str) -> None:
    variant = read(data.spec(name))
    op = lagen.load(variant, printed=())
    case = make(variant, Extent(70), regime, carried=True)
    for got, wanted in zip(compute(op, case, "torch"), compute(op, doubled(case), "oracle"), strict=True):
        assert distance(got, wanted) < 2e-5


@pytest.mark.parametrize("name", ["gla", "rwkv6", "mamba2", "linear_attention"])
def test_steps_and_carried_segments_give_what_the_whole_sequence_gives(name: str) -> None:
    variant = read(data.spec(name))
    op = lagen.load(variant, printed=())
    case = doubled(make(variant, Extent(70), carried=True))
    n = len(op.spec.states)
    whole, final = op(*case.inputs, *case.params, initial_state=case.initial_states, output_final_state=True, backend="torch")
    first, middle = op(
        *(x[:, :33] for x in case.inputs), *case.params, initial_state=case.initial_states, output_final_state=True, backend="torch"
    )
    second, last = op(*(x[:, 33:] for x in case.inputs), *case.params, initial_state=middle, output_final_state=True, backend="torch")
    assert distance(torch.cat((first, second), 1), whole) < 1e-10
    states = tuple(s.clone() for s in case.initial_states)
    rows = []
    for t in range(70):
        o, given = op.step(*(x[:, t] for x in case.inputs), *case.params, states if n > 1 else states[0], backend="torch")
        rows.append(o)
        assert (given if n > 1 else (given,))[0] is states[0]
    assert distance(torch.stack(rows, 1), whole) < 1e-10
    for a, b, c in zip(states, final if n > 1 else (final,), last if n > 1 else (last,), strict=True):
        assert distance(a, b) < 1e-10
        assert distance(c, b) < 1e-10


def test_a_gradient_reaches_everything_by_finite_differences() -> None:
    variant = read(data.spec("gla"))
    op = lagen.load(variant, printed=())
    case = doubled(make(variant, Extent(5, batch=1, heads=1, dims=(("K", 3), ("V", 2))), carried=True))
    given = [x.requires_grad_() for x in (*case.inputs, *case.initial_states)]
    assert torch.autograd.gradcheck(lambda *x: op(*x[:-1], initial_state=x[-1], output_final_state=True, backend="torch"), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    variant = read(data.spec("gla"))
    op = lagen.load(variant, printed=())
    case = make(variant, Extent(70), dtype=dtype)
    wide = [x.double() for x in case.inputs]
    o, state = op(*case.inputs, output_final_state=True, backend="torch")
    wanted, final = op(*wide, output_final_state=True, backend="oracle")
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    assert distance(o, wanted) < 2 * torch.finfo(dtype).eps
    assert distance(state, final) < 1e-5
