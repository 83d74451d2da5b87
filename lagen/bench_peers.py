"""Peers: functions of other libraries that compute a shipped variant in torch code, for `lagen bench` to time beside lagen's.

What it is: a table of who computes what, and how to call it by the spec's names. What it is not: no judgement. Whoever times a peer
compares its numbers with the oracle first, so a library that changes its meaning falls out of the race with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import unwrap

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """One library's function for one variant; ``call`` hands it the variant's tensors by name and takes the output."""

    library: str
    variant: str
    module: str
    function: str
    call: Callable[[Function, Named], Tensor]
    multiple: int = 1  # lengths it takes

    def find(self) -> Function | str:
        """Returns the function, or why it is not there."""
        if find_spec(self.library) is None:
            return "is not installed"
        try:
            module = import_module(self.module)
        except ImportError as missing:
            return f"has no {self.module} that can be imported: {missing}"
        found: Function | None = getattr(module, self.function, None)
        return f"has no {self.function} in {self.module}" if found is None else unwrap(found)  # the torch code, where kernels may wrap it


def _mamba2(f: Function, x: Named) -> Tensor:
    return f(x["x"], x["dt_raw"], -x["A_log"].exp(), x["B"], x["C"], 256, D=x["D"], dt_bias=x["dt_bias"], dt_softplus=True)


def _mamba1(f: Function, x: Named) -> Tensor:
    turned = (x[n].mT for n in ("x", "dt_raw"))
    shared = (x[n].mT for n in ("B", "C"))
    made = f(*turned, -x["A_log"].exp(), *shared, D=x["D"], delta_bias=x["dt_bias"], delta_softplus=True)
    return (made[0] if isinstance(made, tuple) else made).mT


def _ssd(f: Function, x: Named) -> Tensor:
    dt = torch.nn.functional.softplus(x["dt_raw"] + x["dt_bias"])
    shared = x["x"].shape[2] // x["B"].shape[2]
    b, c = (x[n].repeat_interleave(shared, 2) for n in ("B", "C"))
    return f(x["x"] * dt[..., None], -x["A_log"].exp() * dt, b, c, 64)[0] + x["D"][:, None] * x["x"]


def _in_order(*names: str) -> Callable[[Function, Named], Tensor]:
    return lambda f, x: f(*(x[n] for n in names))[0]


PEERS = (
    Peer("transformers", "mamba1", "transformers.models.mamba.modeling_mamba", "mamba_selective_scan", _mamba1),
    Peer("mamba_ssm", "mamba1", "mamba_ssm.ops.selective_scan_interface", "selective_scan_ref", _mamba1),
    Peer("transformers", "mamba2", "transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan", _mamba2),
    Peer(
        "transformers",
        "gated_deltanet",
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_chunk_gated_delta_rule",
        _in_order("q", "k", "v", "g", "beta"),
    ),
    Peer("fla", "simple_gla", "fla.ops.simple_gla.naive", "naive_chunk_simple_gla", _in_order("q", "k", "v", "g")),
    Peer("fla", "gla", "fla.ops.gla.naive", "naive_recurrent_gla", _in_order("q", "k", "v", "g")),
    Peer("fla", "gated_deltanet", "fla.ops.gated_delta_rule.naive", "naive_chunk_gated_delta_rule", _in_order("q", "k", "v", "g", "beta")),
    Peer("mamba_ssm", "mamba2", "mamba_ssm.modules.ssd_minimal", "ssd_minimal_discrete", _ssd, multiple=64),
)
LIBRARIES = tuple(dict.fromkeys(p.library for p in PEERS))


def peer_of(library: str, variant: str) -> Peer | None:
    """Returns a library's function for a variant, None where the table has none."""
    return next((p for p in PEERS if (p.library, p.variant) == (library, variant)), None)
