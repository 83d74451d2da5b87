"""Reading good specs: types, heads, layouts, functions put in, dims that lines make, names kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from lagen.data import specs
from lagen.ir.expr import Expr, show, walk
from lagen.ir.variant import Span, Variant
from lagen.spec import SpecErrors, place_of, read, read_text, schema
from lagen.spec.read import CHUNK_DEFAULT, CHUNK_SIZES, KEYS

MAMBA2 = """
name: mamba2
inputs:
  C: [H, N]
  B: [H, N]
  x: [HV, P]
  dt_raw: [HV]
params:
  A_log: [HV]
  dt_bias: [HV]
  D: [HV]
define:
  dt: softplus(dt_raw + dt_bias)
recurrence:
  S: exp(-exp(A_log) * dt) * S[t-1] + outer(B, dt * x)
  o: C @ S[t] + D * x
"""


def spec(recurrence: str, define: str = "", inputs: str = "q k:K v:V g: b:", rest: str = "") -> Variant:
    """Reads a spec from its lines; ``inputs`` lists names with their dims on H (K where none is given)."""
    dims = {}
    for word in inputs.split():
        name, _, has = word.partition(":")
        dims[name] = ["H", *(has.split(",") if has else [] if ":" in word else ["K"])]
    text = "name: a\ninputs:\n" + "".join(f"  {n}: [{', '.join(d)}]\n" for n, d in dims.items())
    for key, lines in (("define", define), ("recurrence", recurrence)):
        text += f"{key}:\n" + "".join(f"  {line.strip()}\n" for line in lines.strip().split("\n")) if lines else ""
    used = " + ".join(f"sum({n})" if len(d) > 1 else n for n, d in dims.items())
    return read_text(text.replace("USE", f"0.5 * ({used})") + rest)


def line(variant: Variant, name: str) -> Expr:
    return {**{s.name: s.expr for s in variant.states}, **{o.name: o.expr for o in variant.outputs}}[name]


def test_mamba2() -> None:
    v = read_text(MAMBA2)
    assert [t.name for t in v.inputs] == ["C", "B", "x", "dt_raw"]
    assert [t.name for t in v.params] == ["A_log", "dt_bias", "D"]
    assert v.tensor("C").shape == ("B", "T", "H", "N") and v.tensor("D").shape == ("HV",)
    (s,), (o,) = v.states, v.outputs
    assert (s.name, s.head, s.dims) == ("S", "HV", ("N", "P"))
    assert (o.name, o.head, o.dims) == ("o", "HV", ("P",))
    assert str(o.expr) == "C @ S[t] + D * x"
    names = {e: n for n, e in v.names}
    assert show(s.expr, names) == "exp(-(exp(A_log) * dt)) * S[t-1] + outer(B, dt * x)"
    assert not v.scaled and v.causal and (v.chunk_sizes, v.chunk_default) == (CHUNK_SIZES, CHUNK_DEFAULT)
    assert dict(v.spans)["dt"] == Span(13, 3, 2) and s.span == Span(15, 3, 1)


@pytest.mark.parametrize("path", specs(), ids=lambda p: p.stem)
def test_shipped_specs_read(path: Path) -> None:
    v = read(path)
    assert v.name == path.stem and v.states and v.outputs and v.path == str(path)


@pytest.mark.parametrize(
    "recurrence, dims",
    [
        ("S: S[t-1] + outer(k, v)\no: q @ S[t] + USE", {"S": ("K", "V"), "o": ("V",)}),
        ("S: S[t-1] + outer(v, k)\no: q @ S[t] + USE", {"S": ("V", "K"), "o": ("V",)}),
        ("S: S[t-1] + b * outer(k, v - k @ S[t-1])\no: q @ S[t] + USE", {"S": ("K", "V")}),
        ("S: S[t-1] + outer(b * (k - S[t-1] @ v), v)\no: S[t] @ v + USE", {"S": ("K", "V"), "o": ("K",)}),
        ("S: exp(g) * S[t-1] + outer(k, q @ S[t-1]) + outer(k, v)\no: q @ S[t] + USE", {"S": ("K", "V")}),
        ("z: z[t-1] + k\no: tanh(z[t]) * q + USE", {"z": ("K",), "o": ("K",)}),
        ("n: n[t-1] + dot(q, k)\no: n[t] * v + USE", {"n": (), "o": ("V",)}),
        ("S: exp(g) * S[t-1] + k\no: S[t] * g + USE", {"S": ("K",)}),
        ("_R: exp(g) * S[t-1]\nS: _R + outer(k, v - k @ _R)\no: q @ S[t] + USE", {"S": ("K", "V")}),
        ("A: A[t-1] + outer(k, v)\nB: B[t-1] + outer(q @ A[t], k)\no: B[t] @ k + USE", {"A": ("K", "V"), "B": ("V", "K"), "o": ("V",)}),
        ("z: z[t-1] + k * k\n_k: k * rsqrt(z[t] + 1e-6)\nS: S[t-1] + outer(_k, v)\no: q @ S[t] + USE", {"z": ("K",), "S": ("K", "V")}),
        ("o: q @ S[t-1] + USE\nS: S[t-1] + outer(k, v)", {"S": ("K", "V"), "o": ("V",)}),
    ],
)
def test_dims_of_states_and_outputs(recurrence: str, dims: dict[str, tuple[str, ...]]) -> None:
    v = spec(recurrence)
    found = {x.name: x.dims for x in (*v.states, *v.outputs)}
    assert {n: found[n] for n in dims} == dims
    assert all(set(x.expr.dims) == set(x.dims) for x in (*v.states, *v.outputs))


def test_heads() -> None:
    grouped_values = read_text(
        "name: a\ninputs:\n  q: [H, K]\n  k: [H, K]\n  v: [HV, V]\nrecurrence:\n"
        "  S: S[t-1] + outer(k, v)\n  z: z[t-1] + k\n  o: (q @ S[t]) * (q @ z[t])\n"
    )
    assert [(s.name, s.head) for s in grouped_values.states] == [("S", "HV"), ("z", "H")] and grouped_values.outputs[0].head == "HV"
    grouped_queries = read_text(
        "name: a\ninputs:\n  q: [HV, K]\n  k: [H, K]\n  v: [H, V]\nrecurrence:\n  S: S[t-1] + outer(k, v)\n  o: q @ S[t]\n"
    )
    assert grouped_queries.states[0].head == "H" and grouped_queries.outputs[0].head == "HV"
    none = read_text("name: a\ninputs:\n  q: [D]\n  pos: []\nrecurrence:\n  h: cos(pos) ** 2 * h[t-1] + q\n  o: h[t]\n")
    assert none.states[0].head == "" and none.tensor("pos").shape == ("B", "T")


def test_functions_are_put_in_at_each_call() -> None:
    v = spec("S: S[t-1] + outer(phi(k, 2), v)\no: psi(phi(q, 3) @ S[t]) + USE", "phi(x, y): elu(x) + y\npsi(x): softmax(x)")
    assert str(line(v, "S")) == "S[t-1] + outer(elu(k) + 2, v)"
    assert str(line(v, "o")).startswith("softmax((elu(q) + 3) @ S[t])")


@pytest.mark.parametrize(
    "function, size",
    [
        ("concat(x, -x) -> F", "K + K"),
        ("softmax(concat(x, -x)) -> F", "K + K"),
        ("taylor2(K ** -0.25 * x) -> F", "1 + K + K * (K + 1) / 2"),
        ("quad(x) -> F", "K * (K + 1) / 2"),
        ("concat(quad(x), x) -> F", "K * (K + 1) / 2 + K"),
        ("relu(x) -> F", "K"),
    ],
)
def test_dims_that_lines_make(function: str, size: str) -> None:
    v = spec("S: S[t-1] + outer(phi(k), v)\no: phi(q) @ S[t] + USE", f"phi(x): {function}")
    assert v.states[0].dims == ("F", "V")
    assert {d: str(e) for d, e in v.sizes}["F"] == size


def test_dims_made_from_made_dims_are_in_sizes_of_tensors() -> None:
    v = spec("S: S[t-1] + outer(psi(phi(k)), v)\no: psi(phi(q)) @ S[t] + USE", "phi(x): concat(x, x) -> F\npsi(x): concat(x, x) -> G")
    assert {d: str(e) for d, e in v.sizes} == {"F": "K + K", "G": "K + K + (K + K)"}


def test_unnamed_dims_may_be_contracted_away() -> None:
    v = spec("S: S[t-1] + (taylor2(q) @ taylor2(k)) * v\no: S[t] + USE")
    assert v.states[0].dims == ("V",) and [d for d, _ in v.sizes] == ["taylor2_K"]


def test_a_dim_of_a_param_is_named_by_the_contraction() -> None:
    v = read_text(
        "name: a\ninputs:\n  k: [H, K]\n  v: [H, V]\nparams:\n  W: [H, K, E]\n"
        "define:\n  phi(x): exp(x @ W)\nrecurrence:\n  S: S[t-1] + outer(phi(k), v)\n  o: phi(k) @ S[t]\n"
    )
    assert v.states[0].dims == ("E", "V") and not v.sizes


def test_numbers() -> None:
    v = spec("S: S[t-1] + outer(k, v)\no: (q @ S[t]) * c + USE", "c: K ** -0.5 * (1 - 1/4) * 2 ** -(1 + 1) * pi")
    (c,) = [e for n, e in v.names if n == "c"]
    assert {n.value for n in walk(c) if n.op == "const"} == {0.75, 0.25, 3.141592653589793} and not c.token


def test_where_and_two_kinds_of_max() -> None:
    v = spec("S: S[t-1] + outer(where(g <= 0, k, max(k, 0)), v)\no: max(q) * (q @ S[t]) + min(max(g, 0), 1) * v + USE")
    ops = {n.op for o in (line(v, "S"), line(v, "o")) for n in walk(o)}
    assert {"where", "le", "max", "rowmax", "min"} <= ops


def test_row_functions_and_their_eps() -> None:
    v = spec("S: S[t-1] + outer(l2norm(k), v)\no: l2norm(q, 0.001) @ S[t] + rmsnorm(v, 1e-5) + USE")
    eps = {n.op + str(n.value) for o in (line(v, "S"), line(v, "o")) for n in walk(o) if n.op.endswith("norm")}
    assert eps == {"l2norm1e-06", "l2norm0.001", "rmsnorm1e-05"}


def test_underscore_lines_are_kept_as_names() -> None:
    v = spec("_R: exp(g) * S[t-1]\nS: _R + outer(k, v - k @ _R)\no: q @ S[t] + USE")
    names = dict(v.names)
    assert str(names["_R"]) == "exp(g) * S[t-1]" and [o.name for o in v.outputs] == ["o"]
    assert show(line(v, "S"), {names["_R"]: "_R"}) == "_R + outer(k, v - (k @ _R))"


def test_not_causal() -> None:
    v = spec("S: outer(softmax(k), v)\nz: exp(k)\no: (q @ S[t]) / (q @ z[t]) + USE", rest="causal: false\n")
    assert not v.causal and [s.name for s in v.states] == ["S", "z"]
    assert str(line(v, "S")) == "outer(softmax(k), v)" and not any(n.op == "past" for n in walk(line(v, "S")))


def test_peak_lines_and_initial_values() -> None:
    v = spec("m: max(m[t-1] - softplus(g), b)\nS: S[t-1] + outer(k, v)\no: m[t] * (q @ S[t]) + USE", rest="init: {m: -1.0e30}\n")
    m, s = v.states
    assert m.peak and m.init == -1.0e30 and not s.peak and s.init == 0.0


def test_outputs_in_order() -> None:
    v = spec("S: S[t-1] + outer(k, v)\nz: z[t-1] + k\nb2: q @ S[t]\na2: q @ z[t] + USE")
    assert [o.name for o in v.outputs] == ["b2", "a2"]


def test_assumptions_have_names_put_in() -> None:
    v = spec("S: e * S[t-1] + outer(k, v)\no: q @ S[t] + USE", "e: exp(g)", rest="assume:\n  - e <= 1\n  - b * dot(k, k) <= 2\n")
    assert [str(a) for a in v.assumptions] == ["exp(g) <= 1", "b * (k @ k) <= 2"]


def test_chunk() -> None:
    v = spec("S: S[t-1] + outer(k, v)\no: q @ S[t] + USE", rest="chunk: {default: 32, sizes: [64, 32]}\n")
    assert (v.chunk_sizes, v.chunk_default) == ((32, 64), 32)


def test_scale_is_known() -> None:
    assert spec("S: S[t-1] + outer(k, v)\no: scale * (q @ S[t]) + USE").scaled


def test_block_scalars_and_folded_lines() -> None:
    plain = spec("S: S[t-1] + outer(k, v)\no: q @ S[t] + USE")
    folded = read_text(
        plain.source.replace("S: S[t-1] + outer(k, v)", "S: |  # two lines\n    S[t-1]   # the past\n    + outer(k, v)").replace(
            "o: q @ S[t] +", "o: q\n    @ S[t] +"
        )
    )
    assert [s.expr for s in folded.states] == [s.expr for s in plain.states]
    assert [o.expr for o in folded.outputs] == [o.expr for o in plain.outputs]


def test_place_of_a_term() -> None:
    v = read_text(MAMBA2)
    (outer,) = [n for n in walk(v.states[0].expr) if n.op == "outer"]
    assert place_of(v, "S", outer) == Span(15, 39, 16)
    assert place_of(v, "S", v.outputs[0].expr) == Span(15, 3, 1)


def test_reading_twice_gives_equal_variants() -> None:
    assert read_text(MAMBA2) == read_text(MAMBA2)


def test_schema_names_every_key() -> None:
    properties = schema()["properties"]
    assert isinstance(properties, dict) and set(properties) == set(KEYS)


def test_errors_survive_a_process_border() -> None:
    with pytest.raises(SpecErrors) as found:
        read_text("name: a\n", "x.yaml")
    again = copy.copy(found.value)  # by __reduce__, as worker processes send them
    assert str(again) == str(found.value) and again.mistakes == found.value.mistakes
