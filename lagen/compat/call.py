"""Call: how a function of another library becomes a call of an operator of lagen.

A row of such a library's table is a signature, written as text, and a reading: a function from the named arguments to an ``Act``, which
says what operator to call on what. What all functions of the library share (scale, states, direction, lengths, norms) is done here,
once, by the name of the argument.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagen import data
from lagen.runtime.dispatch import as_tuple
from lagen.runtime.load import load
from lagen.runtime.operator import Operator

Given = dict[str, Any]

HINTS = {"chunk_size", "safe_gate", "disable_recompute", "checkpoint_level", "chunk_indices", "use_graph", "max_num_seqs"}
"""Arguments that choose among kernels of the other library and leave the numbers alone."""

REFUSED = {
    "cp_context": "lagen.parallel splits a sequence over ranks",
    "return_intermediate_states": "the states inside a sequence stay in its kernels",
    "output_attentions": "the attention matrix is never made",
}

SWITCHES = {"use_gate_in_kernel", "A_log", "dt_bias", "transpose_state_layout", "use_qk_l2norm_in_kernel"}
"""Arguments that functions take without naming them in their signatures."""


@dataclass(frozen=True)
class Act:
    """A call of the operator of ``spec``.

    ``scale`` is None where the spec has none. ``states``: initial states where they are not simply the argument's. ``finish`` makes what
    the function returns from outputs and final states (None where nobody asked), ``keep`` asks for final states in any case.
    """

    spec: str
    tensors: tuple[Tensor, ...]
    scale: float | None = None
    states: tuple[Tensor, ...] | None = None
    keep: bool = False
    finish: Callable[[Tensor, tuple[Tensor, ...] | None], object] | None = None


LOADED: dict[str, Operator] = {}
"""Operators in use, by spec: a table that torch.compile can look into, as it cannot into a cached function."""


def operator(spec: str) -> Operator:
    """Returns an operator, loaded once: a shipped spec, or with a folder in front one of those that other libraries' functions need."""
    return LOADED[spec] if spec in LOADED else _outside(spec)


def _loaded(spec: str) -> Operator:
    folder, _, name = spec.rpartition("/")
    LOADED[spec] = load(data.folder("specs") / folder / f"{name}.yaml" if folder else name)
    return LOADED[spec]


_outside: Callable[[str], Operator] = torch.compiler.disable(_loaded)


def function(name: str, declared: str, reading: Callable[[Given], Act]) -> Callable[..., Any]:
    """Makes a function from its signature as text and its reading."""
    signature = _signature(declared)
    names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    open_ = len(names) < len(signature.parameters)

    def run(*args: object, **named: object) -> Any:
        given: Given = {**defaults, **dict(zip(names, args, strict=False)), **named}
        if "transpose_state_layout" in names:  # not deprecated where the signature has it
            given["state_v_first"] = given.pop("transpose_state_layout", False)
        if "head_first" in named:
            raise DeprecationWarning("head_first has been removed. Inputs must be in `[B, T, H, ...]` format.")
        if (
            len(args) > len(names)
            or any(n in named for n in names[: len(args)])
            or not all(n in given for n in names if n != "transpose_state_layout")
        ):
            signature.bind(*args, **named)  # raises TypeError, as Python words it
        unknown = named.keys() - {*names, *(HINTS | SWITCHES if open_ else ())}
        if unknown:
            raise TypeError(f"{name}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        return _perform(name, given, reading)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"Computes flash-linear-attention's ``{name}`` by an operator of lagen; layouts, defaults and states are that function's."
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _signature(declared: str) -> inspect.Signature:
    """Reads a signature: names, each with a default after an equals sign or none, and ``**kwargs``."""
    words = {"None": None, "True": True, "False": False}
    made = []
    for part in declared.split():
        name, _, text = part.partition("=")
        if name.startswith("**"):
            made.append(inspect.Parameter(name[2:], inspect.Parameter.VAR_KEYWORD))
            continue
        default = inspect.Parameter.empty if not text else words[text] if text in words else float(text) if "." in text else int(text)
        made.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return inspect.Signature(made)


def _perform(name: str, given: Given, reading: Callable[[Given], Act]) -> Any:
    """Does what all functions share around one call of an operator."""
    for argument, reason in REFUSED.items():
        if given.get(argument):
            raise NotImplementedError(f"{name}: {argument} is not offered; {reason}")
    first = bool(given.get("state_v_first"))
    if "transpose_state_layout" in given:
        if first:
            raise ValueError("Cannot pass both `state_v_first` and the deprecated `transpose_state_layout`.")
        warnings.warn("`transpose_state_layout` is deprecated and renamed to `state_v_first`.", DeprecationWarning, stacklevel=3)
        first = bool(given["transpose_state_layout"])
    if given.get("use_qk_l2norm_in_kernel"):
        given = {**given, **{n: l2norm(given[n]) for n in ("q", "k", "p") if given.get(n) is not None}}
    act = reading(given)
    op = operator(act.spec)
    states = act.states
    if states is None and given.get("initial_state") is not None:
        states = tuple(x.mT if first else x for x in as_tuple(given["initial_state"]))
    states = None if states is None else tuple(x.to(_precise(x)) for x in states)
    keep = bool(given.get("output_final_state"))
    tensors = act.tensors
    more: Any = lengths(given)
    turned = bool(given.get("reverse"))
    if turned:
        tensors = tuple(x.flip(1) if i < len(op.spec.inputs) else x for i, x in enumerate(tensors))
        states = tuple(x.flip(0) for x in states) if states is not None and more else states
        more = {key: x[-1] - x.flip(0) for key, x in more.items()}
    made: Any = op(*tensors, scale=act.scale, initial_state=states, output_final_state=keep or act.keep, **more)
    o, finals = made if keep or act.keep else (made, None)
    finals = None if finals is None else as_tuple(finals)
    if turned:
        o = o.flip(1)
        finals = tuple(x.flip(0) for x in finals) if finals is not None and more else finals
    if act.finish is not None:
        return act.finish(o, finals)
    if finals is None:
        return o, None
    finals = tuple(x.mT.contiguous() if first else x for x in finals)
    return o, finals[0] if len(finals) == 1 else finals


def lengths(given: Given) -> dict[str, Tensor]:
    """Returns the arguments that say where sequences lie side by side."""
    if given.get("cu_seqlens") is None:
        return {}
    return {key: given[key] for key in ("cu_seqlens", "cu_seqlens_cpu") if given.get(key) is not None}


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: Tensor) -> Tensor:
    """Scales rows to length one, as flash-linear-attention's l2norm does: over sqrt(sum x² + 1e-6), in float32."""
    wide = x.to(_precise(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def scale_of(given: Given, tensor: str = "k") -> float:
    """Returns the scale of a call: K ** -0.5 of a tensor where it is not given."""
    return float(given["scale"] if given.get("scale") is not None else given[tensor].shape[-1] ** -0.5)
