"""Operator: one variant as a PyTorch operator, over the plain functions of its backends.

Stands alone (torch and the standard library): it is copied into every built package as ``_operator.py``.

A call goes through one dispatcher operator per variant, ``torch.ops.lagen.<name>_<digest>``, with a second one for the backward and
a third for the decode step, so autograd, FakeTensor, torch.compile and export see three opaque ops. Their names carry the digest:
two builds of one name live in one process, and importing a build twice reuses what is registered.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Formula = int | str | tuple[str, "Formula", "Formula"]  # a size: a number, a dim, or (sign, left, right)
Returned = Tensor | Tensors
HALVES = (torch.float32, torch.bfloat16, torch.float16)
SEEN = 4096  # shapes whose check is remembered


class ArgumentError(ValueError):
    """Says which argument does not fit, what it got and what it wants."""


# ---- what is declared -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """An input [B, T, *head, *dims], a param [*head, *dims], a state [B, *head, *dims] or an output [B, T, *head, *dims]."""

    name: str
    head: str  # "", "H" or "HV"
    dims: tuple[str, ...]
    init: float = 0.0  # of a state: its value before the first token

    def shape(self, *lead: str) -> tuple[str, ...]:
        """Returns the names of all dims, ``lead`` in front."""
        return (*lead, *((self.head,) if self.head else ()), *self.dims)


@dataclass(frozen=True)
class OperatorSpec:
    """What an operator takes and gives. ``states`` is empty where the variant is not causal."""

    name: str
    digest: str
    inputs: tuple[Argument, ...]
    params: tuple[Argument, ...]
    states: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    scaled: bool  # whether the spec mentions ``scale``, whose default is K ** -0.5
    causal: bool
    sizes: tuple[tuple[str, Formula], ...]  # of derived dims, in order
    doc: str
    source: str  # the spec's text


@dataclass(frozen=True)
class Backend:
    """Three plain functions over tuples of tensors in spec order.

    forward(inputs, params, scale, initial_states, output_final_state) -> (outputs, final_states or None, saved)
    backward(inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states)
        -> (d_inputs, d_params, d_initial_states or None)
    step(inputs, params, scale, states) -> outputs; writes the states in place

    What they return is new and contiguous. ``saves`` counts the saved tensors; ``saved``, called as forward is, returns them
    uninitialised (under FakeTensor, so only their shapes). ``keeps_outputs``: the backward reads outputs and final states.
    """

    forward: Callable[..., tuple[Tensors, Tensors | None, Tensors]]
    backward: Callable[..., tuple[Tensors, Tensors, Tensors | None]]
    step: Callable[..., Tensors] | None
    saves: int = 0
    saved: Callable[..., Tensors] | None = None
    keeps_outputs: bool = True
    doubles: bool = False  # takes float64


# ---- sizes and their check ------------------------------------------------------------------------------------------------------


def measure(formula: Formula, sizes: Mapping[str, int]) -> int:
    """Computes the size of a derived dim."""
    if isinstance(formula, int):
        return formula
    if isinstance(formula, str):
        return sizes[formula]
    sign, left, right = formula
    a, b = measure(left, sizes), measure(right, sizes)
    if sign in ("add", "sub"):
        return a + b if sign == "add" else a - b
    if sign == "pow":
        return int(a**b)
    assert sign in ("mul", "div"), f"no size rule for {sign}"
    return a * b if sign == "mul" else a // b


class _Sizes:
    """The sizes of one call by dim, gathered argument by argument."""

    def __init__(self, spec: OperatorSpec) -> None:
        self.spec = spec
        self.known: dict[str, int] = {}
        self.source: dict[str, str] = {}

    def meet(self, what: str, x: Tensor, shape: tuple[str, ...]) -> None:
        """Takes the sizes of one argument; raises ArgumentError where they do not fit."""
        name = self.spec.name
        if x.dim() != len(shape):
            raise ArgumentError(f"{name}: {what} has {x.dim()} dims, {_shape(x)}; it wants {len(shape)}, [{', '.join(shape)}]")
        for dim, size in zip(shape, x.shape, strict=True):
            if dim not in self.known:
                self.known[dim], self.source[dim] = size, what
            elif self.known[dim] != size:
                raise ArgumentError(
                    f"{name}: {what} is {_shape(x)}; it wants [{', '.join(shape)}] with {dim} = {self.known[dim]}, "
                    f"as {self.source[dim]} has it, not {size}"
                )

    def finish(self) -> dict[str, int]:
        """Completes head and derived dims; raises ArgumentError where HV is no multiple of H."""
        known = self.known
        h, hv = known.get("H"), known.get("HV")
        if h is not None and hv is not None and (hv % h if h else hv):
            raise ArgumentError(
                f"{self.spec.name}: {self.source['HV']} has HV = {hv} heads and {self.source['H']} has H = {h}; HV wants to be a multiple of H"
            )
        if h is None and hv is not None:
            known["H"] = hv
        if hv is None and h is not None:
            known["HV"] = h
        for dim, formula in self.spec.sizes:
            size = measure(formula, known)
            if known.setdefault(dim, size) != size:
                raise ArgumentError(f"{self.spec.name}: {self.source[dim]} has {dim} = {known[dim]}; it wants {size}")
        return known

    def shape(self, a: Argument, *lead: str) -> tuple[int, ...]:
        """Returns an argument's shape as numbers."""
        return tuple(self.known[d] for d in a.shape(*lead))


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_kind(name: str, what: str, x: object, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raises ArgumentError where ``x`` is no tensor of one of ``dtypes`` on ``device``."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name}: {what} is a {type(x).__name__}; it wants a tensor")
    if x.dtype not in dtypes:
        raise ArgumentError(f"{name}: {what} is {_dtypes([x.dtype])}; it wants {_dtypes(dtypes)}")
    if x.device != device:
        raise ArgumentError(f"{name}: {what} is on {x.device}; it wants {device}, where the first input is")


# ---- the operator ---------------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Operator:
    """Computes a variant: ``op(*inputs, *params)`` over whole sequences, ``op.step(...)`` token by token.

    Inputs are [B, T, *head, *dims], params [*head, *dims], states float32 [B, *head, *dims].
    """

    spec: OperatorSpec
    backends: Mapping[str, Backend]
    assumptions: Callable[[Tensors, Tensors, float], Sequence[tuple[str, Tensor | bool]]] | None = None
    _seen: dict[object, None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.__name__, self.__doc__ = self.spec.name, _docstring(self.spec)
        self._names = tuple(a.name for a in self.spec.inputs + self.spec.params)
        self._saves = max(b.saves for b in self.backends.values())
        self._forward, self._backward, self._step = _register(self)

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
        backend: str | None = None,
        check: bool = False,
        **named: Tensor,
    ) -> Returned | tuple[Returned, Returned]:
        """Computes the outputs of whole sequences, and with ``output_final_state`` the states behind them.

        Returns o, or (o, state); a tuple stands for o or state where the spec has several. ``scale`` defaults to K ** -0.5.
        ``backend``: "triton", "cpp", "torch" or "oracle"; None takes what suits the device. ``check`` tests the spec's assumptions
        on the values. Raises ArgumentError before anything is launched.
        """
        spec = self.spec
        if named or len(args) != len(self._names):
            args = self._bind(args, named)
        states = self._states(initial_state)
        key = (backend, scale is None, *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in (*args, *(states or ()))))
        compiling = torch.compiler.is_compiling()
        if compiling or key not in self._seen:
            self._validate(args, states, scale, output_final_state, backend, ("B", "T"))
            if not compiling:
                if len(self._seen) >= SEEN:
                    self._seen.clear()
                self._seen[key] = None
        elif output_final_state and not spec.causal:
            raise ArgumentError(f"{spec.name} is not causal: it has no final state")
        factor = self._scale(args) if scale is None else float(scale)
        if check:
            self._test(args, factor)
        n = len(spec.outputs)
        if backend == "oracle":
            outputs, finals = self._oracle(args, factor, states)
        elif backend is not None and args[0].device.type == "meta":
            flat = _Direct.apply(self, self.backends[backend], factor, output_final_state, *args, *(states or ()))
            outputs, finals = flat[:n], flat[n : n + len(spec.states)]
        else:
            given = states if states is not None else (None,) * len(spec.states)
            flat = self._forward(*args, *given, factor, output_final_state, backend or "")
            flat = flat if isinstance(flat, tuple) else (flat,)
            outputs, finals = flat[:n], flat[n : n + len(spec.states)]
        o = outputs[0] if n == 1 else tuple(outputs)
        if not output_final_state:
            return o
        return o, finals[0] if len(finals) == 1 else tuple(finals)

    def step(
        self,
        /,
        *args: Tensor | Returned | None,
        state: Returned | None = None,
        scale: float | None = None,
        backend: str | None = None,
        **named: Tensor,
    ) -> tuple[Returned, Returned]:
        """Computes one token, [B, *head, *dims], and writes the state in place; returns (o, state).

        ``state`` may follow the tensors; None makes a fresh one. There is no gradient: raises ArgumentError where autograd would
        want one (decode under torch.no_grad()), and for what does not fit.
        """
        spec = self.spec
        if not spec.causal:
            raise ArgumentError(f"{spec.name} is not causal: it has no decode step")
        if len(args) == len(self._names) + 1 - len(named):
            if state is not None:
                raise ArgumentError(f"{spec.name}.step: state is given twice")
            args, state = args[:-1], args[-1]  # type: ignore[assignment]
        tensors = self._bind(args, named)  # type: ignore[arg-type]
        states = self._states(state)
        sizes = self._validate(tensors, states, scale, False, backend, ("B",))
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *(states or ()))):
            raise ArgumentError(f"{spec.name}.step has no gradient; call it under torch.no_grad()")
        if states is None:
            double = any(x.dtype == torch.float64 for x in tensors)
            states = self._fresh(sizes, torch.float64 if double else torch.float32, tensors[0].device)
        factor = self._scale(tensors) if scale is None else float(scale)
        if backend == "oracle":
            raise ArgumentError(f"{spec.name}.step: the oracle has no step; call the operator with T = 1")
        if backend is not None and tensors[0].device.type == "meta":
            flat = _step_of(self.backends[backend], backend)(*self._split(tensors), factor, states)
        else:
            flat = self._step(*tensors, *states, factor, backend or "")
        flat = flat if isinstance(flat, tuple) else (flat,)
        return flat[0] if len(flat) == 1 else flat, states[0] if len(states) == 1 else states

    def init_state(self, batch: int, device: torch.device | str | None = None, **sizes: int) -> Returned:
        """Makes the state before the first token, float32, from the sizes of its dims: ``gla.init_state(2, H=4, K=64, V=64)``."""
        known = {"B": batch, **sizes}
        known.setdefault("HV", known.get("H", 1))
        known.setdefault("H", known["HV"])
        for dim, formula in self.spec.sizes:
            known.setdefault(dim, measure(formula, known))
        missing = [d for s in self.spec.states for d in s.shape() if d not in known]
        if missing:
            raise ArgumentError(f"{self.spec.name}.init_state wants the size of {', '.join(dict.fromkeys(missing))}")
        states = self._fresh(known, torch.float32, torch.device(device or "cpu"))
        return states[0] if len(states) == 1 else states

    # -- arguments --

    def _bind(self, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensors:
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
        return tuple(bound[n] for n in names)

    def _split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        n = len(self.spec.inputs)
        return tensors[:n], tensors[n:]

    def _states(self, state: Returned | None) -> Tensors | None:
        """Returns given states as a tuple; raises ArgumentError where their number does not fit."""
        if state is None:
            return None
        wanted = self.spec.states
        if not wanted:
            raise ArgumentError(f"{self.spec.name} is not causal: it has no initial state")
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        if len(states) != len(wanted):
            raise ArgumentError(
                f"{self.spec.name}: {len(states)} states were given, it wants {len(wanted)} ({', '.join(s.name for s in wanted)})"
            )
        return states

    def _validate(
        self,
        tensors: Tensors,
        states: Tensors | None,
        scale: float | None,
        output_final_state: bool,
        backend: str | None,
        lead: tuple[str, ...],
    ) -> dict[str, int]:
        """Checks all arguments and returns the sizes of their dims; raises ArgumentError."""
        spec = self.spec
        if scale is not None and not spec.scaled:
            raise ArgumentError(f"{spec.name}: scale is given, but its spec does not mention scale")
        if output_final_state and not spec.causal:
            raise ArgumentError(f"{spec.name} is not causal: it has no final state")
        first = tensors[0]
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        if backend is not None:
            self._check_backend(backend, device)
        doubles = backend == "oracle" or (self.backends[backend].doubles if backend else any(b.doubles for b in self.backends.values()))
        dtypes = (*HALVES, torch.float64) if doubles else HALVES
        sizes = _Sizes(spec)
        for i, (a, x) in enumerate(zip(spec.inputs + spec.params, tensors, strict=True)):
            _check_kind(spec.name, a.name, x, dtypes, device)
            sizes.meet(a.name, x, a.shape(*lead) if i < len(spec.inputs) else a.shape())
        known = sizes.finish()
        kept = (torch.float64,) if any(x.dtype == torch.float64 for x in tensors) else (torch.float32,)
        for s, x in zip(spec.states, states or (), strict=False):
            what = f"state {s.name}"
            _check_kind(spec.name, what, x, kept, device)
            sizes.meet(what, x, s.shape("B"))
        return known

    def _check_backend(self, backend: str, device: torch.device) -> None:
        """Raises ArgumentError where a forced backend does not exist or cannot run on ``device``."""
        name = self.spec.name
        if backend != "oracle" and backend not in self.backends:
            raise ArgumentError(f"{name}: backend is {backend!r}; it wants one of {', '.join([*self.backends, 'oracle'])}")
        if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ArgumentError(f"{name}: backend 'triton' on CPU tensors wants TRITON_INTERPRET=1 before torch and triton are imported")
        if backend == "cpp" and device.type != "cpu":
            raise ArgumentError(f"{name}: backend 'cpp' wants CPU tensors, got {device}")

    def _scale(self, tensors: Tensors) -> float:
        """Returns the default scale K ** -0.5; 1 where the spec has no scale."""
        if not self.spec.scaled:
            return 1.0
        for a, x in zip(self.spec.inputs + self.spec.params, tensors, strict=True):
            if "K" in a.dims:
                return float(x.shape[a.dims.index("K") - len(a.dims)] ** -0.5)
        raise ArgumentError(f"{self.spec.name}: no input has a dim K, so scale wants to be given")

    def _fresh(self, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Tensors:
        return tuple(torch.full([sizes[d] for d in s.shape("B")], s.init, dtype=dtype, device=device) for s in self.spec.states)

    def _test(self, tensors: Tensors, scale: float) -> None:
        """Evaluates the spec's assumptions; raises ArgumentError with the first that does not hold."""
        for text, truth in self.assumptions(*self._split(tensors), scale) if self.assumptions else ():
            if not isinstance(truth, Tensor):
                truth = torch.tensor(truth)
            wrong = int((~truth).sum())
            if wrong:
                raise ArgumentError(f"{self.spec.name}: the spec assumes {text}; it does not hold at {wrong} of {truth.numel()} places")

    def _pick(self, backend: str, tensors: Tensors) -> Backend:
        """Returns the named backend, or for "" the one that suits the device."""
        if not backend:
            double = any(x.dtype == torch.float64 for x in tensors)
            order = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}.get(tensors[0].device.type, ("torch",))
            backend = next(b for b in order if b in self.backends and (self.backends[b].doubles or not double))
        return self.backends[backend]

    def _oracle(self, tensors: Tensors, scale: float, states: Tensors | None) -> tuple[Tensors, Tensors]:
        """Evaluates the spec token by token in float64, differentiably; raises ArgumentError where lagen is not installed."""
        try:
            reader, oracle = importlib.import_module("lagen.spec.read"), importlib.import_module("lagen.verify.oracle")
        except ModuleNotFoundError as missing:
            raise ArgumentError(f"{self.spec.name}: backend 'oracle' wants the package lagen, which is not installed") from missing
        variant = reader.read_text(self.spec.source, self.spec.name)
        outputs, finals = oracle.oracle(variant, *self._split(tensors), scale, states, self.spec.causal)
        first = tensors[0]
        kept = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        return tuple(o.to(first.device, first.dtype) for o in outputs), tuple(s.to(first.device, kept) for s in finals or ())


def _docstring(spec: OperatorSpec) -> str:
    rows = [f"{a.name}: [{', '.join(a.shape('B', 'T'))}]" for a in spec.inputs] + [
        f"{a.name}: [{', '.join(a.shape())}]" for a in spec.params
    ]
    rows += [f"state {s.name}: [{', '.join(s.shape('B'))}]" for s in spec.states]
    rows += [f"returns {o.name}: [{', '.join(o.shape('B', 'T'))}]" for o in spec.outputs]
    return spec.doc + "\n\n" + "\n".join(rows)


def _step_of(backend: Backend, name: str) -> Callable[..., Tensors]:
    if backend.step is None:
        raise ArgumentError(f"the backend {name or 'of this device'} has no decode step")
    return backend.step


# ---- registration ---------------------------------------------------------------------------------------------------------------

Op = Callable[..., Returned]


def _register(op: Operator) -> tuple[Op, Op, Op]:
    """Registers the three dispatcher operators of a variant, unless this process has them; returns their overloads."""
    spec = op.spec
    base = f"{spec.name}_{spec.digest}"
    names = (base, f"{base}_backward", f"{base}_step") if spec.causal else (base, f"{base}_backward", base)
    if not hasattr(torch.ops.lagen, base):
        library = torch.library.Library("lagen", "FRAGMENT")
        _Registration(op, library, base).run()
        # A Library takes its operators along when it goes; this one stays as long as the operator can be called.
        getattr(torch.ops.lagen, base).library = library
    forward, backward, step = (getattr(torch.ops.lagen, n).default for n in names)
    return forward, backward, step


class _Registration:
    """The schemas and implementations of one variant, all over flat tensors: inputs, params, then states."""

    def __init__(self, op: Operator, library: torch.library.Library, base: str) -> None:
        self.op, self.library, self.base = op, library, base
        spec = op.spec
        self.tensors, self.states, self.outputs = len(op._names), len(spec.states), len(spec.outputs)

    def run(self) -> None:
        """Defines schemas, implementations and autograd."""
        spec, lib, base = self.op.spec, self.library, self.base
        given = [f"Tensor {n}" for n in self.op._names]
        initial = [f"Tensor? initial_{s.name}" for s in spec.states]
        saved = [f"Tensor saved{i}" for i in range(self.op._saves)]
        made = [f"Tensor? {o.name}_made" for o in spec.outputs] + [f"Tensor? final_{s.name}" for s in spec.states]
        cotangents = [f"Tensor? d_{o.name}" for o in spec.outputs] + [f"Tensor? d_final_{s.name}" for s in spec.states]
        returned = self.outputs + self.states + self.op._saves
        self.define(base, [*given, *initial, "float scale", "bool output_final_state", "str backend"], returned)
        self.define(
            f"{base}_backward", [*given, *initial, *saved, *made, *cotangents, "float scale", "str backend"], self.tensors + self.states
        )
        for key in ("CPU", "CUDA"):
            lib.impl(base, self.forward, key)
            lib.impl(f"{base}_backward", self.backward, key)
        torch.library.register_fake(f"lagen::{base}", self.fake_forward, lib=lib)
        torch.library.register_fake(f"lagen::{base}_backward", self.fake_backward, lib=lib)
        torch.library.register_autograd(f"lagen::{base}", self.derive, setup_context=self.remember, lib=lib)
        torch.library.register_autograd(f"lagen::{base}_backward", self.refuse, lib=lib)
        if spec.causal:
            written = [f"Tensor({chr(ord('a') + i)}!) {s.name}_state" for i, s in enumerate(spec.states)]
            self.define(f"{base}_step", [*given, *written, "float scale", "str backend"], self.outputs)
            for key in ("CPU", "CUDA"):
                lib.impl(f"{base}_step", self.step, key)
            torch.library.register_fake(f"lagen::{base}_step", self.fake_step, lib=lib)

    def define(self, name: str, arguments: Sequence[str], returned: int) -> None:
        results = "Tensor" if returned == 1 else f"({', '.join(['Tensor'] * returned)})"
        self.library.define(f"{name}({', '.join(arguments)}) -> {results}")

    # -- forward --

    def initial(self, args: Sequence[Tensor | None]) -> Tensors | None:
        """Returns the initial states of a flat argument list: all or none."""
        states = args[self.tensors : self.tensors + self.states]
        return tuple(s for s in states if s is not None) if states and states[0] is not None else None

    def forward(self, *args: object) -> Returned:
        """Runs a backend's forward; absent final and saved tensors come back empty, for an operator returns a fixed number."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        scale, keep, name = args[-3:]
        backend = self.op._pick(name, tensors)  # type: ignore[arg-type]
        states = self.initial(args)  # type: ignore[arg-type]
        outputs, finals, saved = backend.forward(*self.op._split(tensors), scale, states, keep)
        assert len(saved) == backend.saves, f"{self.base}: {len(saved)} tensors saved, {backend.saves} declared"
        return self.flat(outputs, finals, saved, tensors[0])

    def flat(self, outputs: Tensors, finals: Tensors | None, saved: Tensors, like: Tensor) -> Returned:
        flat = list(outputs)
        flat += finals if finals is not None else [like.new_empty(0) for _ in range(self.states)]
        flat += saved
        flat += [like.new_empty(0) for _ in range(self.op._saves - len(saved))]
        return tuple(flat) if len(flat) > 1 else flat[0]

    def sizes(self, tensors: Tensors, *lead: str) -> _Sizes:
        """Reads the sizes of all dims off the tensors."""
        spec, sizes = self.op.spec, _Sizes(self.op.spec)
        for i, (a, x) in enumerate(zip(spec.inputs + spec.params, tensors, strict=True)):
            sizes.meet(a.name, x, a.shape(*lead) if i < len(spec.inputs) else a.shape())
        sizes.finish()
        return sizes

    def fake_forward(self, *args: object) -> Returned:
        """Makes what forward returns, by shape alone."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        scale, keep, name = args[-3:]
        backend, sizes, first = self.op._pick(name, tensors), self.sizes(tensors, "B", "T"), tensors[0]  # type: ignore[arg-type]
        outputs = tuple(first.new_empty(sizes.shape(o, "B", "T")) for o in self.op.spec.outputs)
        double = any(x.dtype == torch.float64 for x in tensors)
        kept = torch.float64 if double else torch.float32
        finals = tuple(first.new_empty(sizes.shape(s, "B"), dtype=kept) for s in self.op.spec.states) if keep else None
        states = self.initial(args)  # type: ignore[arg-type]
        saved = backend.saved(*self.op._split(tensors), scale, states, keep) if backend.saved else ()
        return self.flat(outputs, finals, saved, first)

    # -- backward --

    def remember(self, ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Returned) -> None:
        """Keeps for the backward what it reads."""
        *tensors, scale, keep, name = inputs
        flat = output if isinstance(output, tuple) else (output,)
        backend = self.op._pick(name, inputs[: self.tensors])  # type: ignore[arg-type]
        made = self.outputs + self.states
        saved = flat[made:]
        outputs = flat[: made if keep else self.outputs] if backend.keeps_outputs else ()
        ctx.save_for_backward(*tensors, *saved, *outputs)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.keep, ctx.backend = scale, keep, name  # type: ignore[attr-defined]

    def derive(self, ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Calls the backward operator and returns a gradient for every tensor."""
        kept = list(ctx.saved_tensors)  # type: ignore[attr-defined]
        made: list[Tensor | None] = kept[self.tensors + self.states + self.op._saves :]
        made += [None] * (self.outputs + self.states - len(made))
        kept = kept[: self.tensors + self.states + self.op._saves]
        d_made = list(cotangents[: self.outputs + self.states])
        if not ctx.keep:  # type: ignore[attr-defined]
            d_made[self.outputs :] = [None] * self.states
        flat = self.op._backward(*kept, *made, *d_made, ctx.scale, ctx.backend)  # type: ignore[attr-defined]
        flat = flat if isinstance(flat, tuple) else (flat,)
        absent = kept[self.tensors : self.tensors + self.states]
        states = [None if s is None else d for s, d in zip(absent, flat[self.tensors :], strict=True)]
        return (*flat[: self.tensors], *states, None, None, None)

    def backward(self, *args: object) -> Returned:
        """Runs a backend's backward; absent gradients come back empty."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        scale, name = args[-2:]
        backend = self.op._pick(name, tensors)  # type: ignore[arg-type]
        rest: list[Tensor | None] = list(args[self.tensors + self.states : -2])  # type: ignore[arg-type]
        saved, rest = rest[: backend.saves], rest[self.op._saves :]
        made, cotangents = rest[: self.outputs + self.states], rest[self.outputs + self.states :]
        initial = self.initial(args)  # type: ignore[arg-type]
        shapes = self.sizes(tensors, "B", "T")
        first = tensors[0]
        d_outputs = tuple(
            first.new_zeros(shapes.shape(o, "B", "T")) if d is None else d for o, d in zip(self.op.spec.outputs, cotangents, strict=False)
        )
        outputs = tuple(x for x in made[: self.outputs] if x is not None)
        finals = tuple(x for x in made[self.outputs :] if x is not None) or None
        d_last = cotangents[self.outputs :]
        d_finals: Tensors | None = None
        if any(d is not None for d in d_last):
            kept = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
            d_finals = tuple(
                first.new_zeros(shapes.shape(s, "B"), dtype=kept) if d is None else d
                for s, d in zip(self.op.spec.states, d_last, strict=True)
            )
        d_inputs, d_params, d_states = backend.backward(
            *self.op._split(tensors), scale, initial, tuple(saved), outputs, finals, d_outputs, d_finals
        )
        flat = (*d_inputs, *d_params, *(d_states if d_states is not None else (first.new_empty(0) for _ in range(self.states))))
        return flat if len(flat) > 1 else flat[0]

    def fake_backward(self, *args: object) -> Returned:
        """Makes what backward returns, by shape alone."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        initial = self.initial(args)  # type: ignore[arg-type]
        states = initial if initial is not None else tuple(tensors[0].new_empty(0) for _ in range(self.states))
        flat = (*(x.new_empty(x.shape) for x in tensors), *(s.new_empty(s.shape) for s in states))
        return flat if len(flat) > 1 else flat[0]

    def refuse(self, ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor | None) -> None:
        """Raises: there are no second derivatives."""
        raise RuntimeError(f"{self.op.spec.name} has no second derivative: its backward cannot be differentiated")

    # -- step --

    def step(self, *args: object) -> Returned:
        """Runs a backend's step, which writes the states; their version says so, for a kernel writes past autograd."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        states: Tensors = args[self.tensors : self.tensors + self.states]  # type: ignore[assignment]
        scale, name = args[-2:]
        run = _step_of(self.op._pick(name, tensors), name)  # type: ignore[arg-type]
        outputs = run(*self.op._split(tensors), scale, states)
        torch.autograd.graph.increment_version(states)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def fake_step(self, *args: object) -> Returned:
        """Makes what step returns, by shape alone."""
        tensors: Tensors = args[: self.tensors]  # type: ignore[assignment]
        sizes = self.sizes(tensors, "B")
        outputs = tuple(tensors[0].new_empty(sizes.shape(o, "B")) for o in self.op.spec.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


class _Direct(torch.autograd.Function):
    """Runs a backend without the dispatcher: on meta tensors, whose dispatcher entry only makes shapes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, op: Operator, backend: Backend, scale: float, keep: bool, *tensors: Tensor
    ) -> Tensors:
        """Runs the backend's forward over inputs, params and, where given, initial states."""
        n = len(op._names)
        outputs, finals, saved = backend.forward(*op._split(tensors[:n]), scale, tensors[n:] or None, keep)
        ctx.save_for_backward(*tensors, *saved, *outputs, *(finals or ()))
        ctx.counts = (len(tensors), len(saved), len(outputs))  # type: ignore[attr-defined]
        ctx.op, ctx.backend, ctx.scale, ctx.keep = op, backend, scale, keep  # type: ignore[attr-defined]
        return (*outputs, *(finals or ()))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Runs the backend's backward."""
        kept, op = ctx.saved_tensors, ctx.op  # type: ignore[attr-defined]
        given, saved, made = ctx.counts  # type: ignore[attr-defined]
        tensors, n = kept[:given], len(op._names)
        outputs, finals = kept[given + saved : given + saved + made], kept[given + saved + made :] or None
        d_inputs, d_params, d_states = ctx.backend.backward(  # type: ignore[attr-defined]
            *op._split(tensors[:n]),
            ctx.scale,  # type: ignore[attr-defined]
            tensors[n:] or None,
            kept[given : given + saved],
            outputs,
            finals,
            cotangents[:made],
            cotangents[made:] or None,
        )
        return (None, None, None, None, *d_inputs, *d_params, *(d_states or ()))
