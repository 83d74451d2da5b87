"""Dispatch: a variant's backends behind three dispatcher operators, so that autograd, FakeTensor, torch.compile and export see opaque ops.

Stands alone (torch and the standard library): it is copied into every built package as ``_dispatch.py``.

``torch.ops.lagen.<name>_<digest>`` is the forward, ``.._backward`` and ``.._step`` are what they say. Names carry the digest: two builds
of one name live in one process, and importing a build twice reuses what is registered. Schemas are flat (inputs, params, then one
optional initial state each), for lists cost 20 us a call; what is absent comes back as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lagen.runtime.packed import check_bounds
from lagen.runtime.pool import check_apart, check_slots
from lagen.runtime.signature import Argument, ArgumentError, OperatorSpec, Sizes, Tensors
from lagen.runtime.vmapped import each, element, joined

Flat = Tensor | Tensors  # an operator with one result returns it bare
ORDER = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}
"""Which backends serve a device, the preferred one first; any other device runs on torch."""

AUTOCAST = ("AutocastCPU", "AutocastCUDA")
WITHOUT = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


@dataclass(frozen=True)
class Backend:
    """Three plain functions over tuples of tensors in spec order.

    forward(inputs, params, scale, initial_states, output_final_state, cu_seqlens) -> (outputs, final_states or None, saved)
    backward(inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states, cu_seqlens)
        -> (d_inputs, d_params, d_initial_states or None)
    step(inputs, params, scale, states, slots, outputs) -> None; writes outputs and states, where slots are given the states they name

    What they return is new and contiguous; a step's outputs are the caller's, the numbers of each head behind each other. ``saves``
    counts the saved tensors; ``saved``, called as forward is, returns them uninitialised (under FakeTensor, so only their shapes).
    ``keeps_outputs``: the backward reads outputs and final states.
    ``host``: cu_seqlens is read on the host, so the caller's copy is handed over where there is one.
    ``again(tensors, states, outputs or None) -> outputs or None`` takes a step past the dispatcher where a step of these shapes went
    before, and ``noted(tensors, scale, states, outputs or None)`` tells it of one that went.
    """

    forward: Callable[..., tuple[Tensors, Tensors | None, Tensors]]
    backward: Callable[..., tuple[Tensors, Tensors, Tensors | None]]
    step: Callable[..., None] | None
    saves: int = 0
    saved: Callable[..., Tensors] | None = None
    keeps_outputs: bool = True
    doubles: bool = False  # takes float64
    host: bool = False
    again: Callable[[Any, Any, Any], Tensors | None] | None = None
    noted: Callable[[Tensors, float, Tensors, Tensors | None], None] | None = None


def state_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Returns the dtype of states: float64 beside a float64 tensor, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def narrowed(tensors: Sequence[Any]) -> torch.dtype | None:
    """Returns the dtype that autocast gives a call's inputs, None where it leaves them as they are."""
    device = tensors[0].device.type
    if device not in ORDER or not torch.is_autocast_enabled(device):
        return None
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tensors):
        return None
    return torch.get_autocast_dtype(device)


def as_tuple(x: Flat) -> Tensors:
    """Returns what an operator returned as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def _flat(x: Sequence[Tensor]) -> Flat:
    return tuple(x) if len(x) != 1 else x[0]


class Dispatch:
    """The three operators of one variant: ``forward``, ``backward``, ``step``, as overloads to call."""

    def __init__(self, spec: OperatorSpec, backends: Mapping[str, Backend]) -> None:
        self.spec, self.backends = spec, backends
        self.names = tuple(a.name for a in spec.inputs + spec.params)
        self.state_names = tuple(s.name for s in spec.states)
        self.written = (*(f"state {s.name}" for s in spec.states), *(f"out {o.name}" if spec.outputs[1:] else "out" for o in spec.outputs))
        self.tensors, self.states, self.outputs = len(self.names), len(spec.states), len(spec.outputs)
        self.made, self.given = self.outputs + self.states, self.tensors + self.states + 2
        self.saves = max(b.saves for b in backends.values())
        self.order = {device: tuple(b for b in order if b in backends) for device, order in ORDER.items()}
        base = f"{spec.name}_{spec.digest}"
        if not hasattr(torch.ops.lagen, base):
            library = torch.library.Library("lagen", "FRAGMENT")
            self._register(library, base)
            # A Library takes its operators along when it goes: this one stays for as long as the operator can be called.
            getattr(torch.ops.lagen, base).library = library
        self.forward: Callable[..., Flat] = getattr(torch.ops.lagen, base).default
        self.backward: Callable[..., Flat] = getattr(torch.ops.lagen, f"{base}_backward").default
        self.step: Callable[..., None] | None = getattr(torch.ops.lagen, f"{base}_step").default if spec.causal else None

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Parts inputs from params."""
        n = len(self.spec.inputs)
        return tensors[:n], tensors[n:]

    def pick(self, name: str, tensors: Sequence[Tensor]) -> Backend:
        """Returns the named backend, or for "" the one that suits the device and dtype."""
        if name:
            return self.backends[name]
        order = self.order.get(tensors[0].device.type, ("torch",))
        for x in tensors:
            if x.dtype is torch.float64:
                order = tuple(b for b in order if self.backends[b].doubles)
                break
        return self.backends[order[0]]

    def direct(self, name: str, scale: float, keep: bool, tensors: Tensors, states: Tensors | None, cu_seqlens: Tensor | None) -> Tensors:
        """Runs a backend past the dispatcher, differentiably: on meta tensors, where the operators only make shapes."""
        apply: Callable[..., Tensors] = _Direct.apply
        return apply(self, self.backends[name], scale, keep, cu_seqlens, *tensors, *(states or ()))

    def direct_step(self, name: str, scale: float, tensors: Tensors, states: Tensors, slots: Tensor | None, outputs: Tensors) -> None:
        """Runs a backend's step past the dispatcher."""
        _step_of(self.backends[name], name)(*self.split(tensors), scale, states, slots, outputs)

    # -- registration --

    def _register(self, library: torch.library.Library, base: str) -> None:
        spec = self.spec
        given = [f"Tensor {n}" for n in self.names]
        initial = [f"Tensor? initial_{s.name}" for s in spec.states]
        saved = [f"Tensor saved{i}" for i in range(self.saves)]
        made = [f"Tensor? made_{o.name}" for o in spec.outputs] + [f"Tensor? final_{s.name}" for s in spec.states]
        cotangents = [f"Tensor? d_{o.name}" for o in spec.outputs] + [f"Tensor? d_final_{s.name}" for s in spec.states]
        initial += ["Tensor? cu_seqlens", "Tensor? cu_seqlens_cpu"]
        settings = ["float scale", "bool output_final_state", "str backend"]

        def define(name: str, arguments: list[str], results: int, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
            returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
            library.define(f"{name}({', '.join(arguments)}) -> {returned}")
            for key in ("CPU", "CUDA"):
                library.impl(name, run, key)
            torch.library.register_fake(f"lagen::{name}", fake, lib=library)
            call = getattr(torch.ops.lagen, name).default
            for key in AUTOCAST:
                library.impl(name, partial(self._narrow, call), key)
            torch.library.register_vmap(f"lagen::{name}", partial(self._map if results else self._map_step, call), lib=library)

        define(base, [*given, *initial, *settings], self.made + self.saves, self._forward, self._fake_forward)
        torch.library.register_autograd(f"lagen::{base}", self._derive, setup_context=self._remember, lib=library)
        back = [*given, *initial, *saved, *made, *cotangents, "float scale", "str backend"]
        define(f"{base}_backward", back, self.tensors + self.states, self._backward, self._fake_backward)
        torch.library.register_autograd(f"lagen::{base}_backward", self._refuse, lib=library)
        if spec.causal:
            names = [*(f"state_{s.name}" for s in spec.states), *(f"out_{o.name}" for o in spec.outputs)]
            written = [f"Tensor({chr(ord('a') + i)}!) {n}" for i, n in enumerate(names)]
            define(f"{base}_step", [*given, *written, "Tensor? slots", "float scale", "str backend"], 0, self._step, self._fake_step)

    def _narrow(self, call: Callable[..., Flat], *args: Any) -> Flat:
        """Calls under autocast: inputs in its dtype, but what feeds a decay, params and states; inside, nothing is cast."""
        inputs, rest = args[: len(self.spec.inputs)], args[len(self.spec.inputs) :]
        if (dtype := narrowed(args)) is not None:
            inputs = tuple(x if a.gate else x.to(dtype) for a, x in zip(self.spec.inputs, inputs, strict=True))
        with torch._C._ExcludeDispatchKeyGuard(WITHOUT):
            return call(*inputs, *rest)

    def _map(self, call: Callable[..., Flat], info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """Calls under torch.vmap."""

        def flat(*given: Any) -> Tensors:
            return as_tuple(call(*given))

        n, first = len(self.spec.inputs), len(self.spec.inputs) + len(self.spec.params)
        alone = any(d is not None for d in in_dims[n:first]) or len(args) != self.given + 3 or args[self.given - 2] is not None
        if alone or self.pick(args[-1], args[:n]).saves or not info.batch_size:
            made, out_dims = each(flat, info.batch_size, in_dims, args)
        else:  # the forward, of tokens and states alone
            order = [*range(n), *range(first, first + self.states)]

            def reordered(*given: Any) -> Tensors:
                return flat(*given[:n], *args[n:first], *given[n:], *args[first + self.states :])

            made, out_dims = joined(reordered, info.batch_size, [in_dims[i] for i in order], [args[i] for i in order], len(order))
        return (made, out_dims) if len(made) != 1 else (made[0], out_dims[0])

    def _map_step(self, call: Callable[..., None], info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[None, None]:
        """Calls a step under torch.vmap: every element of the mapped dim writes states and outputs of its own."""
        written = in_dims[self.tensors : self.tensors + self.states]
        if any(d is None for d in written):
            name = self.state_names[next(i for i, d in enumerate(written) if d is None)]
            raise ArgumentError(
                f"{self.spec.name}.step under torch.vmap: state {name} is not mapped, and every element would write it; "
                "give each its own, and map over them (in_dims)"
            )
        if any(d is None for d in in_dims[self.tensors + self.states :][: self.outputs]):
            raise ArgumentError(f"{self.spec.name}.step under torch.vmap: out is not mapped; every element wants a place of its own in it")
        for i in range(info.batch_size):
            call(*element(in_dims, args, i))
        return None, None

    # -- forward --

    def _initial(self, args: Sequence[Any]) -> Tensors | None:
        """Returns the initial states of a flat argument list: all or none."""
        states = tuple(args[self.tensors : self.tensors + self.states])
        return states if states and states[0] is not None else None

    def _forward(self, *args: Any) -> Flat:
        """Runs a backend's forward."""
        tensors = args[: self.tensors]
        scale, keep, name = args[-3:]
        backend = self.pick(name, tensors)
        cu_seqlens, copy = args[self.given - 2 : self.given]
        if cu_seqlens is not None:
            self.check_sequences(cu_seqlens, copy, tensors)
            cu_seqlens = _where(backend, cu_seqlens, copy)
        outputs, finals, saved = backend.forward(*self.split(tensors), scale, self._initial(args), keep, cu_seqlens)
        assert len(saved) == backend.saves, f"{self.spec.name}: {len(saved)} tensors saved, {backend.saves} declared"
        return self._filled(outputs, finals, saved, tensors[0])

    def _filled(self, outputs: Tensors, finals: Tensors | None, saved: Tensors, like: Tensor) -> Flat:
        """Puts empty tensors where final states or saved tensors are absent."""
        if finals is None:
            finals = tuple([like.new_empty(0) for _ in range(self.states)])
        flat = (*outputs, *finals, *saved)
        absent = self.made + self.saves - len(flat)
        return _flat((*flat, *[like.new_empty(0) for _ in range(absent)]) if absent else flat)

    def check_sequences(self, cu_seqlens: Tensor, copy: Tensor | None, tensors: Tensors, wait: bool = False) -> None:
        """Checks the values of cu_seqlens where the host can read them: on the CPU, in the caller's copy, or if it may ``wait``."""
        seen = copy if copy is not None else cu_seqlens
        if seen.device.type == "cpu" or wait:
            check_bounds(self.spec.name, seen.tolist(), tensors[0].shape[1])

    def _sizes(self, tensors: Tensors, *lead: str) -> Sizes:
        sizes = Sizes(self.spec)
        sizes.meet_all(tensors, lead)
        return sizes

    def _fake_forward(self, *args: Any) -> Flat:
        """Makes what forward returns, by shape alone."""
        tensors = args[: self.tensors]
        scale, keep, name = args[-3:]
        backend, sizes, first = self.pick(name, tensors), self._sizes(tensors, "B", "T"), tensors[0]
        cu_seqlens = args[self.given - 2]
        many = sizes.meet_sequences(cu_seqlens)
        outputs = tuple(first.new_empty(sizes.shape(o, "B", "T")) for o in self.spec.outputs)
        finals = tuple(first.new_empty(sizes.shape(s, many), dtype=state_dtype(tensors)) for s in self.spec.states)
        saved = backend.saved(*self.split(tensors), scale, self._initial(args), keep, cu_seqlens) if backend.saved else ()
        return self._filled(outputs, finals if keep else None, saved, first)

    # -- backward --

    def _remember(self, ctx: FunctionCtx, inputs: tuple[Any, ...], output: Flat) -> None:
        """Keeps for the backward what it reads."""
        *tensors, scale, keep, name = inputs
        flat = as_tuple(output)
        outputs = flat[: self.made if keep else self.outputs] if self.pick(name, inputs[: self.tensors]).keeps_outputs else ()
        ctx.save_for_backward(*tensors, *flat[self.made :], *outputs)
        ctx.mark_non_differentiable(*flat[self.made :])
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.keep, ctx.backend = scale, keep, name  # type: ignore[attr-defined]

    def _derive(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Calls the backward operator; returns a gradient for every tensor."""
        given = self.given
        stored = list(ctx.saved_tensors)  # once: each look unpacks them, which activation checkpointing refuses to do twice
        kept, made = stored[: given + self.saves], stored[given + self.saves :]
        made += [None] * (self.made - len(made))
        d_made = list(cotangents[: self.made])
        if not ctx.keep:
            d_made[self.outputs :] = [None] * self.states
        flat = as_tuple(self.backward(*kept, *made, *d_made, ctx.scale, ctx.backend))
        d_states = [None if s is None else d for s, d in zip(kept[self.tensors : given - 2], flat[self.tensors :], strict=True)]
        return (*flat[: self.tensors], *d_states, None, None, None, None, None)

    def _backward(self, *args: Any) -> Flat:
        """Runs a backend's backward; cotangents that are absent are zeros, those of final states may be absent together."""
        tensors, first = args[: self.tensors], args[0]
        scale, name = args[-2:]
        backend, initial = self.pick(name, tensors), self._initial(args)
        cu_seqlens, copy = args[self.given - 2 : self.given]
        rest = args[self.given : -2]
        saved, made, cotangents = rest[: backend.saves], rest[self.saves : self.saves + self.made], rest[self.saves + self.made :]
        d_outputs, d_last = tuple(cotangents[: self.outputs]), tuple(cotangents[self.outputs :])
        if any(d is None for d in d_outputs):
            d_outputs = self._dense(d_outputs, self.spec.outputs, first.dtype, tensors, None, "T")
        d_finals: Tensors | None = None
        if any(d is not None for d in d_last):
            d_finals = self._dense(d_last, self.spec.states, state_dtype(tensors), tensors, cu_seqlens)
        outputs, finals = (tuple(x for x in part if x is not None) for part in (made[: self.outputs], made[self.outputs :]))
        sequences = None if cu_seqlens is None else _where(backend, cu_seqlens, copy)
        d_inputs, d_params, d_states = backend.backward(
            *self.split(tensors), scale, initial, saved, outputs, finals or None, d_outputs, d_finals, sequences
        )
        if d_states is None:
            d_states = tuple(first.new_empty(0) for _ in range(self.states))
        return _flat((*d_inputs, *d_params, *d_states))

    def _dense(
        self,
        given: Sequence[Tensor | None],
        arguments: Sequence[Argument],
        dtype: torch.dtype,
        tensors: Tensors,
        cu_seqlens: Tensor | None,
        *time: str,
    ) -> Tensors:
        """Puts zeros for the cotangents that are absent."""
        sizes = self._sizes(tensors, "B", "T")
        lead = (sizes.meet_sequences(cu_seqlens), *time)
        pairs = zip(given, arguments, strict=True)
        return tuple(tensors[0].new_zeros(sizes.shape(a, *lead), dtype=dtype) if d is None else d for d, a in pairs)

    def _fake_backward(self, *args: Any) -> Flat:
        """Makes what backward returns, by shape alone."""
        states = self._initial(args) or tuple(args[0].new_empty(0) for _ in range(self.states))
        return _flat(tuple(x.new_empty(x.shape) for x in (*args[: self.tensors], *states)))

    def _refuse(self, ctx: Any, *cotangents: Tensor | None) -> None:
        """Raises: there are no second derivatives."""
        raise RuntimeError(f"{self.spec.name} has no second derivative: its backward cannot be differentiated")

    # -- step --

    def _step(self, *args: Any) -> None:
        """Runs a backend's step, which writes states and outputs; their version says so, for a kernel writes past autograd."""
        tensors, written = args[: self.tensors], args[self.tensors : -3]
        states, outputs = written[: self.states], written[self.states :]
        slots, scale, name = args[-3:]
        self.check_step(tensors, states, slots, outputs)
        _step_of(self.pick(name, tensors), name)(*self.split(tensors), scale, states, slots, outputs)
        torch.autograd.graph.increment_version(written)

    def check_step(self, tensors: Tensors, states: Tensors, slots: Tensor | None, outputs: Tensors) -> None:
        """Checks what shares memory, and the values of slots on the CPU; raises ArgumentError."""
        read = dict(zip(self.names, tensors, strict=True)) | ({} if slots is None else {"slots": slots})
        check_apart(self.spec.name, read, dict(zip(self.written, (*states, *outputs), strict=True)))
        if slots is not None and slots.is_cpu:
            check_slots(self.spec.name, slots.tolist(), states[0].shape[0])

    def _fake_step(self, *args: Any) -> None:
        """Makes nothing: a step writes into what it is given."""


def _where(backend: Backend, cu_seqlens: Tensor, copy: Tensor | None) -> Tensor:
    """Returns cu_seqlens where the backend reads it."""
    return copy if backend.host and copy is not None else cu_seqlens


def _step_of(backend: Backend, name: str) -> Callable[..., None]:
    if backend.step is None:
        raise ArgumentError(f"the backend {name or 'of this device'} has no decode step")
    return backend.step


class _Direct(torch.autograd.Function):
    """A backend's forward and backward as they are."""

    @staticmethod
    def forward(
        ctx: Any, dispatch: Dispatch, backend: Backend, scale: float, keep: bool, cu_seqlens: Tensor | None, *tensors: Tensor
    ) -> Tensors:
        """Runs the backend's forward over inputs, params and, where given, initial states."""
        n = dispatch.tensors
        outputs, finals, saved = backend.forward(*dispatch.split(tensors[:n]), scale, tensors[n:] or None, keep, cu_seqlens)
        ctx.save_for_backward(*tensors, *saved, *outputs, *(finals or ()))
        ctx.counts = (len(tensors), len(saved), len(outputs))
        ctx.dispatch, ctx.backend, ctx.scale, ctx.cu_seqlens = dispatch, backend, scale, cu_seqlens
        return (*outputs, *(finals or ()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward."""
        kept, n = ctx.saved_tensors, ctx.dispatch.tensors
        given, saved, made = ctx.counts
        tensors, outputs, finals = kept[:given], kept[given + saved : given + saved + made], kept[given + saved + made :] or None
        inputs, params = ctx.dispatch.split(tensors[:n])
        initial, rest = tensors[n:] or None, (cotangents[:made], cotangents[made:] or None)
        d_inputs, d_params, d_states = ctx.backend.backward(
            inputs, params, ctx.scale, initial, kept[given : given + saved], outputs, finals, *rest, ctx.cu_seqlens
        )
        return (None, None, None, None, None, *d_inputs, *d_params, *(d_states or ()))
