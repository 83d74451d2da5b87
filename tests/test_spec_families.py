"""Published variants of every family read and type as their papers state them, those of later families included."""

from __future__ import annotations

import pytest

from lagen.ir.bounds import facts_of, log_of, prove_nonpositive
from lagen.ir.expr import walk
from lagen.spec import SpecErrors, read_text

QKV = "q: [H, K]|k: [H, K]|v: [H, V]"

FAMILIES = {
    "deltanet": (f"{QKV}|beta: [H]", "S: S[t-1] + beta * outer(k, v - k @ S[t-1])|o: scale * (q @ S[t])"),
    "gated_deltanet": (
        f"{QKV}|g: [H]|beta: [H]",
        "S: exp(g) * S[t-1] + beta * outer(k, v - exp(g) * (k @ S[t-1]))|o: scale * (q @ S[t])",
    ),
    "kda": (f"{QKV}|g: [H, K]|beta: [H]", "S: exp(g) * S[t-1] + beta * outer(k, v - k @ (exp(g) * S[t-1]))|o: scale * (q @ S[t])"),
    "gdn2": (f"{QKV}|g: [H, K]|e: [H, K]|w: [H, V]", "_R: exp(g) * S[t-1]|S: _R + outer(k, w * v - (e * k) @ _R)|o: q @ S[t]"),
    "comba": (f"{QKV}|g: [H]|beta: [H]|p: [H, K]", "S: exp(g) * S[t-1] + beta * outer(k, v - p @ S[t-1])|o: (q - beta * k) @ S[t]"),
    "deltaproduct": (
        "q: [H, K]|k1: [H, K]|k2: [H, K]|v1: [H, V]|v2: [H, V]|g: [H]|b1: [H]|b2: [H]",
        "_R: exp(g) * S[t-1]|_P: _R + b1 * outer(k1, v1 - k1 @ _R)|S: _P + b2 * outer(k2, v2 - k2 @ _P)|o: q @ S[t]",
    ),
    "rwkv7": (f"{QKV}|w: [H, K]|a: [H, K]|b: [H, K]", "S: exp(-exp(w)) * S[t-1] + outer(b, a @ S[t-1]) + outer(k, v)|o: q @ S[t]"),
    "gated_oja": (f"{QKV}|g: [H, V]|beta: [H]", "_R: exp(g) * S[t-1]|S: _R + outer(beta * (k - _R @ v), v)|o: q @ S[t]"),
    "gla_two_gates": (f"{QKV}|gk: [H, K]|gv: [H, V]", "S: exp(gk) * (exp(gv) * S[t-1]) + outer(k, v)|o: q @ S[t]"),
    "s6": ("C: [N]|B: [N]|x: [E]|dt: [E]|A: [E, N]", "S: exp(-exp(A) * softplus(dt)) * S[t-1] + outer(dt * x, B)|o: S[t] @ C"),
    "longhorn": (f"{QKV}|beta: [H, V]", "S: (1 - outer(k * k, sigmoid(beta))) * S[t-1] + outer(k, sigmoid(beta) * v)|o: q @ S[t]"),
    "hgrn": ("f: [D]|i: [D]|g: [D]", "h: sigmoid(f) * h[t-1] + sigmoid(-f) * i|o: tanh(h[t]) * g"),
    "rwkv4": (
        "k: [D]|v: [D]|w: [D]|u: [D]",
        "m: max(m[t-1] - exp(w), k)|a: exp(m[t-1] - exp(w) - m[t]) * a[t-1] + exp(k - m[t]) * v"
        "|b: exp(m[t-1] - exp(w) - m[t]) * b[t-1] + exp(k - m[t])|_p: max(m[t-1], u + k)"
        "|o: (exp(m[t-1] - _p) * a[t-1] + exp(u + k - _p) * v) / (exp(m[t-1] - _p) * b[t-1] + exp(u + k - _p))",
    ),
    "mlstm": (
        f"{QKV}|i: [H]|f: [H]",
        "m: max(m[t-1] + logsigmoid(f), i)|S: exp(m[t-1] + logsigmoid(f) - m[t]) * S[t-1] + exp(i - m[t]) * outer(k, v)"
        "|n: exp(m[t-1] + logsigmoid(f) - m[t]) * n[t-1] + exp(i - m[t]) * k"
        "|o: ((scale * q) @ S[t]) / max(abs((scale * q) @ n[t]), exp(-m[t]))",
    ),
    "gsa": (
        f"{QKV}|s: [H, M]|g: [H, M]",
        "A: exp(g) * A[t-1] + outer(k, s)|B: exp(g) * B[t-1] + outer(s, v)|o: softmax(scale * (q @ A[t])) @ B[t]",
    ),
    "abc": (
        f"{QKV}|s: [H, M]",
        "m: max(m[t-1], s)|A: exp(m[t-1] - m[t]) * A[t-1] + outer(k, exp(s - m[t]))|n: exp(m[t-1] - m[t]) * n[t-1] + exp(s - m[t])"
        "|B: exp(m[t-1] - m[t]) * B[t-1] + outer(exp(s - m[t]), v)|o: (softmax(q @ (A[t] / n[t])) / n[t]) @ B[t]",
    ),
    "two_stages": (QKV, "A: A[t-1] + outer(k, v)|B: B[t-1] + outer(q @ A[t], k)|o: B[t] @ k"),
    "preconditioned": (QKV, "A: A[t-1] + k * k|_k: k * rsqrt(A[t] + 1e-6)|S: S[t-1] + outer(_k, v)|o: q @ S[t]"),
}


def text(inputs: str, lines: str, assume: str = "") -> str:
    def block(key: str, content: str) -> str:
        return f"{key}:\n" + "".join(f"  {line}\n" for line in content.split("|"))

    return "name: a\n" + block("inputs", inputs) + (f"assume:\n  - {assume}\n" if assume else "") + block("recurrence", lines)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_reads(name: str) -> None:
    v = read_text(text(*FAMILIES[name]))
    assert [line.split(":")[0] for line in FAMILIES[name][1].split("|") if not line.startswith("_")] == [
        x.name for x in (*v.states, *v.outputs)
    ]
    for s in v.states:
        assert any(n.op == "past" and n.name == s.name for n in walk(s.expr)) and s.peak == (s.name == "m")
    for e in (*v.states, *v.outputs):
        for n in walk(e.expr):
            if n.op in ("past", "now"):
                assert set(n.dims) == set(v.state(n.name).dims) and n.head == v.state(n.name).head


@pytest.mark.parametrize("name", ["rwkv4", "mlstm", "abc"])
def test_stabilised_exps_are_at_most_one(name: str) -> None:
    v = read_text(text(*FAMILIES[name]))
    for s in (s for s in v.states if not s.peak):
        for n in (n for n in walk(s.expr) if n.op == "exp" and any(x.op == "now" for x in walk(n))):
            assert prove_nonpositive(log_of(n), facts_of(v)).holds, str(n)


OUT_OF_REACH = {
    "titans": (
        f"{QKV}|a: [H]|e: [H]|b: [H]",
        "M: sigmoid(e) * M[t-1] - b * outer(k, k @ S[t-1] - v)|S: sigmoid(a) * S[t-1] + M[t]|o: q @ S[t]",
        "circle",
    ),
    "momentum_delta": (
        QKV,
        "M: 0.9 * M[t-1] + outer(k, v - k @ S[t-1])|S: S[t-1] + outer(k, k @ M[t]) * 1|o: q @ S[t]",
        "circle",
    ),
    "mesa": (QKV, "A: A[t-1] + outer(k, v)|o: solve(q, A[t])", "out-of-reach"),
    "log_linear": (QKV, "S: S[t-1] + outer(k, v)|o: fenwick(q @ S[t])", "out-of-reach"),
    "softmax": (QKV, "S: S[t-1] + outer(k, v)|o: attention(q, k, v) + q @ S[t]", "out-of-reach"),
    "token_shift": (QKV, "S: S[t-1] + outer(k + k[t-1], v)|o: q @ S[t]", "no-past"),
    "positions": (QKV, "S: cos(t) * S[t-1] + outer(k, v)|o: q @ S[t]", "time"),
}


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_out_of_reach_is_refused_by_name(name: str) -> None:
    inputs, lines, code = OUT_OF_REACH[name]
    with pytest.raises(SpecErrors) as found:
        read_text(text(inputs, lines))
    assert code in [m.code for m in found.value.mistakes], str(found.value)
