"""Times an operator against its peers on the CPU: repeats in turn, medians and minima, memory, and shares of what the machine can do.

A call on one thread is timed by that thread's CPU time, which other people's jobs on the machine do not count in; more threads by the wall.

What it is: ``bench`` makes a Report, which prints itself as rows and as JSON. A peer is timed only after its numbers agree with a
float64 reference of what it computes. What it is not: no tuner; it changes nothing.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lagen.bench_peers import LIBRARIES, Peer, peer_of
from lagen.emit.cpp_fit import Fallback
from lagen.emit.cpp_plan import Program, Sweep, plan_backward, plan_forward
from lagen.ir.variant import Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.differentiate import differentiate
from lagen.runtime.operator import Operator
from lagen.verify.cases import Extent, make, sizes
from lagen.verify.compare import error
from lagen.verify.oracle import oracle

PASSES = ("forward", "forward + backward")
AGREED = 1e-4  # error against float64 under which a peer computes what it should
LONGEST = 20.0  # seconds a call may take; a peer that would take longer is left out


@dataclass(frozen=True)
class Timing:
    """One contestant at one length: milliseconds over ``repeats`` calls."""

    who: str
    of: str
    tokens: int
    median: float
    least: float
    repeats: int


@dataclass(frozen=True)
class Report:
    """What was measured, where and how."""

    variant: str
    machine: str
    how: str
    timings: tuple[Timing, ...]
    slopes: tuple[tuple[str, str, float], ...]  # who, of, exponent of time in T
    memory: tuple[tuple[str, int, float], ...]  # pass, tokens, MiB above inputs, outputs and gradients at its peak
    gemm_rate: float  # GFLOP/s of a matmul on the same threads
    copy_rate: float  # GB/s of a copy, read and written
    shares: tuple[tuple[str, float, float], ...]  # pass, share of the GEMM rate, share of the copy rate, at the longest T
    left_out: tuple[str, ...]

    def find(self, who: str, of: str, tokens: int) -> Timing | None:
        """Returns a timing, None where it was not taken."""
        return next((t for t in self.timings if (t.who, t.of, t.tokens) == (who, of, tokens)), None)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yields one row a timing: pass, T, who, median, least, and the peer's time over lagen's."""
        for t in self.timings:
            own = self.find("lagen", t.of, t.tokens)
            ratio = f"{t.median / own.median:.1f}" if own and t.who != "lagen" else ""
            yield t.of, str(t.tokens), t.who, f"{t.median:.3f}", f"{t.least:.3f}", ratio

    def crossover(self, peer: str, of: str) -> float | None:
        """Returns the length from which lagen is the faster, between two measured ones on their lines in logarithms.

        It is 0 where lagen is the faster at all measured lengths, None where at the longest it is not, or nothing was measured.
        """
        both = [(t.tokens, t.median / own.median) for t in self.of(peer, of) if (own := self.find("lagen", of, t.tokens))]
        slower = [i for i, (_, ratio) in enumerate(both) if ratio <= 1]
        if not both or slower and slower[-1] == len(both) - 1:
            return None
        if not slower:
            return 0.0
        (t0, r0), (t1, r1) = both[slower[-1] : slower[-1] + 2]
        return float(t0 * (t1 / t0) ** (math.log(r0) / (math.log(r0) - math.log(r1))))

    def of(self, who: str, of: str) -> list[Timing]:
        """Lists one contestant's timings of one pass by length."""
        return sorted((t for t in self.timings if (t.who, t.of) == (who, of)), key=lambda t: t.tokens)

    def to_json(self) -> dict[str, object]:
        """Returns the report as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Contestant:
    """Something that can be timed at a length: ``ready`` makes its tensors and returns its forward."""

    name: str
    ready: Callable[[int], tuple[Callable[..., Tensor], list[Tensor]]]
    multiple: int = 1  # lengths that it takes


def bench(
    operator: Operator,
    variant: Variant,
    lengths: Sequence[int],
    against: Sequence[str] = (),
    heads: int = 8,
    size: int = 64,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Times ``operator`` on the CPU at B = 1 against peers and returns the report.

    Peers are "sdpa" (torch's causal softmax attention), "torch" (the operator's own torch code) and libraries of bench_peers; none
    named: all that are here. Raises ValueError for a peer that is not known, and for numbers of the operator itself that do not agree
    with the oracle.
    """
    makers = {"sdpa": _sdpa, "torch": lambda *a: _operator("torch", *a)} | {name: _of_library(name) for name in LIBRARIES}
    unknown = [p for p in against if p not in makers]
    if unknown:
        raise ValueError(f"no peer is called {', '.join(unknown)}; there are {', '.join(makers)}")
    setting = (operator, variant, heads, size, dtype)
    own = _operator("lagen", *setting)
    if isinstance(own, str):
        raise ValueError(f"{variant.name}: {own}; nothing was timed")
    contestants, left_out = [own], list[str]()
    for name in against or [n for n in makers if n not in LIBRARIES or peer_of(n, variant.name)]:
        made = makers[name](*setting)
        if isinstance(made, str):
            left_out.append(f"{name}: {made}")
        else:
            contestants.append(made)
    timings = list[Timing]()
    for of in PASSES:
        slow: set[str] = set()
        for tokens in sorted(lengths):
            taken = _race([c for c in contestants if c.name not in slow], of, tokens, repeats)
            timings += taken
            late = {t.who for t in taken if t.median * 4e-3 > LONGEST}
            left_out += [f"{who}: {of} beyond T = {tokens} would take too long" for who in sorted(late - slow)]
            slow |= late
    gemm, copy = gemm_rate(), copy_rate()
    return Report(
        variant.name,
        machine(),
        f"B=1 H={heads} sizes {size}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, interleaved, {_clock()[1]}",
        tuple(timings),
        tuple((c.name, of, s) for c in contestants for of in PASSES if (s := slope(timings, c.name, of)) is not None),
        tuple((of, t, _memory(own, of, t)) for of in PASSES for t in sorted(lengths)),
        gemm,
        copy,
        tuple(_shares(variant, timings, max(lengths), heads, size, gemm, copy)),
        tuple(left_out),
    )


# ---- contestants ------------------------------------------------------------------------------------------------------------------


def _extent(tokens: int, variant: Variant, heads: int, size: int) -> Extent:
    dims = {d for t in variant.inputs + variant.params for d in t.dims} - {d for d, _ in variant.sizes}
    return Extent(tokens, batch=1, heads=heads, group=1, dims=tuple((d, size) for d in sorted(dims)))


Setting = tuple[Operator, Variant, int, int, torch.dtype]


def _judged(contestant: Contestant, variant: Variant, dtype: torch.dtype) -> Contestant | str:
    """Returns a contestant whose numbers agree with the oracle, or says that they do not."""
    call, tensors = contestant.ready(128)
    n = len(variant.inputs)
    wanted = oracle(variant, tuple(tensors[:n]), tuple(tensors[n:]))[0][0]
    with torch.no_grad():
        off = error(call(*tensors), wanted)
    return contestant if off < (AGREED if dtype == torch.float32 else 1e-2) else f"its numbers do not agree with float64: off by {off:.1e}"


def _maker(variant: Variant, heads: int, size: int, dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    """Returns what makes a variant's tensors at a length."""

    def tensors(tokens: int) -> list[Tensor]:
        case = make(variant, _extent(tokens, variant, heads, size), dtype=dtype)
        return [*case.inputs, *case.params]

    return tensors


def _operator(name: str, operator: Operator, variant: Variant, heads: int, size: int, dtype: torch.dtype) -> Contestant | str:
    """Makes a contestant of a backend."""
    backend = None if name == "lagen" else name

    def call(*tensors: Tensor) -> Tensor:
        made = operator(*tensors, backend=backend)
        return made[0] if isinstance(made, tuple) else made  # type: ignore[return-value]

    tensors = _maker(variant, heads, size, dtype)
    return _judged(Contestant(name, lambda tokens: (call, tensors(tokens))), variant, dtype)


def _of_library(name: str) -> Callable[..., Contestant | str]:
    """Returns what makes a contestant of a library's function for a variant, or says why there is none."""

    def made(operator: Operator, variant: Variant, heads: int, size: int, dtype: torch.dtype) -> Contestant | str:
        peer = peer_of(name, variant.name)
        if peer is None:
            return f"has no function for {variant.name} that is known here"
        found = peer.find()
        return found if isinstance(found, str) else _judged(_called(peer, found, variant, heads, size, dtype), variant, dtype)

    return made


def _called(peer: Peer, function: Callable[..., Tensor], variant: Variant, heads: int, size: int, dtype: torch.dtype) -> Contestant:
    names = [t.name for t in variant.inputs + variant.params]
    tensors = _maker(variant, heads, size, dtype)

    def call(*given: Tensor) -> Tensor:
        return peer.call(function, dict(zip(names, given, strict=True)))

    return Contestant(peer.library, lambda tokens: (call, tensors(tokens)), peer.multiple)


def _sdpa(operator: Operator, variant: Variant, heads: int, size: int, dtype: torch.dtype) -> Contestant | str:
    """Makes torch's causal softmax attention a contestant, once it agrees with softmax in float64."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ready(tokens: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(tokens)
        return call, [torch.randn(1, heads, tokens, size, generator=generator).to(dtype) for _ in range(3)]

    q, k, v = ready(70)[1]
    logits = (q.double() @ k.double().transpose(-1, -2)) * size**-0.5
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    wanted = logits.masked_fill(~seen, -math.inf).softmax(-1) @ v.double()
    off = error(call(q, k, v), wanted)
    return Contestant("sdpa", ready) if off < (AGREED if dtype == torch.float32 else 1e-2) else "its numbers do not agree with float64"


# ---- measuring --------------------------------------------------------------------------------------------------------------------


def _race(contestants: Sequence[Contestant], of: str, tokens: int, repeats: int) -> list[Timing]:
    """Times everyone's call in turn, ``repeats`` rounds after one that is not counted."""
    clock, _ = _clock()
    calls = {c.name: _call(c, of, tokens) for c in contestants if tokens % c.multiple == 0}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return [Timing(name, of, tokens, statistics.median(s) * 1e3, min(s) * 1e3, repeats) for name, s in seconds.items()]


def _clock() -> tuple[Callable[[], float], str]:
    """Returns what times a call, and its name."""
    return (time.thread_time, "CPU time") if torch.get_num_threads() == 1 else (time.perf_counter, "wall time")


def _call(contestant: Contestant, of: str, tokens: int) -> Callable[[], list[Tensor]]:
    """Returns one contestant's call, forward without gradients or forward and backward; it returns what it made."""
    forward, tensors = contestant.ready(tokens)

    def alone() -> list[Tensor]:
        with torch.no_grad():
            return [forward(*tensors)]

    if of == PASSES[0]:
        return alone
    leaves = [x.detach().requires_grad_() for x in tensors]
    cotangent = torch.randn_like(forward(*tensors))

    def both() -> list[Tensor]:
        made = forward(*leaves)
        gradients = torch.autograd.grad(made, leaves, cotangent, allow_unused=True)
        return [made, *(g for g in gradients if g is not None)]

    return both


def slope(timings: Sequence[Timing], who: str, of: str) -> float | None:
    """Fits time = c T^slope by least squares in logarithms; None where fewer than two lengths were timed."""
    points = [(math.log(t.tokens), math.log(t.least)) for t in timings if (t.who, t.of) == (who, of)]
    if len(points) < 2:
        return None
    mean_x, mean_y = (statistics.mean(p[i] for p in points) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _memory(contestant: Contestant, of: str, tokens: int) -> float:
    """Measures the MiB that a pass takes above what it is given and returns; nan where the system does not tell (Linux does)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan

    def kib(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    call = _call(contestant, of, tokens)
    call()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what the allocator holds back would hide what a call takes
    if trim:
        trim(0)
    reset.write_text("5")  # the high-water mark falls to what is held now
    before = kib("VmRSS")
    made = call()
    return max(0.0, (kib("VmHWM") - before) / 1024 - sum(x.numel() * x.element_size() for x in made) / 2**20)


def gemm_rate(size: int = 1024) -> float:
    """Measures the GFLOP/s of a float32 matmul."""
    a = torch.randn(size, size)
    return 2 * size**3 / _least(lambda: a @ a) / 1e9


def copy_rate(mib: int = 64) -> float:
    """Measures the GB/s of a copy, read and written."""
    a = torch.randn(mib * 2**18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / _least(lambda: b.copy_(a)) / 1e9


def _least(call: Callable[[], object], repeats: int = 9) -> float:
    seconds, (clock, _) = [], _clock()
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def flops(program: Program, known: dict[str, int]) -> int:
    """Counts a token's multiply-adds (as two) in the sweeps of one head."""
    sweeps = [s for p in program.passes for s in p.steps if isinstance(s, Sweep)]
    return sum(2 * (len(s.writes) + len(s.reads)) * known.get(s.rows, 1) * known.get(s.lanes, 1) for s in sweeps)


def _shares(
    variant: Variant, timings: Sequence[Timing], tokens: int, heads: int, size: int, gemm: float, copy: float
) -> Iterator[tuple[str, float, float]]:
    """Yields what share of the GEMM and copy rates each pass reached at ``tokens``: sweeps alone, inputs and outputs once."""
    recurrence = canonicalise(variant)
    forward, backward = plan_forward(recurrence), plan_backward(differentiate(recurrence))
    if isinstance(forward, Fallback) or isinstance(backward, Fallback):
        return
    known = sizes(variant, _extent(tokens, variant, heads, size))
    moved = 4 * sum(math.prod(known[d] for d in t.shape) for t in variant.inputs) + 4 * sum(
        math.prod(known[d] for d in (o.head, *o.dims) if d) * tokens for o in variant.outputs
    )
    for of, work, traffic in ((PASSES[0], flops(forward, known), 1), (PASSES[1], flops(forward, known) + flops(backward, known), 3)):
        own = next(t for t in timings if (t.who, t.of, t.tokens) == ("lagen", of, tokens))
        yield of, work * heads * tokens / own.least / 1e6 / gemm, traffic * moved / own.least / 1e6 / copy


def machine() -> str:
    """Names the processor, its cores and torch's version."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return f"{models[0] if models else 'unknown processor'}, {len(models) or 1} cores, torch {torch.__version__}"


def plot(report: Report, path: Path) -> None:
    """Draws time against T in logarithms, one line a contestant, and where lagen overtakes softmax attention, as PNG.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8))
    for axes, of in zip(figure.subplots(1, 2), PASSES, strict=True):
        for who in dict.fromkeys(t.who for t in report.timings):
            points = [(t.tokens, t.median) for t in report.of(who, of)]
            exponent = next((f"  T^{s:.2f}" for w, o, s in report.slopes if (w, o) == (who, of)), "")
            if points:
                axes.loglog(*zip(*points, strict=True), marker="o", linewidth=2.2 if who == "lagen" else 1.2, label=who + exponent)
        axes.set_title(of)
        axes.set_xlabel("T, tokens")
        axes.set_ylabel("ms a call, median")
        ticks = sorted({t.tokens for t in report.timings})
        axes.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.3)
        crossing = report.crossover("sdpa", of)
        if crossing:
            axes.axvline(crossing, linestyle="--", color="grey")
            axes.annotate(f"faster than softmax\nfrom T = {crossing:.0f}", (crossing, axes.get_ylim()[1]), va="top", fontsize=8)
        elif crossing == 0:
            axes.annotate("faster than softmax at every T", (0.98, 0.02), xycoords="axes fraction", ha="right", fontsize=8)
        axes.legend(fontsize=8)
    figure.suptitle(f"{report.variant}: {report.how}\n{report.machine}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
