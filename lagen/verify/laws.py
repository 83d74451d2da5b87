"""Laws: what every operator must keep, as data, and the one runner that tests them against the float64 oracle.

A row of LAWS names a law and the cases on which it is tested. A law is tested through the public operator alone, so that it holds of
whatever stands behind it: any backend, any schedule. Each tensor of each case gives one result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lagen.ir.variant import Variant
from lagen.verify import cases, compare
from lagen.verify.cases import Case, Extent
from lagen.verify.oracle import Tensors, oracle

SCALE = 0.37  # a scale that is nobody's default


class Operator(Protocol):
    """What the laws ask of an operator (runtime/operator)."""

    def __call__(
        self, /, *args: Tensor, scale: float | None, initial_state: Tensor | Tensors | None, output_final_state: bool, backend: str | None
    ) -> object:
        """Returns o, or (o, state)."""
        ...

    def step(self, /, *args: Tensor, state: Tensor | Tensors | None, scale: float | None, backend: str | None) -> object:
        """Returns (o, state) of one token; writes the state in place."""
        ...


@dataclass(frozen=True)
class LawResult:
    """One tensor of one case: its error, and the most that it may be."""

    law: str
    case: str
    tensor: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Tells whether the law held."""
        return self.error <= self.limit

    def to_json(self) -> dict[str, str | float | bool | None]:
        """Returns the result as a flat dict that JSON can hold: an infinite error is null."""
        error = self.error if math.isfinite(self.error) else None
        return {"law": self.law, "case": self.case, "tensor": self.tensor, "error": error, "limit": self.limit, "ok": self.ok}


@dataclass(frozen=True)
class Subject:
    """An operator under test."""

    op: Operator
    variant: Variant
    backend: str | None = None
    device: str = "cpu"


# ---- one run, and what it should have been --------------------------------------------------------------------------------------

Judged = Iterator[LawResult]
Run = Callable[[Tensors, Tensors, "Tensors | None"], "tuple[Tensors, Tensors | None]"]


def _tuple(x: object) -> Tensors:
    """Takes the one tensor, or the tuple of them, that an operator returns."""
    return x if isinstance(x, tuple) else (x,)


def call(subject: Subject, scale: float | None, lengths: tuple[int, ...] = ()) -> Run:
    """Wraps the operator as a function of tuples; with ``lengths``, of sequences packed behind each other."""
    variant = subject.variant
    packed: dict[str, Any] = {}
    if lengths:
        packed["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=subject.device)

    def run(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        state = states if states is None or len(states) != 1 else states[0]
        keep = variant.causal
        got = subject.op(*inputs, *params, scale=scale, initial_state=state, output_final_state=keep, backend=subject.backend, **packed)
        if not keep:
            return _tuple(got), None
        assert isinstance(got, tuple), f"{variant.name} was asked for its final state"
        return _tuple(got[0]), _tuple(got[1])

    return run


def stepped(subject: Subject) -> Run:
    """Wraps the operator's decode step as a function of whole sequences, which are given a state to begin with."""

    def run(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        assert states is not None
        held = tuple(s.clone() for s in states)
        rows: list[Tensors] = []
        for t in range(inputs[0].shape[1]):
            state = held[0] if len(held) == 1 else held
            got = subject.op.step(*(x[:, t] for x in inputs), *params, state=state, scale=None, backend=subject.backend)
            assert isinstance(got, tuple), f"{subject.variant.name}.step returns (o, state)"
            rows.append(_tuple(got[0]))
            held = _tuple(got[1])
        return tuple(torch.stack(parts, 1) for parts in zip(*rows, strict=True)), held

    return run


def _recurrence(variant: Variant, scale: float | None, dtype: torch.dtype, final: bool) -> Run:
    """Wraps the oracle likewise."""
    return lambda inputs, params, states: oracle(variant, inputs, params, scale, states, final, dtype)


def _segments(run: Run, cuts: tuple[int, ...]) -> Run:
    """Runs stretches of tokens one after the other, each from the state that the last one left."""

    def cut(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        edges = (0, *cuts, inputs[0].shape[1])
        rows = []
        for start, end in zip(edges, edges[1:], strict=False):
            outputs, states = run(tuple(x[:, start:end] for x in inputs), params, states)
            rows.append(outputs)
        return tuple(torch.cat(parts, 1) for parts in zip(*rows, strict=True)), states

    return cut


def apart(run: Run, lengths: tuple[int, ...]) -> Run:
    """Runs packed sequences each by itself, from its own state."""

    def separate(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        edges = [0, *itertools.accumulate(lengths)]
        made = []
        for n, (start, end) in enumerate(itertools.pairwise(edges)):
            own = None if states is None else tuple(s[n : n + 1] for s in states)
            made.append(run(tuple(x[:, start:end] for x in inputs), params, own))
        outputs = tuple(torch.cat(parts, 1) for parts in zip(*(o for o, _ in made), strict=True))
        finals = [f for _, f in made if f is not None]
        return outputs, tuple(torch.cat(parts) for parts in zip(*finals, strict=True)) if finals else None

    return separate


def pack(case: Case, lengths: tuple[int, ...]) -> Case:
    """Packs the first tokens of each batch element, as many as ``lengths`` says."""

    def packed(xs: Tensors) -> Tensors:
        return tuple(torch.cat([x[n, :length] for n, length in enumerate(lengths)])[None] for x in xs)

    return replace(case, inputs=packed(case.inputs), d_outputs=packed(case.d_outputs))


def _strided(run: Run) -> Run:
    """Hands the operator views whose axes lie in memory in another order."""

    def turned(x: Tensor, axis: int) -> Tensor:
        return x.transpose(axis, -1).contiguous().transpose(axis, -1) if x.ndim > axis + 1 else x

    def strided(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        views = None if states is None else tuple(turned(s, 0) for s in states)
        return run(tuple(turned(x, 1) for x in inputs), tuple(turned(p, 0) for p in params), views)

    return strided


def _followed(run: Run, tail: Tensors) -> Run:
    """Lets other tokens follow, and forgets what they gave."""

    def follow(inputs: Tensors, params: Tensors, states: Tensors | None) -> tuple[Tensors, Tensors | None]:
        outputs, _ = run(tuple(torch.cat([x, y], 1) for x, y in zip(inputs, tail, strict=True)), params, states)
        return tuple(o[:, : inputs[0].shape[1]] for o in outputs), None

    return follow


def tensors(run: Run, variant: Variant, case: Case, gradients: bool = True, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Runs a case and returns all that comes of it by name: outputs, final states, and the gradient of every tensor given."""
    given = [*case.inputs, *case.params, *(case.initial_states or ())]
    leaves = [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_(gradients) for x in given]
    n, m = len(case.inputs), len(case.params)
    outputs, final = run(tuple(leaves[:n]), tuple(leaves[n : n + m]), tuple(leaves[n + m :]) or None)
    made = {o.name: x for o, x in zip(variant.outputs, outputs, strict=True)}
    if final is not None:
        made |= {f"{s.name}[T]": x for s, x in zip(variant.states, final, strict=True)}
    if gradients:
        cotangents = [*case.d_outputs, *(case.d_states if final is not None else ())]
        attached = [(x, d.to(x.device, x.dtype)) for x, d in zip(made.values(), cotangents, strict=True) if x.requires_grad]
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if attached:
            roots, seeds = zip(*attached, strict=True)
            grads = torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
        names = [*(f"d{t.name}" for t in variant.inputs + variant.params), *(f"d{s.name}[0]" for s in variant.states)]
        for name, leaf, grad in zip(names, leaves, grads, strict=False):
            made[name] = torch.zeros_like(leaf) if grad is None else grad
    return {name: x.detach() for name, x in made.items()}


def _to(case: Case, device: str) -> Case:
    def moved(xs: Tensors) -> Tensors:
        return tuple(x.to(device) for x in xs)

    return replace(
        case,
        inputs=moved(case.inputs),
        params=moved(case.params),
        initial_states=None if case.initial_states is None else moved(case.initial_states),
        d_outputs=moved(case.d_outputs),
        d_states=moved(case.d_states),
    )


def judge(
    law: str,
    subject: Subject,
    case: Case,
    run: Run,
    scale: float | None = None,
    gradients: bool = True,
    note: str = "",
    lengths: tuple[int, ...] = (),
) -> Judged:
    """Compares all that comes of a case with the oracle, and where that is off by more than the base, with the yardstick.

    With ``lengths`` the case is of packed sequences, and the oracle runs through each by itself.
    """

    def recurrence(dtype: torch.dtype) -> dict[str, Tensor]:
        wanted = _recurrence(variant, scale, dtype, bool(case.d_states))
        return tensors(apart(wanted, lengths) if lengths else wanted, variant, case, gradients, dtype)

    variant = subject.variant
    wanted, got = recurrence(torch.float64), tensors(run, variant, _to(case, subject.device), gradients)
    rough: dict[str, Tensor] = {}
    for name, x in got.items():
        error, limit = compare.error(x, wanted[name]), compare.limit(case.dtype)
        if error > limit:
            rough = rough or recurrence(case.dtype)
            limit = compare.limit(case.dtype, compare.error(rough[name], wanted[name]))
        yield LawResult(law, str(case) + note, name, error, limit)


# ---- the laws -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """A law: its name, what it says, how it is tested, and whether a quick check tests it."""

    name: str
    says: str
    test: Callable[[str, Subject, bool], Iterator[LawResult]]
    causal: bool = False  # has no meaning where every token sees every token


def _extent(time: int, thorough: bool) -> Extent:
    return Extent(time, batch=2, heads=2) if thorough else Extent(time, batch=1, heads=1)


def _test_lengths(law: str, subject: Subject, thorough: bool) -> Judged:
    for i, time in enumerate(dict.fromkeys(cases.lengths(subject.variant))):
        case = cases.make(subject.variant, _extent(time, thorough), carried=i % 2 == 1)
        yield from judge(law, subject, case, call(subject, None))


def _test_regimes(law: str, subject: Subject, thorough: bool) -> Judged:
    time = subject.variant.chunk_default + 5
    for regime in cases.regimes(subject.variant):
        for carried in (False, True) if thorough else (True,):
            case = cases.make(subject.variant, _extent(time, thorough), regime, carried=carried)
            yield from judge(law, subject, case, call(subject, None))


def _test_half(law: str, subject: Subject, thorough: bool) -> Judged:
    time = subject.variant.chunk_default + 5
    for dtype in (torch.bfloat16, torch.float16) if thorough else (torch.bfloat16,):
        for regime in cases.regimes(subject.variant) if thorough else ("mild",):
            case = cases.make(subject.variant, _extent(time, thorough), regime, dtype, carried=True)
            yield from judge(law, subject, case, call(subject, None))


def _test_heads(law: str, subject: Subject, thorough: bool) -> Judged:
    dims = (("K", 5), ("V", 17), ("M", 6))
    scale = SCALE if subject.variant.scaled else None
    case = cases.make(subject.variant, Extent(19, batch=2, heads=3, dims=dims), carried=True, seed=1)
    yield from judge(law, subject, case, call(subject, scale), scale, note=", B 2, H 3, K 5, V 17")


def _test_segments(law: str, subject: Subject, thorough: bool) -> Judged:
    c = subject.variant.chunk_default
    ways = ((c - 3, c + 1), (c,), (1, 2, 2, c + 2)) if thorough else ((c - 3, c + 1),)
    for cuts in ways:
        case = cases.make(subject.variant, _extent(c + 9, thorough), carried=True, seed=2)
        run = _segments(call(subject, None), cuts)
        yield from judge(law, subject, case, run, note=f", cut at {', '.join(map(str, cuts))}")


def _test_packed(law: str, subject: Subject, thorough: bool) -> Judged:
    c = subject.variant.chunk_default
    lengths = (0, 3, 0, c, c + 7, 1, 0) if thorough else (3, 0, c + 1)
    case = cases.make(subject.variant, Extent(max(lengths), batch=len(lengths), heads=1), carried=True, seed=8)
    run = call(subject, None, lengths)
    yield from judge(law, subject, pack(case, lengths), run, note=f", lengths {', '.join(map(str, lengths))}", lengths=lengths)


def _test_steps(law: str, subject: Subject, thorough: bool) -> Judged:
    if subject.backend == "oracle":  # which has no step of its own
        return
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.make(subject.variant, _extent(9, thorough), dtype=dtype, carried=True, seed=3)
        with torch.no_grad():
            yield from judge(law, subject, case, stepped(subject), gradients=False)


def _test_future(law: str, subject: Subject, thorough: bool) -> Judged:
    c = subject.variant.chunk_default
    for time in (c - 1, c + 1) if thorough else (c - 1,):
        case = cases.make(subject.variant, _extent(time, thorough), carried=True, seed=4)
        tail = _to(cases.make(subject.variant, _extent(7, thorough), seed=5), subject.device).inputs
        run = _followed(call(subject, None), tail)
        yield from judge(law, subject, replace(case, d_states=()), run, note=", 7 more behind")


def _test_strides(law: str, subject: Subject, thorough: bool) -> Judged:
    case = cases.make(subject.variant, Extent(21, batch=2, heads=2), carried=True, seed=6)
    yield from judge(law, subject, case, _strided(call(subject, None)))


def _test_repeats(law: str, subject: Subject, thorough: bool) -> Judged:
    time = subject.variant.chunk_default + 5
    case = _to(cases.make(subject.variant, _extent(time, thorough), dtype=torch.bfloat16, carried=True, seed=7), subject.device)
    first, second = (tensors(call(subject, None), subject.variant, case) for _ in range(2))
    for name, x in first.items():
        same = x.shape == second[name].shape and bool((x == second[name]).all())
        yield LawResult(law, str(case), name, 0.0 if same else math.inf, 0.0)


LAWS: tuple[Law, ...] = (
    Law("lengths", "chunked is recurrent, forward and backward, for every length around a chunk", _test_lengths),
    Law("gates", "also where gates are closed, open, reset or all keys are equal", _test_regimes),
    Law("half precision", "no worse than a few times the recurrence in the same dtype", _test_half),
    Law("heads", "batches and groups of heads stay apart, dims of any size, any scale", _test_heads),
    Law("segments", "any segmentation with carried state is the whole, forward and backward", _test_segments, causal=True),
    Law("packed", "sequences packed behind each other are those apart, forward and backward", _test_packed),
    Law("steps", "token by token is the whole", _test_steps, causal=True),
    Law("future", "what follows changes nothing before it", _test_future, causal=True),
    Law("strides", "views in any memory order give the same", _test_strides),
    Law("repeats", "the same call twice gives the same bits", _test_repeats),
)


def check(
    op: Operator, variant: Variant, backend: str | None = None, device: str = "cpu", thorough: bool = False, laws: tuple[str, ...] = ()
) -> Judged:
    """Tests the laws (all, or those named) on an operator and yields one result a tensor."""
    subject = Subject(op, variant, backend, device)
    for law in LAWS:
        if (not laws or law.name in laws) and (variant.causal or not law.causal):
            yield from law.test(law.name, subject, thorough)


def worst(results: list[LawResult]) -> list[LawResult]:
    """Returns for every law and case the result nearest to its limit, or furthest beyond it."""
    found: dict[tuple[str, str], LawResult] = {}
    for r in results:
        key = (r.law, r.case)
        if key not in found or strain(r) > strain(found[key]):
            found[key] = r
    return list(found.values())


def strain(result: LawResult) -> float:
    """Returns how near a result is to its limit: beyond 1 the law is broken."""
    if result.limit:
        return result.error / result.limit
    return math.inf if result.error else 0.0
