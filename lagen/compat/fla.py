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
from torch.nn import functional

from lagen.compat.call import Act, Given, function, l2norm, scale_of

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


# ---- corrections ----------------------------------------------------------------------------------------------------------------


def _beta(a: Given) -> Tensor:
    """The strength of a correction: one where it is not given, or what a sigmoid makes of it."""
    beta: Tensor = torch.ones_like(a["v"][..., 0]) if a["beta"] is None else a["beta"]
    if a.get("allow_neg_eigval") and not a.get("use_beta_sigmoid_in_kernel"):
        raise ValueError("`allow_neg_eigval=True` requires `use_beta_sigmoid_in_kernel=True`.")
    if a.get("use_beta_sigmoid_in_kernel"):
        return beta.float().sigmoid() * (2.0 if a["allow_neg_eigval"] else 1.0)
    return beta


def _gate(a: Given) -> Tensor:
    """The log-decay [B, T, HV] or [B, T, HV, K]: as it is, or made of a raw gate by A_log [HV] and dt_bias."""
    g: Tensor = a["g"]
    if not a.get("use_gate_in_kernel"):
        return g
    bias, rate, bound = a.get("dt_bias"), a.get("A_log"), a.get("lower_bound")
    raw = g.float() if bias is None else g.float() + bias.float().view(g.shape[2:])
    if rate is None and bound is None:
        raise ValueError("`A_log` must be provided when `use_gate_in_kernel=True` and `lower_bound` is not set.")
    pace = 1.0 if rate is None else rate.float().exp().view(-1, *[1] * (g.ndim - 3))
    return -pace * functional.softplus(raw) if bound is None else bound * torch.sigmoid(pace * raw)


def _grouped(a: Given, *names: str) -> tuple[Tensor, ...]:
    """Repeats tensors on the heads of the values, where the spec has one kind of head."""
    heads = a["v"].shape[2]
    return tuple(a[n] if a[n].shape[2] == heads else a[n].repeat_interleave(heads // a[n].shape[2], 2) for n in names)


def _delta(a: Given) -> Act:
    return Act("delta_rule", (a["q"], a["k"], a["v"], _beta(a)), scale_of(a))


def _gated_delta(a: Given) -> Act:
    """Decays by token (g), by key channel (gk), both or neither; by value channel is not offered."""
    if a.get("gv") is not None:
        raise NotImplementedError("gv is not offered: a delta rule on keys with a decay on values is no shipped spec")
    g, gk = (None if a["g"] is None else _gate(a)), a.get("gk")
    if gk is not None:
        return _kda({**a, "g": gk if g is None else gk + g[..., None], "use_gate_in_kernel": False})
    if g is None:
        return Act("delta_rule", (*_grouped(a, "q", "k"), a["v"], _beta(a)), scale_of(a))
    return Act("gated_deltanet", (a["q"], a["k"], a["v"], g, _beta(a)), scale_of(a))


def _preconditioned(a: Given) -> Act:
    """States are (S, A [N, H, K]), each with an argument and a place among the results of its own."""
    if a["x"] != 1.5 or a["eps"] != 1e-6 or a.get("gk") is not None or a.get("gv") is not None:
        raise NotImplementedError("preconditioned delta rules are offered with x=1.5, eps=1e-6 and a decay by head: no gk, no gv")
    q, k, v = a["q"], a["k"], a["v"]
    g = torch.zeros_like(v[..., 0], dtype=torch.float32) if a["g"] is None else a["g"]
    center = torch.full((k.shape[2],), -0.2, device=k.device) if a["log_atk_scale"] is None else a["log_atk_scale"]
    matrix, diagonal, first = a["initial_state"], a["initial_A_state"], a["state_v_first"]
    states = None
    if matrix is not None or diagonal is not None:
        n = q.shape[0] if a["cu_seqlens"] is None else len(a["cu_seqlens"]) - 1
        diagonal = q.new_zeros(n, *k.shape[2:]) if diagonal is None else diagonal
        matrix = q.new_zeros(n, v.shape[2], k.shape[3], v.shape[3]) if matrix is None else matrix.mT if first else matrix
        states = (diagonal, matrix)

    def finish(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
        if finals is None:
            return o, None, None
        return o, finals[1].mT.contiguous() if first else finals[1], finals[0]

    tensors = (q, k, v, a["g_atk"], g, a["beta_atk"], _beta(a), center)
    return Act("preconditioned_deltanet", tensors, scale_of(a), states, finish=finish)


def _kda(a: Given) -> Act:
    return Act("kda", (*_grouped(a, "q", "k"), a["v"], _gate(a), _beta(a)), scale_of(a))


def _gdn2(a: Given) -> Act:
    return Act("gdn2", (*_grouped(a, "q", "k"), a["v"], _gate(a), a["b"], a["w"]), scale_of(a))


def _comba(a: Given) -> Act:
    p = a["k"] if a["p"] is None else a["p"]
    return Act("fla/comba_feedback", (a["q"], a["k"], a["v"], p, a["g"], _beta(a)), scale_of(a))


def _product(a: Given) -> Act:
    """Several updates a token: k, v and beta are [B, T * n, ...], a token's updates one after the other."""
    n, q = a["num_householder"], a["q"]
    g = torch.zeros_like(q[..., 0], dtype=torch.float32) if a["g"] is None else a["g"]
    k, v, beta = (a[x].unflatten(1, (q.shape[1], n)).unbind(2) for x in ("k", "v", "beta"))
    if n == 1:
        return Act("gated_deltanet", (q, k[0], v[0], g, beta[0]), scale_of(a))
    if n > 3:
        raise NotImplementedError(f"num_householder = {n} is not offered: there are specs for 1, 2 and 3")
    updates = [x for update in zip(k, v, beta, strict=True) for x in update]
    return Act(f"fla/delta_product{n}", (q, *updates, g), scale_of(a))


def _oja(a: Given) -> Act:
    q, k = (l2norm(a[n]) if a[f"use_{n}_l2norm"] else a[n] for n in ("q", "k"))
    gv = torch.zeros_like(a["v"]) if a["gv"] is None else a["gv"]
    return Act("gated_oja", (q, k, a["v"], gv, _beta(a)), scale_of(a))


def _dplr(a: Given) -> Act:
    return Act("dplr", (a["q"], a["k"], a["v"], a["a"], a["b"], a["gk"]), scale_of(a))


def _iplr(a: Given) -> Act:
    return Act("iplr", (a["q"], a["k"], a["v"], a["a"], a["b"]), scale_of(a))


def _rwkv7(a: Given) -> Act:
    """RWKV-7's operator is DPLR with w as the log-decay; made of kk and a where it takes those."""
    first, second = (a["a"], a["b"]) if "b" in a else (-a["kk"], a["kk"] * a["a"])
    return Act("dplr", (a["r"], a["k"], a["v"], first, second, a["w"]), scale_of(a))


# ---- slots and channels ---------------------------------------------------------------------------------------------------------


def _slots(a: Given) -> Act:
    """Gated slot attention; without g the gates of ABC, whose slots hold means. Query heads may be a multiple of the others."""
    q, group = a["q"], a["q"].shape[2] // a["k"].shape[2]
    s, g = a["s"], a["g"]
    if g is None:
        if a["cu_seqlens"] is not None or a.get("reverse"):
            raise NotImplementedError("without g, gates are made of s along one sequence: give g where cu_seqlens or reverse is given")
        total = torch.logcumsumexp(s.float(), 1)
        g = torch.cat([total[:, :1], total[:, :-1]], 1) - total
        s = (s.float() - total).exp().to(s.dtype)
    k, v, s, g = (x.repeat_interleave(group, 2) if group > 1 else x for x in (a["k"], a["v"], s, g))
    given = a["initial_state"]
    states = None
    if given is not None and any(x is not None for x in given):
        n, (keys, values, slots) = len(next(x for x in given if x is not None)), (x.shape[-1] for x in (k, v, s))
        keys_of, values_of = ((n, a["k"].shape[2], keys, slots), (n, a["k"].shape[2], slots, values))
        held = (q.new_zeros(size) if x is None else x for x, size in zip(given, (keys_of, values_of), strict=True))
        states = tuple(x.repeat_interleave(group, 1) for x in held)

    def finish(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
        return o, [None, None] if finals is None else [x[:, ::group].contiguous() for x in finals]

    return Act("gsa", (q, k, v, s, g), scale_of(a), states, finish=finish)


def _abc(a: Given) -> Act:
    """ABC. fla's states are means and do not hold their weights: they can be read, not started from."""
    if a["initial_state"] is not None:
        raise NotImplementedError("chunk_abc from an initial state is not offered: the means do not say how much they weigh")

    def finish(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
        if finals is None:
            return o, None
        _, weights, keys, values = finals
        return o, (keys / weights[..., None, :], values / weights[..., None])

    return Act("abc", (a["q"], a["k"], a["v"], a["s"]), a["q"].shape[-1] ** -0.5, finish=finish)


def _hgrn(a: Given) -> Act:
    return Act("fla/hgrn_sum", (a["x"], a["g"]))


def _rwkv4(a: Given) -> Act:
    """RWKV-4, w before its exponential; states [B, 3, 1, D] are the weighted sum, the weights and the peak."""
    total, weights, peak = a["state"][:, :, 0].unbind(1)

    def finish(o: Tensor, finals: tuple[Tensor, ...] | None) -> object:
        assert finals is not None
        m, sums, over = finals
        return o, torch.stack([sums, over, m], 1).unsqueeze(2)

    return Act("rwkv4", (a["k"], a["v"], a["w"].float().exp(), a["u"]), states=(peak, total, weights), keep=True, finish=finish)


# ---- the table ------------------------------------------------------------------------------------------------------------------

_STATES = "initial_state=None output_final_state=False"
_STATE = f"scale=None {_STATES}"
_BOTH = "cu_seqlens=None cu_seqlens_cpu=None"
_TURN = "reverse=False state_v_first=False cu_seqlens=None **kwargs"
_FIRST = "state_v_first=False cu_seqlens=None **kwargs"
_QK = "use_qk_l2norm_in_kernel=False"
_GATE = "use_gate_in_kernel=False"
_SIGMOID = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False"
_ATK = "initial_state=None initial_A_state=None output_final_state=False use_qk_l2norm_in_kernel=True"
_SQUASH = "x=1.5 eps=0.000001 log_atk_scale=None"
_OJA = "use_q_l2norm=False use_k_l2norm=False"
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

chunk_delta_rule = function("chunk_delta_rule", f"q k v beta {_STATE} {_QK} {_BOTH} **kwargs", _delta)
fused_recurrent_delta_rule = function("fused_recurrent_delta_rule", f"q k v beta=None {_STATE} {_QK} cu_seqlens=None", _delta)
chunk_gated_delta_rule = chunk_gdn = function(
    "chunk_gated_delta_rule",
    f"q k v g beta {_STATE} {_QK} {_SIGMOID} state_v_first=False {_BOTH} chunk_indices=None cp_context=None **kwargs",
    _gated_delta,
)
fused_recurrent_gated_delta_rule = fused_recurrent_gdn = function(
    "fused_recurrent_gated_delta_rule",
    f"q k v g=None gk=None gv=None beta=None {_STATE} {_QK} {_GATE} A_log=None dt_bias=None {_SIGMOID} {_FIRST}",
    _gated_delta,
)
chunk_gated_delta_product = function(
    "chunk_gated_delta_product", f"q k v g beta num_householder {_STATE} {_QK} {_BOTH} cp_context=None", _product
)
chunk_precond_gated_delta_rule = function(
    "chunk_precond_gated_delta_rule",
    f"q k v g_atk g beta_atk beta scale=None {_ATK} {_BOTH} cp_context=None transpose_state_layout=False {_SQUASH}",
    _preconditioned,
)
fused_recurrent_precond_gated_delta_rule = function(
    "fused_recurrent_precond_gated_delta_rule",
    f"q k v g=None gk=None gv=None beta=None g_atk=None beta_atk=None scale=None {_ATK} cu_seqlens=None "
    f"transpose_state_layout=False {_SQUASH}",
    _preconditioned,
)
chunk_kda = function(
    "chunk_kda",
    f"q k v g beta {_STATE} {_QK} {_GATE} {_SIGMOID} safe_gate=False lower_bound=None disable_recompute=False "
    f"return_intermediate_states=False state_v_first=False {_BOTH} cp_context=None use_graph=False max_num_seqs=None **kwargs",
    _kda,
)
fused_recurrent_kda = function(
    "fused_recurrent_kda", f"q k v g beta A_log=None dt_bias=None {_STATE} {_QK} {_GATE} {_SIGMOID} lower_bound=None {_FIRST}", _kda
)
chunk_gdn2 = function(
    "chunk_gdn2",
    f"q k v g b w {_STATE} {_QK} {_GATE} {_BOTH} safe_gate=False lower_bound=None disable_recompute=False "
    "return_intermediate_states=False state_v_first=False cp_context=None **kwargs",
    _gdn2,
)
fused_recurrent_gdn2 = function(
    "fused_recurrent_gdn2", f"q k v g b w A_log=None dt_bias=None {_STATE} {_QK} {_GATE} lower_bound=None {_FIRST}", _gdn2
)
chunk_comba = function("chunk_comba", f"q k v p g beta=None {_STATE} {_QK} {_BOTH}", _comba)
fused_recurrent_comba = function("fused_recurrent_comba", f"q k p v g beta=None {_STATE} {_QK} cu_seqlens=None", _comba)
chunk_gated_oja_rule = function("chunk_gated_oja_rule", f"q k v gv beta {_STATE} {_OJA} {_BOTH} **kwargs", _oja)
fused_recurrent_gated_oja_rule = function(
    "fused_recurrent_gated_oja_rule", f"q k v gv=None beta=None {_STATE} {_OJA} cu_seqlens=None **kwargs", _oja
)
chunk_dplr_delta_rule = function(
    "chunk_dplr_delta_rule",
    f"q k v a b gk {_STATE} {_BOTH} safe_gate=False chunk_size=None disable_recompute=False cp_context=None lower_bound=None **kwargs",
    _dplr,
)
fused_recurrent_dplr_delta_rule = function("fused_recurrent_dplr_delta_rule", f"q k v a b gk {_STATE} reverse=False cu_seqlens=None", _dplr)
chunk_iplr_delta_rule = function("chunk_iplr_delta_rule", f"q k v a b {_STATE} {_BOTH} **kwargs", _iplr)
fused_recurrent_iplr_delta_rule = function("fused_recurrent_iplr_delta_rule", f"q k v a b {_STATE} cu_seqlens=None", _iplr)
chunk_rwkv7 = function(
    "chunk_rwkv7",
    f"r w k v a b scale=1.0 {_STATES} {_BOTH} safe_gate=False chunk_size=None disable_recompute=False cp_context=None lower_bound=None",
    _rwkv7,
)
fused_recurrent_rwkv7 = function(
    "fused_recurrent_rwkv7", "r w k v a b scale=None initial_state=None output_final_state=True cu_seqlens=None", _rwkv7
)
fused_mul_recurrent_rwkv7 = function("fused_mul_recurrent_rwkv7", f"r w k v kk a scale=1.0 {_STATES} reverse=False cu_seqlens=None", _rwkv7)

chunk_gsa = function("chunk_gsa", f"q k v s g=None {_STATE} checkpoint_level=2 {_BOTH} **kwargs", _slots)
fused_recurrent_gsa = function("fused_recurrent_gsa", f"q k v s g=None {_STATE} reverse=False cu_seqlens=None", _slots)
chunk_abc = function("chunk_abc", f"q k v s {_STATES}", _abc)
chunk_hgrn = function("chunk_hgrn", f"x g {_STATES}", _hgrn)
fused_recurrent_hgrn = function("fused_recurrent_hgrn", f"x g {_STATES} cu_seqlens=None", _hgrn)
fused_recurrent_rwkv4 = function("fused_recurrent_rwkv4", "w u k v state", _rwkv4)


def fused_chunk_gla(**kwargs: Any) -> NoReturn:
    """Raises NotImplementedError, as fla's does."""
    raise NotImplementedError("`fused_chunk_gla` is deprecated. Please use `chunk_gla` instead.")


def fused_chunk_delta_rule(**kwargs: Any) -> NoReturn:
    """Raises NotImplementedError, as fla's does."""
    raise NotImplementedError("fused_chunk_delta_rule is deprecated. Please use chunk_delta_rule instead.")
