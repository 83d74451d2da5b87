"""Operator: one variant as a function of tensors, over whole sequences and token by token.

Stands alone (torch and the standard library): it is copied into every built package as ``_operator.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lagen.runtime.dispatch import Backend, Dispatch, as_tuple, narrowed, state_dtype
from lagen.runtime.packed import each_forward
from lagen.runtime.pool import blank, by_slots, check_accepted, check_slots, take
from lagen.runtime.signature import Argument, ArgumentError, OperatorSpec, Sizes, Tensors, check_kind, is_dense, measure

__all__ = ["Argument", "ArgumentError", "Backend", "Operator", "OperatorSpec"]

Returned = Tensor | Tensors  # one tensor, or a tuple where the spec has several
HALVES = (torch.float32, torch.bfloat16, torch.float16)
SEEN = 4096  # calls whose check is remembered, by shapes


class Operator:
    """Computes a variant: ``op(*inputs, *params)`` over whole sequences, ``op.step(...)`` token by token.

    Inputs are [B, T, *head, *dims], params [*head, *dims], states float32 [B, *head, *dims]. ``assumptions`` evaluates what the spec
    assumes, as pairs of text and truth.
    """

    def __init__(
        self,
        spec: OperatorSpec,
        backends: Mapping[str, Backend],
        assumptions: Callable[[Tensors, Tensors, float], Sequence[tuple[str, Tensor | bool]]] | None = None,
    ) -> None:
        self.spec, self.backends, self.assumptions = spec, backends, assumptions
        self.__name__, self.__doc__ = spec.name, _docstring(spec)
        self._dispatch = Dispatch(spec, backends)
        self._names = self._dispatch.names
        named = (a.dims for a in spec.inputs + spec.params)
        self._key = next(((i, dims.index("K") - len(dims)) for i, dims in enumerate(named) if "K" in dims), None)  # where K is read off
        self._seen: set[object] = set()
        self._made: dict[object, tuple[tuple[int, ...], ...]] = {}  # shapes of a step's outputs
        host = backends.get("cpp")
        self._again, self._noted = (host.again, host.noted) if host else (None, None)

    def __repr__(self) -> str:
        return f"<lagen operator {self.spec.name} {self.spec.digest}: {', '.join(self.backends)}>"

    def __deepcopy__(self, memo: dict[int, object]) -> Operator:
        return self

    def __call__(
        self,
        /,
        *args: Tensor,
        scale: float | None = None,
        initial_state: Returned | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        backend: str | None = None,
        check: bool = False,
        **named: Tensor,
    ) -> Returned | tuple[Returned, Returned]:
        """Computes the outputs of whole sequences, and with ``output_final_state`` the states behind them.

        Returns o, or (o, state); a tuple stands for o or state where the spec has several. ``scale`` defaults to K ** -0.5.
        ``cu_seqlens``, int32 or int64 on the inputs' device: B is 1 and sequence n runs from token cu_seqlens[n] to cu_seqlens[n + 1],
        empty or not; states are [sequences, *head, *dims]. That it runs from 0 to T and never back is checked where the host can read
        it: on the CPU, in ``cu_seqlens_cpu`` (a copy that the caller keeps there), or with ``check``, which waits for the GPU; else a
        GPU's is taken as it is, and what is wrong in it reads and writes other memory. A torch backend on a GPU wants the copy, or waits.
        A call repeats to the bit. Under torch.use_deterministic_algorithms Triton and C++ also choose no form by the batch, so that what
        else is in it changes no bit of a sequence's results; params' gradients, which sum over it, apart.
        ``backend``: "triton", "cpp", "torch" or "oracle"; None takes what suits the device. ``check`` tests the spec's assumptions
        on the values. Raises ArgumentError before anything is launched.
        """
        spec, dispatch = self.spec, self._dispatch
        if named or len(args) != len(self._names):
            args = self._bind(args, named)
        states = self._states(initial_state)
        if cu_seqlens is not None or cu_seqlens_cpu is not None:
            self._check_sequences(args, cu_seqlens, cu_seqlens_cpu)
        self._check(args, states, scale, output_final_state, backend, ("B", "T"), cu_seqlens)
        factor = self._scale(args) if scale is None else float(scale)
        if check:
            if cu_seqlens is not None:
                dispatch.check_sequences(cu_seqlens, cu_seqlens_cpu, args, wait=True)
            self._test(args, factor)
        if backend == "oracle":
            if cu_seqlens is not None:
                dispatch.check_sequences(cu_seqlens, cu_seqlens_cpu, args, wait=True)
            outputs, finals = self._oracle(args, factor, states, cu_seqlens)
        else:
            if backend is not None and args[0].device.type == "meta":
                flat = dispatch.direct(backend, factor, output_final_state, args, states, cu_seqlens)
            else:
                given = states if states is not None else (None,) * len(spec.states)
                sequences = (cu_seqlens, cu_seqlens_cpu)
                flat = as_tuple(dispatch.forward(*args, *given, *sequences, factor, output_final_state, backend or ""))
            outputs, finals = flat[: dispatch.outputs], flat[dispatch.outputs : dispatch.made]
        o = outputs[0] if len(outputs) == 1 else outputs
        if not output_final_state:
            return o
        return o, finals[0] if len(finals) == 1 else finals

    def step(
        self,
        /,
        *args: Tensor | Tensors | None,
        state: Returned | None = None,
        slots: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        check: bool = False,
        out: Returned | None = None,
        **named: Tensor,
    ) -> tuple[Returned, Returned]:
        """Computes one token, [B, *head, *dims], or several, [B, T, *head, *dims], and writes the state in place; returns (o, state).

        ``state`` may follow the tensors; None makes a fresh one. ``slots`` [B], int32 or int64, makes it a pool: row b advances the
        state slots[b], and where that is -1 none, its outputs being 0. That a slot is in the pool and named once is checked on the
        CPU, or with ``check``, which waits for the GPU. ``out``, of the shape and dtype that o has, is written and returned as o: given
        it and the state, kernels allocate nothing (torch operations, such as the feature maps that explain lists, do). There is no
        gradient: raises ArgumentError where autograd would want one (decode under torch.no_grad()), and for what does not fit.
        """
        plain = slots is None and scale is None and backend is None and not (check or named or torch.compiler.is_compiling())
        again = self._repeated(args, state, out) if plain else None
        if again is not None:
            return again
        tensors, states, factor, outputs = self._serve("step", args, named, state, slots, scale, backend, check, out)
        if states is None:
            if slots is not None:
                raise ArgumentError(f"{self.spec.name}.step: slots is given without the state, whose places they are")
            sizes = Sizes(self.spec)
            sizes.meet_all(tensors, self._lead(tensors))
            states = self._fresh(sizes.known, state_dtype(tensors), tensors[0].device)
        given = outputs
        outputs = self._advance(tensors, states, slots, factor, backend, given)
        if plain and self._noted is not None and len(self._lead(tensors)) == 1:
            self._noted(tensors, factor, states, given)
        return outputs[0] if len(outputs) == 1 else outputs, states[0] if len(states) == 1 else states

    def _repeated(self, args: Sequence[Tensor | Tensors | None], state: object, out: object) -> tuple[Returned, Returned] | None:
        """Takes a step like one that was checked before, by the shortest way; None where there is none."""
        n = len(self._names)
        if self._again is None or len(args) != n + (state is None):
            return None
        given = args[n] if state is None else state
        states = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        outputs = self._again(args[:n], states, out if out is None or isinstance(out, (tuple, list)) else (out,))
        if outputs is None:
            return None
        return outputs[0] if len(outputs) == 1 else outputs, states[0] if len(states) == 1 else states

    def verify(
        self,
        /,
        *args: Tensor | Tensors | None,
        state: Returned | None = None,
        slots: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        check: bool = False,
        **named: Tensor,
    ) -> Returned:
        """Computes the outputs of speculated tokens, [B, T, *head, *dims], and leaves the state as it is; arguments as of step."""
        tensors, states, factor, _ = self._serve("verify", args, named, state, slots, scale, backend, check)
        if states is None:
            raise ArgumentError(f"{self.spec.name}.verify wants the state")
        outputs = self._advance(tensors, take(states, slots), None, factor, backend)
        outputs = outputs if slots is None else blank(outputs, slots)
        return outputs[0] if len(outputs) == 1 else outputs

    def commit(
        self,
        /,
        *args: Tensor | Tensors | None,
        accepted: Tensor,
        state: Returned | None = None,
        slots: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        check: bool = False,
        **named: Tensor,
    ) -> Returned:
        """Advances the state, in place, by the first ``accepted`` [B] of the tokens that verify was given; returns it.

        What it leaves is what that many steps leave, to the bit. ``accepted`` is checked where the slots are.
        """
        name = f"{self.spec.name}.commit"
        tensors, states, factor, _ = self._serve("commit", args, named, state, slots, scale, backend, check)
        if states is None:
            raise ArgumentError(f"{name} wants the state")
        if len(self._lead(tensors)) == 1:
            raise ArgumentError(f"{name}: {self._names[0]} is one token; it wants those that were verified, [B, T, ...]")
        self._check_rows("accepted", accepted, tensors)
        count = tensors[0].shape[1]
        if accepted.device.type == "cpu" or check:
            check_accepted(name, accepted.tolist(), count)
        own = torch.arange(accepted.shape[0], device=accepted.device) if slots is None else slots
        unread = None  # outputs, which nothing reads
        for t in range(count):
            unread = self._advance(self._token(tensors, t), states, torch.where(accepted > t, own, -1), factor, backend, unread)
        return states[0] if len(states) == 1 else states

    def _lead(self, tensors: Tensors) -> tuple[str, ...]:
        """Returns the dims before the head: of one token, or of several."""
        return ("B", "T") if tensors[0].dim() == len(self.spec.inputs[0].shape("B", "T")) else ("B",)

    def _token(self, tensors: Tensors, t: int) -> Tensors:
        """Takes one of several tokens."""
        return tuple(x[:, t] if i < len(self.spec.inputs) else x for i, x in enumerate(tensors))

    def _serve(
        self,
        verb: str,
        args: Sequence[object],
        named: Mapping[str, object],
        state: object,
        slots: Tensor | None,
        scale: float | None,
        backend: str | None,
        check: bool,
        out: object = None,
    ) -> tuple[Tensors, Tensors | None, float, Tensors | None]:
        """Binds and checks what step, verify and commit are given; returns tensors, states, scale and where outputs go."""
        spec, dispatch = self.spec, self._dispatch
        if dispatch.step is None:
            raise ArgumentError(f"{spec.name} is not causal: it has no decode step")
        if len(args) + len(named) == len(self._names) + 1:
            if state is not None:
                raise ArgumentError(f"{spec.name}.{verb}: state is given twice")
            args, state = args[:-1], args[-1]
        tensors = self._bind(args, named)
        states, outputs = self._states(state), self._outputs(out)
        if slots is not None:
            self._check_rows("slots", slots, tensors)
        self._check(tensors, states, scale, False, backend, self._lead(tensors), slots=slots)
        if outputs is not None:
            self._check_outputs(outputs, tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *(states or ()), *(outputs or ()))):
            raise ArgumentError(f"{spec.name}.{verb} has no gradient; call it under torch.no_grad()")
        factor = self._scale(tensors) if scale is None else float(scale)
        if check:
            if slots is not None and states is not None:
                check_slots(spec.name, slots.tolist(), states[0].shape[0])
            self._test(tensors, factor)
        return tensors, states, factor, outputs

    def _advance(
        self,
        tensors: Tensors,
        states: Tensors,
        slots: Tensor | None,
        factor: float,
        backend: str | None,
        outputs: Tensors | None = None,
    ) -> Tensors:
        """Computes one token or several, one after the other, and writes states and outputs, made where they are not given, in place."""
        dispatch, lead = self._dispatch, self._lead(tensors)
        if outputs is None:  # like the states: of each element that torch.vmap maps, its own
            shapes, dtype = self._shapes(tensors, lead)
            outputs = tuple([states[0].new_empty(shape, dtype=dtype) for shape in shapes])
        if len(lead) == 2:
            if not tensors[0].shape[1]:
                raise ArgumentError(f"{self.spec.name}: T is 0; it wants a token")
            for t in range(tensors[0].shape[1]):
                self._advance(self._token(tensors, t), states, slots, factor, backend, tuple(o[:, t] for o in outputs))
        elif backend == "oracle":
            dispatch.check_step(tensors, states, slots, outputs)
            by_slots(self._oracle_step)(*dispatch.split(tensors), factor, states, slots, outputs)
        elif backend is not None and tensors[0].device.type == "meta":
            dispatch.direct_step(backend, factor, tensors, states, slots, outputs)
        else:
            assert dispatch.step is not None
            dispatch.step(*tensors, *states, *outputs, slots, factor, backend or "")
        return outputs

    def _shapes(self, tensors: Tensors, lead: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], torch.dtype]:
        """Returns the shapes of a step's outputs, and their dtype."""
        key = (len(lead), *[x.shape for x in tensors])
        shapes = None if torch.compiler.is_compiling() else self._made.get(key)
        if shapes is None:
            sizes = Sizes(self.spec)
            sizes.meet_all(tensors, lead)
            shapes = tuple(sizes.shape(o, *lead) for o in self.spec.outputs)
            if not torch.compiler.is_compiling():
                if len(self._made) >= SEEN:
                    self._made.clear()
                self._made[key] = shapes
        first = tensors[0].dtype
        return shapes, first if self.spec.inputs[0].gate else narrowed(tensors) or first

    def _check_outputs(self, outputs: Tensors, tensors: Tensors) -> None:
        """Checks where a step's outputs are to go; raises ArgumentError."""
        name = f"{self.spec.name}.step"
        lead = self._lead(tensors)
        shapes, dtype = self._shapes(tensors, lead)
        for a, x, shape in zip(self.spec.outputs, outputs, shapes, strict=True):
            what = "out" if len(outputs) == 1 else f"out {a.name}"
            check_kind(name, what, x, (dtype,), tensors[0].device)
            if x.shape != shape:
                raise ArgumentError(f"{name}: {what} is {list(x.shape)}; it wants [{', '.join(a.shape(*lead))}] = {list(shape)}")
            if not is_dense(a, x):
                raise ArgumentError(f"{name}: {what} has strides {list(x.stride())}; it wants the numbers of each head behind each other")

    def _oracle_step(self, inputs: Tensors, params: Tensors, factor: float, states: Tensors) -> Tensors:
        """Evaluates one token in float64 and writes the states."""
        outputs, finals = self._oracle((*(x.unsqueeze(1) for x in inputs), *params), factor, states, None)
        for old, new in zip(states, finals, strict=True):
            old.copy_(new)
        return tuple(o.squeeze(1) for o in outputs)

    def init_state(self, batch: int, device: torch.device | str | None = None, **sizes: int) -> Returned:
        """Makes the state before the first token, float32, from the sizes of its dims: ``gla.init_state(2, H=4, K=64, V=64)``."""
        known = {"B": batch, **sizes}
        known.setdefault("HV", known.get("H", 1))
        known.setdefault("H", known["HV"])
        wanted = {d for s in self.spec.states for d in s.dims}
        for dim, formula in self.spec.sizes:
            if dim in wanted and dim not in known:
                known[dim] = measure(formula, known)
        missing = sorted(wanted - set(known))
        if missing:
            raise ArgumentError(f"{self.spec.name}.init_state wants the size of {', '.join(missing)}")
        states = self._fresh(known, torch.float32, torch.device(device or "cpu"))
        return states[0] if len(states) == 1 else states

    # -- arguments --

    def _outputs(self, out: object) -> Tensors | None:
        """Returns where outputs are to go as a tuple; raises ArgumentError where that is not as many tensors as the spec has outputs."""
        if out is None:
            return None
        given = (out,) if isinstance(out, Tensor) else tuple(out) if isinstance(out, (tuple, list)) else ()
        count = len(self.spec.outputs)
        if len(given) != count or not all(isinstance(x, Tensor) for x in given):
            wants = "a tensor" if count == 1 else f"a tuple of {count} tensors ({', '.join(o.name for o in self.spec.outputs)})"
            raise ArgumentError(f"{self.spec.name}.step: out is a {type(out).__name__}; it wants {wants}")
        return given

    def _bind(self, args: Sequence[object], named: Mapping[str, object]) -> Tensors:
        """Puts positional and named tensors in spec order; raises ArgumentError."""
        name, names = self.spec.name, self._names
        wants = f"{name} takes {', '.join(names)}"
        if len(args) > len(names):
            raise ArgumentError(f"{wants}: {len(args)} tensors were given, it wants {len(names)}")
        bound = dict(zip(names, args, strict=False))
        for n, x in named.items():
            if n not in names:
                raise ArgumentError(f"{wants}; {n!r} is none of them")
            if n in bound:
                raise ArgumentError(f"{wants}; {n} is given twice")
            bound[n] = x
        missing = [n for n in names if n not in bound]
        if missing:
            raise ArgumentError(f"{wants}; {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        for n, x in bound.items():
            if not isinstance(x, Tensor):
                raise ArgumentError(f"{name}: {n} is a {type(x).__name__}; it wants a tensor")
        return tuple(x for n in names if isinstance(x := bound[n], Tensor))

    def _states(self, state: object) -> Tensors | None:
        """Returns given states as a tuple; raises ArgumentError where they are none, or not as many as the spec has."""
        if state is None:
            return None
        name, wanted = self.spec.name, self.spec.states
        if not wanted:
            raise ArgumentError(f"{name} is not causal: it has no initial state")
        given = (state,) if isinstance(state, Tensor) else tuple(state) if isinstance(state, (tuple, list)) else None
        if given is None or not all(isinstance(x, Tensor) for x in given):
            raise ArgumentError(
                f"{name}: the state is a {type(state).__name__}; it wants {'a tensor' if len(wanted) == 1 else 'a tuple of tensors'}"
            )
        if len(given) != len(wanted):
            listed = ", ".join(s.name for s in wanted)
            raise ArgumentError(f"{name}: the number of states is {len(given)}; it wants {len(wanted)} ({listed})")
        return given

    def _check_rows(self, what: str, x: object, tensors: Tensors) -> None:
        """Checks shape, dtype and device of a number for each row; raises ArgumentError."""
        name, first = self.spec.name, tensors[0]
        check_kind(name, what, x, (torch.int32, torch.int64), first.device)
        if isinstance(x, Tensor) and x.shape != first.shape[:1]:
            raise ArgumentError(f"{name}: {what} is {list(x.shape)}; it wants [B] = {list(first.shape[:1])}, a number for each row")

    def _check_sequences(self, tensors: Tensors, cu_seqlens: object, copy: object) -> None:
        """Checks shape, dtype and device of cu_seqlens and its copy; raises ArgumentError."""
        name, first = self.spec.name, tensors[0]
        if cu_seqlens is None:
            raise ArgumentError(f"{name}: cu_seqlens_cpu is given without cu_seqlens, of which it is a copy")
        pairs = [("cu_seqlens", cu_seqlens, first.device)] + [("cu_seqlens_cpu", copy, torch.device("cpu"))] * (copy is not None)
        for what, x, device in pairs:
            check_kind(name, what, x, (torch.int32, torch.int64), device)
            if isinstance(x, Tensor) and (x.dim() != 1 or not x.shape[0]):
                raise ArgumentError(f"{name}: {what} is {list(x.shape)}; it wants one dim of sequences + 1 numbers")
        if first.dim() and first.shape[0] != 1:
            raise ArgumentError(f"{name}: {self._names[0]} has B = {first.shape[0]}; with cu_seqlens it wants B = 1, all packed along T")

    def _check(
        self,
        tensors: Tensors,
        states: Tensors | None,
        scale: float | None,
        keep: bool,
        backend: str | None,
        lead: tuple[str, ...],
        cu_seqlens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """Validates a call whose shapes, dtypes and devices were not seen before."""
        if torch.compiler.is_compiling():
            self._validate(tensors, states, scale, keep, backend, lead, cu_seqlens, slots)
            return
        found = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in (*tensors, *(states or ()))]
        key = (backend, scale is None, keep, len(lead), None if cu_seqlens is None else cu_seqlens.shape, slots is None, *found)
        if key not in self._seen:
            self._validate(tensors, states, scale, keep, backend, lead, cu_seqlens, slots)
            if len(self._seen) >= SEEN:
                self._seen.clear()
            self._seen.add(key)

    def _validate(
        self,
        tensors: Tensors,
        states: Tensors | None,
        scale: float | None,
        keep: bool,
        backend: str | None,
        lead: tuple[str, ...],
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
    ) -> None:
        """Checks all arguments; raises ArgumentError."""
        spec = self.spec
        if scale is not None and not spec.scaled:
            raise ArgumentError(f"{spec.name}: scale is given, but its spec does not mention scale")
        if keep and not spec.causal:
            raise ArgumentError(f"{spec.name} is not causal: it has no final state")
        device = next((x.device for x in tensors if isinstance(x, Tensor)), torch.device("cpu"))
        if backend is not None:
            self._check_backend(backend, device)
        used = self.backends.values() if backend in (None, "oracle") else [self.backends[backend or ""]]
        doubles = backend == "oracle" or any(b.doubles for b in used)
        for a, x in zip(spec.inputs + spec.params, tensors, strict=True):
            check_kind(spec.name, a.name, x, (*HALVES, torch.float64) if doubles else HALVES, device)
        sizes = Sizes(spec)
        sizes.meet_all(tensors, lead)
        many = "POOL" if slots is not None else sizes.meet_sequences(cu_seqlens)
        for s, x in zip(spec.states, states or (), strict=False):
            check_kind(spec.name, f"state {s.name}", x, (state_dtype(tensors),), device)
            sizes.meet(f"state {s.name}", x, s.shape(many))

    def _check_backend(self, backend: str, device: torch.device) -> None:
        """Raises ArgumentError where a forced backend does not exist or cannot run on ``device``."""
        name = self.spec.name
        if backend != "oracle" and backend not in self.backends:
            raise ArgumentError(f"{name}: backend is {backend!r}; it wants one of {', '.join([*self.backends, 'oracle'])}")
        if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ArgumentError(f"{name}: backend 'triton' on CPU tensors wants TRITON_INTERPRET=1 set before the operator is imported")
        if backend == "cpp" and device.type != "cpu":
            raise ArgumentError(f"{name}: backend 'cpp' wants tensors on the CPU; they are on {device}")

    def _scale(self, tensors: Tensors) -> float:
        """Returns the default scale K ** -0.5; 1 where the spec has no scale."""
        if not self.spec.scaled:
            return 1.0
        if self._key is None:
            raise ArgumentError(f"{self.spec.name}: no input has a dim K; scale wants to be given")
        place, axis = self._key
        return float(max(tensors[place].shape[axis], 1) ** -0.5)

    def _fresh(self, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Tensors:
        return tuple(torch.full([sizes[d] for d in s.shape("B")], s.init, dtype=dtype, device=device) for s in self.spec.states)

    def _test(self, tensors: Tensors, scale: float) -> None:
        """Evaluates the spec's assumptions; raises ArgumentError with the first that does not hold."""
        for text, truth in self.assumptions(*self._dispatch.split(tensors), scale) if self.assumptions else ():
            places = truth if isinstance(truth, Tensor) else torch.tensor(truth)
            wrong = int((~places).sum())
            if wrong:
                raise ArgumentError(f"{self.spec.name}: the spec assumes {text}; it does not hold at {wrong} of {places.numel()} places")

    def _oracle(self, tensors: Tensors, scale: float, states: Tensors | None, cu_seqlens: Tensor | None) -> tuple[Tensors, Tensors]:
        """Evaluates the spec token by token in float64, differentiably; raises ArgumentError where lagen is not installed."""
        try:
            reader, oracle = import_module("lagen.spec.read"), import_module("lagen.verify.oracle")
        except ModuleNotFoundError as missing:
            raise ArgumentError(f"{self.spec.name}: backend 'oracle' wants the package lagen, which is not installed") from missing
        variant = reader.read_text(self.spec.source, self.spec.name)

        def run(*given: Any) -> Any:
            return *oracle.oracle(variant, *given), ()

        outputs, finals, _ = each_forward(run)(*self._dispatch.split(tensors), scale, states, self.spec.causal, cu_seqlens)
        first, kept = tensors[0], state_dtype(tensors)
        return tuple(o.to(first.device, first.dtype) for o in outputs), tuple(s.to(first.device, kept) for s in finals or ())


def _docstring(spec: OperatorSpec) -> str:
    rows = [f"{a.name}: [{', '.join(a.shape('B', 'T'))}]" for a in spec.inputs] + [
        f"{a.name}: [{', '.join(a.shape())}]" for a in spec.params
    ]
    rows += [f"state {s.name}: [{', '.join(s.shape('B'))}]" for s in spec.states]
    rows += [f"returns {o.name}: [{', '.join(o.shape('B', 'T'))}]" for o in spec.outputs]
    return spec.doc + "\n\n" + "\n".join(rows)
