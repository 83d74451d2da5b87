"""Later families: their specs are read, and canonicalise says which part is not compiled yet, at its place."""

from __future__ import annotations

import pytest

from lagen.passes.canonicalise import canonicalise
from lagen.passes.refusal import NotYet
from lagen.spec import read_text

KV = "q: [H, K]; k: [H, K]; v: [H, V]"
SPECS: dict[str, tuple[str, str, str, str]] = {  # inputs, recurrence, family, the text under the caret
    "mamba_s6": (
        "C: [N]; B: [N]; x: [E]; dt: [E]; A: [E, N]",
        "S: exp(-exp(outer(dt, B)) * exp(A)) * S[t-1] + outer(dt * x, B); o: S[t] @ C",
        "dense-decay",
        "exp(-exp(outer(dt, B)) * exp(A))",
    ),
    "gsa": (
        f"{KV}; s: [H, M]; g: [H, M]",
        "A: sigmoid(g) * A[t-1] + outer(k, s); B: sigmoid(g) * B[t-1] + outer(s, v); o: softmax(scale * (q @ A[t])) @ B[t]",
        "stages",
        "softmax(scale * (q @ A[t])) @ B[t]",
    ),
    "hgrn": ("x: [D]; f: [D]", "h: sigmoid(f) * h[t-1] + (1 - sigmoid(f)) * x; o: h[t]", "vector-read", "h[t]"),
    "stabilised": (
        f"{KV}; i: [H]; f: [H]",
        "m: max(m[t-1] + logsigmoid(f), i); S: exp(m[t-1] + logsigmoid(f) - m[t]) * S[t-1] + exp(i - m[t]) * outer(k, v); o: q @ S[t]",
        "peak",
        "max(m[t-1] + logsigmoid(f), i)",
    ),
    "written_by_a_read": (
        KV,
        "A: A[t-1] + outer(k, v); B: B[t-1] + outer(k, q @ A[t]); o: q @ B[t]",
        "stages",
        "q @ A[t]",
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_later_family_is_named(name: str) -> None:
    inputs, recurrence, family, term = SPECS[name]

    def lines(text: str) -> str:
        return "".join(f"  {line.strip()}\n" for line in text.split(";"))

    variant = read_text(f"name: {name}\ninputs:\n{lines(inputs)}recurrence:\n{lines(recurrence)}")
    with pytest.raises(NotYet) as caught:
        canonicalise(variant)
    error = caught.value
    line = variant.source.split("\n")[error.span.line - 1]
    assert (error.code, error.family) == ("not-yet", family)
    assert line[error.span.col - 1 :][: error.span.length] == term
