"""Reading good specs: types, layouts, functions put in, names kept."""

from __future__ import annotations

from lagen.spec import read_text

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


def test_mamba2() -> None:
    v = read_text(MAMBA2)
    assert [t.name for t in v.inputs] == ["C", "B", "x", "dt_raw"]
    assert [t.name for t in v.params] == ["A_log", "dt_bias", "D"]
    (s,), (o,) = v.states, v.outputs
    assert (s.name, s.head, s.dims) == ("S", "HV", ("N", "P"))
    assert (o.name, o.head, o.dims) == ("o", "HV", ("P",))
    assert str(o.expr) == "C @ S[t] + D * x"
    assert dict(v.names)["dt"].dims == ()
    assert not v.scaled
