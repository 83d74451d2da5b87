"""flash-linear-attention's functions by lagen's operators: ``from lagen.compat.fla import chunk_gla`` in place of ``from fla.ops.gla``.

Names, argument order, defaults, layouts ([B, T, H, D]), state layouts and what is returned are those of fla-core 0.6.0. One row per
function, at the end; a reading above it says which spec it is and where the spec's tensors come from. chunk_, fused_chunk_ and
fused_recurrent_ functions are one operator here, which picks its own schedule.

Where they differ: log-decays are taken as at most 0, which lagen's operators rely on; initial states are taken in any float dtype;
arguments that fla ignores in silence are refused; float32 inputs are computed in float32 where fla wants halves.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lagen.compat.call import Act, Given, function, scale_of

# ---- no decay -------------------------------------------------------------------------------------------------------------------


def _linear(a: Given) -> Act:
    """Linear attention, over its normaliser with ``normalize``: then states are (S, z [B, 1, H, K]), z in any case returned."""
    q, k, v = a["q"], a["k"], a["v"]
    if not a["normalize"]:
        return Act("fla/linear_attn", (q, k, v), scale_of(a))
    given = a["initial_state"]
    matrix, keys = given if isinstance(given, tuple) else (given, None)
    states = None
    if matrix is not None or keys is not None:
        n = q.shape[0] if a["cu_seqlens"] is None else len(a["cu_seqlens"]) - 1
        matrix = q.new_zeros(n, *q.shape[2:], v.shape[-1]) if matrix is None else matrix
        states = (matrix, q.new_zeros(n, *q.shape[2:]) if keys is None else keys.squeeze(1))

    def finish(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
        assert finals is not None
        return o, (finals[0] if a["output_final_state"] else None, finals[1].unsqueeze(1))

    return Act("fla/linear_attn_normalized", (q, k, v), scale_of(a), states, keep=True, finish=finish)


def _only_output(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
    return o


def _based(a: Given) -> Act:
    """Based's map is scaled by K ** -0.5 inside: another scale goes onto q."""
    if not a["use_norm"]:
        raise NotImplementedError("based without use_norm is not offered: the spec has its normaliser")
    q = a["q"] if a["scale"] is None else a["q"] * (a["scale"] * a["q"].shape[-1] ** 0.5)
    return Act("based", (q, a["k"], a["v"]), finish=_only_output)


def _rebased(a: Given) -> Act:
    if a["eps"] != 1e-5 or not a["use_scale"] or not a["use_normalize"] or a["return_both"]:
        raise NotImplementedError("parallel_rebased is offered with eps=1e-5, use_scale, use_normalize and without return_both")
    return Act("fla/rebased_map", (a["q"], a["k"], a["v"]), finish=_only_output)


# ---- one decay a head -----------------------------------------------------------------------------------------------------------


def _simple(a: Given) -> Act:
    """Decays by token (g), by head (g_gamma), both or neither."""
    q, k, v, g, fixed = a["q"], a["k"], a["v"], a["g"], a.get("g_gamma")
    if g is not None:
        return Act("simple_gla", (q, k, v, g if fixed is None else g + fixed), scale_of(a))
    if fixed is not None:
        return Act("retnet", (q, k, v, fixed), scale_of(a))
    return Act("fla/linear_attn", (q, k, v), scale_of(a))


def _retention(a: Given) -> Act:
    head = torch.arange(a["q"].shape[2], dtype=torch.float32, device=a["q"].device)
    return _simple({**a, "g": None, "g_gamma": (1 - 2.0 ** (-5.0 - head)).log()})


def _lightning(a: Given) -> Act:
    heads = a["q"].shape[2]
    slope = 8 / heads * (1 - a["layer_idx"] / a["num_layers"])
    head = torch.arange(heads, dtype=torch.float32, device=a["q"].device)
    return _simple({**a, "g": None, "g_gamma": -slope * head})


# ---- a decay a channel ----------------------------------------------------------------------------------------------------------


def _gla(a: Given) -> Act:
    return Act("gla", (a["q"], a["k"], a["v"], a["g"]), scale_of(a, "q"))


def _gla_gates(a: Given) -> Act:
    """Gates by key channel (gk), by value channel (gv), both or neither."""
    q, k, v, gk, gv = (a[n] for n in ("q", "k", "v", "gk", "gv"))
    if gv is not None:
        return Act("fla/gla_gates", (q, k, v, torch.zeros_like(k) if gk is None else gk, gv), scale_of(a))
    return Act("fla/linear_attn", (q, k, v), scale_of(a)) if gk is None else Act("gla", (q, k, v, gk), scale_of(a))


def _rwkv6(a: Given) -> Act:
    """The spec has no scale, as the paper has none: it goes onto r."""
    return Act("rwkv6", (a["r"] * scale_of(a, "r"), a["k"], a["v"], a["w"], a["u"]))


# ---- the table ------------------------------------------------------------------------------------------------------------------

_STATE = "scale=None initial_state=None output_final_state=False"
_BOTH = "cu_seqlens=None cu_seqlens_cpu=None"
_TURN = "reverse=False state_v_first=False cu_seqlens=None **kwargs"
_LIGHT = "q k v layer_idx num_layers"
_NORM = "normalize=True cu_seqlens=None"

chunk_linear_attn = function("chunk_linear_attn", f"q k v {_STATE} {_NORM}", _linear)
fused_chunk_linear_attn = function("fused_chunk_linear_attn", f"q k v {_STATE} {_NORM}", _linear)
fused_recurrent_linear_attn = function(
    "fused_recurrent_linear_attn", f"q k v {_STATE} reverse=False normalize=False cu_seqlens=None", _linear
)
parallel_based = function("parallel_based", "q k v scale=None use_norm=True", _based)
fused_chunk_based = function("fused_chunk_based", "q k v scale=None use_norm=True", _based)
parallel_rebased = function("parallel_rebased", "q k v eps=0.00001 use_scale=True use_normalize=True return_both=False", _rebased)

chunk_simple_gla = function("chunk_simple_gla", f"q k v g=None g_gamma=None {_STATE} state_v_first=False {_BOTH} **kwargs", _simple)
fused_chunk_simple_gla = function("fused_chunk_simple_gla", f"q k v g=None g_gamma=None {_STATE} cu_seqlens=None", _simple)
fused_recurrent_simple_gla = function("fused_recurrent_simple_gla", f"q k v g=None g_gamma=None {_STATE} {_TURN}", _simple)
parallel_simple_gla = function("parallel_simple_gla", f"q k v g=None scale=None output_attentions=False {_BOTH}", _simple)
chunk_retention = function("chunk_retention", f"q k v {_STATE} cu_seqlens=None **kwargs", _retention)
fused_chunk_retention = function("fused_chunk_retention", f"q k v {_STATE} cu_seqlens=None", _retention)
fused_recurrent_retention = function("fused_recurrent_retention", f"q k v {_STATE} {_TURN}", _retention)
parallel_retention = function("parallel_retention", "q k v scale=None output_attentions=False cu_seqlens=None", _retention)
chunk_lightning_attn = function("chunk_lightning_attn", f"{_LIGHT} {_STATE} cu_seqlens=None **kwargs", _lightning)
fused_recurrent_lightning_attn = function("fused_recurrent_lightning_attn", f"{_LIGHT} {_STATE} reverse=False cu_seqlens=None", _lightning)

chunk_gla = function("chunk_gla", f"q k v g {_STATE} state_v_first=False {_BOTH}", _gla)
fused_recurrent_gla = function("fused_recurrent_gla", f"q k v gk=None gv=None {_STATE} {_TURN}", _gla_gates)
chunk_rwkv6 = function("chunk_rwkv6", f"r k v w u {_STATE} {_BOTH} **kwargs", _rwkv6)
fused_recurrent_rwkv6 = function("fused_recurrent_rwkv6", f"r k v w u {_STATE} reverse=False cu_seqlens=None", _rwkv6)


def fused_chunk_gla(**kwargs: Any) -> NoReturn:
    """Raises NotImplementedError, as fla's does."""
    raise NotImplementedError("`fused_chunk_gla` is deprecated. Please use `chunk_gla` instead.")
