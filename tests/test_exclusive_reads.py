"""Exclusive reads under decay: what the token before wrote meets no decay, and must not drown the decay's gradient."""

from __future__ import annotations

import pytest
import torch
from random_specs import Recipe

import lagen
from lagen import data
from lagen.ir import expr as E
from lagen.ir.variant import Variant
from lagen.passes.leads import push_leads
from lagen.runtime import chunked, cpp
from lagen.runtime.operator import Operator
from lagen.spec import read, read_text
from lagen.verify import cases, compare, laws
from lagen.verify.cases import Case, Extent
from lagen.verify.oracle import Tensors, oracle

RECIPES = {
    "bonus_guarded": Recipe(decay="scalar", read="bonus", norm="guarded", heads="values"),
    "exclusive_queries": Recipe(decay="key", read="exclusive", heads="queries"),
    "bonus_queries": Recipe(decay="key and value", read="bonus", heads="queries"),
    "by_value": Recipe(decay="value", read="exclusive", heads="queries"),
    "bonus_by_value": Recipe(decay="value", read="bonus"),
    "resized": Recipe(decay="scalar", read="exclusive", map="taylor"),
}
TEXTS = {
    "both_reads": ("g: [H]", "S: exp(g) * S[t-1] + outer(k, v)", "o: silu(q @ S[t]) * (k @ S[t-1])"),
    "both_sides": ("g: [H, K], c: [H, V]", "S: exp(g) * (exp(c) * S[t-1]) + outer(k, v)", "o: q @ S[t-1]", "p: S[t-1] @ c"),
    "vector_state": ("g: [H, K]", "h: exp(g) * h[t-1] + q * k", "o: (h[t-1] @ k) * v"),
}


def read_case(name: str) -> Variant:
    """Reads a shipped spec, a recipe, or one of TEXTS."""
    if name in RECIPES:
        return read_text(RECIPES[name].text(), name)
    if name not in TEXTS:
        return read(data.spec(name))
    gates, *formulas = TEXTS[name]
    rules = "".join(f"  {f}\n" for f in formulas)
    facts = ", ".join(f"{g} <= 0" for g in "gc" if f"{g}:" in gates)
    head = f"name: {name}\ninputs: {{q: [H, K], k: [H, K], v: [H, V], {gates}}}\nassume: [{facts}]\n"
    return read_text(f"{head}recurrence:\n{rules}chunk: {{default: 16, sizes: [16]}}\n", name)


def errors(op: Operator, spec: Variant, case: Case, backend: str) -> dict[str, float]:
    """Runs a case forward and backward and measures all that comes of it against the recurrence in float64."""

    def run(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        state = states[0] if states is not None and len(states) == 1 else states
        o, final = op(*inputs, *params, initial_state=state, output_final_state=True, backend=backend)
        return (o if isinstance(o, tuple) else (o,)), (final if isinstance(final, tuple) else (final,))

    def exact(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        return oracle(spec, inputs, params, None, states, True, torch.float64)

    wanted = laws.tensors(exact, spec, case, dtype=torch.float64)
    return {name: compare.error(x, wanted[name]) for name, x in laws.tensors(run, spec, case).items()}


@pytest.mark.parametrize("regime", ["gates at -5", "gates at -20"])
@pytest.mark.parametrize("name", ["rwkv6", *RECIPES, *TEXTS])
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_gates_keep_their_gradient_however_closed(backend: str, name: str, regime: str) -> None:
    if backend == "cpp" and not cpp.compilers():
        pytest.skip("no C++ compiler")
    if backend == "triton" and name not in ("rwkv6", "bonus_guarded", "by_value", "both_reads", "vector_state"):
        pytest.skip("interpreted on a few of them: one for each way to read")
    spec = read_case(name)
    op = lagen.load(spec)
    for time in (21, 1) if backend == "triton" else (1, 2, 16, 17, 37):
        found = errors(op, spec, cases.make(spec, Extent(time, heads=1), regime, carried=True), backend)
        assert max(found.values()) < 1e-5, found


def test_leads_go_down_to_what_is_stored_and_keep_the_last_token() -> None:
    x, w = E.leaf("input", "x", ("K",), "H", token=True), E.leaf("param", "w", ("K",), "H")
    led = push_leads(E.neg(E.lead(E.mul(w, E.call("exp", x)))), lambda n: n.op == "input")
    assert led == E.neg(E.mul(w, E.call("exp", E.lead(x))))
    assert E.lead(w) == w, "what all tokens share is the next one's too"
    rows = torch.arange(3.0).reshape(1, 3, 1, 1)
    assert chunked.lead(rows).flatten().tolist() == [1.0, 2.0, 2.0]
    assert chunked.follows(3, rows).flatten().tolist() == [1.0, 1.0, 0.0]
    assert chunked.lead(rows[:, :0]).shape == rows[:, :0].shape
